"""The other side of the benchmark: diffusers' UNet and pipeline step, peft's LoRA.

Each function imports the package it needs, so this file can be imported without them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from minidistill.conditioning import Conditioning, cat
from minidistill.config import ScheduleConfig, UNetConfig
from minidistill.formats.model_configs import published_schedule, published_unet


def peer_unet(config: UNetConfig) -> nn.Module:
    """diffusers' UNet of the same configuration."""
    import diffusers

    return diffusers.UNet2DConditionModel.from_config(published_unet(config))


def peer_lora(unet: nn.Module, rank: int, layers: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Let peft add a LoRA to ``layers``, in W's dtype (ours is float32). Returns the (down, up) pairs by layer name."""
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers)))
    adapted = {name: unet.get_submodule(name) for name in layers}
    return {name: (x.lora_A["default"].weight, x.lora_B["default"].weight) for name, x in adapted.items()}


def peer_call(unet: nn.Module, z_t: Tensor, t: Tensor, cond: Conditioning | Tensor) -> Tensor:
    """A call of diffusers' UNet in its weights' dtype, which is that of the embeddings."""
    if isinstance(cond, Tensor):
        return unet(z_t.to(cond.dtype), t, cond, return_dict=False)[0]
    added = dict(text_embeds=cond.pooled, time_ids=cond.sizes)
    return unet(z_t.to(cond.tokens.dtype), t, cond.tokens, added_cond_kwargs=added, return_dict=False)[0]


def peer_guided_image(
    unet: nn.Module, z_T: Tensor, contexts: tuple, guidance: float, steps: int, timed_steps: int
) -> Callable[[], tuple[Tensor, ...]]:
    """As diffusers' pipeline does it, with both passes in one call on a batch of two. Returns each step's latents."""
    import diffusers

    both = cat(list(contexts))
    scheduler = diffusers.DDIMScheduler.from_config(published_schedule(ScheduleConfig()))

    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        scheduler.set_timesteps(steps, device=z_T.device)
        latents = [z_T]
        for t in scheduler.timesteps[:timed_steps]:
            eps_cond, eps_uncond = peer_call(unet, latents[-1].expand(2, -1, -1, -1), t, both).chunk(2)
            eps_hat = torch.lerp(eps_uncond, eps_cond, guidance)
            latents.append(scheduler.step(eps_hat, t, latents[-1], return_dict=False)[0])
        return tuple(latents[1:])

    return run
