"""What is timed: the UNet, a picture and a distillation step, ours and the peers', on the same random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidistill import kernels
from minidistill.bench.peers import peer_guided_picture, peer_lora, peer_unet
from minidistill.config import POCKET_UNET, POCKET_VAE, SD15_UNET, SD15_VAE, ScheduleConfig, UNetConfig, VAEConfig
from minidistill.distill import student, teacher
from minidistill.guidance import batched_guided_noise, guided_noise
from minidistill.lora import LoRAModel, inject_lora, lora_layers, merge_lora
from minidistill.schedule import Schedule, ddim_sample
from minidistill.training.recompute import LOW_MEMORY
from minidistill.unet import UNet
from minidistill.vae import VAE

GUIDANCE = 7.5


@dataclass(frozen=True)
class Size:
    unet: UNetConfig
    vae: VAEConfig
    tokens: int  # of a prompt
    steps: int  # DDIM steps of a picture
    batch: int  # of a distillation step; pictures are drawn one by one
    cpu_steps: int  # how many of a picture's steps are timed on a CPU
    cpu_repeats: int


SIZES = {
    "pocket": Size(POCKET_UNET, POCKET_VAE, tokens=16, steps=25, batch=16, cpu_steps=25, cpu_repeats=9),
    "sd15": Size(SD15_UNET, SD15_VAE, tokens=77, steps=50, batch=1, cpu_steps=1, cpu_repeats=2),
}


@dataclass
class Setup:
    """Weights and inputs of one size, from seeds: ours, the peers' and another process's are the same numbers."""

    size: Size
    device: torch.device
    dtype: torch.dtype
    rank: int
    timed_steps: int
    kernel: str = "auto"  # of the LoRA

    def randn(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)

    def latents(self, batch: int, seed: int = 1) -> Tensor:
        side = self.size.unet.sample_size
        return self.randn(batch, self.size.unet.in_channels, side, side, seed=seed)

    def contexts(self, batch: int) -> tuple[Tensor, Tensor]:
        """In place of the embeddings of prompts and of the empty prompt, each [B, L, D]."""
        shape = (batch, self.size.tokens, self.size.unet.context_width)
        return self.randn(*shape, seed=2), self.randn(*shape, seed=3)

    def random_weights(self, make: Callable[[], nn.Module], layout: torch.memory_format) -> dict[str, Tensor]:
        """Matrices that keep the variance; norms near 1 and biases near 0, but not there."""
        with torch.device("meta"):
            shapes = {name: x.shape for name, x in make().state_dict().items()}
        weights = {}
        for seed, (name, shape) in enumerate(shapes.items()):
            x = self.randn(*shape, seed=seed).mul_(shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.1)
            x.add_(1 if len(shape) == 1 and name.endswith("weight") else 0)
            weights[name] = x.contiguous(memory_format=layout) if len(shape) == 4 else x
        return weights

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return self.random_weights(lambda: UNet(self.size.unet), torch.channels_last)  # as load() converts them

    @cached_property
    def peer_weights(self) -> dict[str, Tensor]:
        return self.random_weights(lambda: UNet(self.size.unet), torch.contiguous_format)  # as from_pretrained() does

    def unet(self) -> UNet:
        return filled(lambda: UNet(self.size.unet), self.weights)

    def lora_unet(self, zero: bool = False) -> LoRAModel:
        unet = inject_lora(self.unet(), self.rank)  # lora_up is zero
        kernels.install(unet, self.kernel)
        if not zero:
            fill_pairs({name: (layer.lora_down, layer.lora_up) for name, layer in lora_layers(unet).items()})
        return unet

    def peer_unet(self, channels_last: bool = False) -> nn.Module:
        return peer_unet(self.size.unet, self.weights if channels_last else self.peer_weights)

    def peer_lora_unet(self) -> nn.Module:
        with torch.device("meta"):
            names = list(lora_layers(inject_lora(UNet(self.size.unet), self.rank)))
        unet = self.peer_unet()
        fill_pairs(peer_lora(unet, self.rank, names))
        return unet


def filled(make: Callable[[], nn.Module], weights: dict[str, Tensor]) -> nn.Module:
    """A frozen module of these very tensors, not of copies."""
    with torch.device("meta"):
        module = make()
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)


@torch.no_grad()
def fill_pairs(pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    """The same random LoRA for all models whose layers have the same names."""
    generator = torch.Generator(next(iter(pairs.values()))[0].device).manual_seed(4)
    for _, (down, up) in sorted(pairs.items()):
        down.normal_(std=down[0].numel() ** -0.5, generator=generator)
        up.normal_(std=0.1, generator=generator)


# The contestants. Each function below returns one: a function to be timed, whose results can be compared.
Contestant = Callable[[], tuple[Tensor, ...]]


def peer_call(unet: nn.Module, z_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
    return unet(z_t, t, context, return_dict=False)[0]


def forward(setup: Setup, who: str, alike: bool = False, compiled: bool = False) -> Contestant:
    """Each in the memory layout it comes in; with ``alike`` both channels last."""
    unet = setup.unet() if who == "ours" else setup.peer_unet(channels_last=alike)
    unet = torch.compile(unet) if compiled else unet
    model = unet if who == "ours" else partial(peer_call, unet)
    inputs = setup.latents(1), torch.tensor([621], device=setup.device), setup.contexts(1)[0]
    return torch.no_grad()(lambda: (model(*inputs),))


def decode(setup: Setup, who: str) -> Contestant:
    weights = setup.random_weights(lambda: VAE(setup.size.vae), torch.channels_last)
    vae = filled(lambda: VAE(setup.size.vae), weights)
    z = setup.latents(1)
    return torch.no_grad()(lambda: (vae.decode(z),))


def picture(setup: Setup, who: str, how: str) -> Contestant:
    """The first ``timed_steps`` of a picture: the latents after each. A peer guides in one call on a batch of two."""
    if who == "peer":
        size = setup.size
        return peer_guided_picture(
            setup.peer_unet(), setup.latents(1), setup.contexts(1), GUIDANCE, size.steps, setup.timed_steps
        )
    cond, uncond = setup.contexts(1)
    unet = setup.unet() if how in ("guided", "batched") else setup.lora_unet(zero=how == "merged")
    if how == "merged":
        merge_lora(unet)  # of zeros: the shared weights keep every bit, and the time is that of any merged LoRA

    def model(z_t: Tensor, t: Tensor) -> Tensor:
        if how == "guided":
            return guided_noise(unet, z_t, t, cond, uncond, GUIDANCE)
        if how == "batched":
            return batched_guided_noise(unet, z_t, t, cond, uncond, GUIDANCE)
        return unet(z_t, t, cond, lora_enabled=True)

    schedule, z_T = Schedule.from_config(ScheduleConfig()), setup.latents(1)
    return lambda: tuple(islice(ddim_sample(model, schedule, z_T, setup.size.steps), setup.timed_steps))


def distil(setup: Setup, who: str, teacher_in_loop: bool, recompute: bool = False) -> Contestant:
    """One update as in train.py, towards a stored prediction of the teacher's or one made in the step.

    To ``recompute`` is ``--memory low`` here; the peer's own way computes whole blocks again.
    """
    batch = setup.size.batch
    z_t, stored, (cond, uncond) = setup.latents(batch), setup.latents(batch, seed=5), setup.contexts(batch)
    t = torch.linspace(999, 1, batch, device=setup.device).long()
    unet = setup.lora_unet() if who == "ours" else setup.peer_lora_unet()
    if recompute and who == "ours":
        unet.base.recompute_below = LOW_MEMORY
    elif recompute:
        unet.enable_gradient_checkpointing()
    trainable = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0)

    def ask_teacher() -> Tensor:
        if who == "ours":
            return teacher(unet, z_t, t, cond, uncond, GUIDANCE)
        unet.disable_adapters()
        with torch.no_grad():
            eps_hat = guided_noise(partial(peer_call, unet), z_t, t, cond, uncond, GUIDANCE)
        unet.enable_adapters()
        return eps_hat

    def step() -> tuple[Tensor, Tensor]:
        eps_hat = ask_teacher() if teacher_in_loop else stored
        eps = student(unet, z_t, t, cond) if who == "ours" else peer_call(unet, z_t, t, cond)
        loss = F.mse_loss(eps.float(), eps_hat.float())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), norm

    return step


def sd15_step(kernel: str) -> Contestant:
    setup = Setup(SIZES["sd15"], torch.device("cuda"), torch.bfloat16, rank=16, timed_steps=1, kernel=kernel)
    return distil(setup, "ours", teacher_in_loop=False)


class Row(NamedTuple):
    label: str
    calls: int  # of the UNet; of a picture, a step
    make: Callable[[Setup, str], Contestant]


ROWS = {
    "unet": Row("UNet forward", 1, forward),
    "unet_alike": Row("UNet forward, both channels last", 1, partial(forward, alike=True)),
    "unet_compiled": Row("the same, both compiled", 1, partial(forward, alike=True, compiled=True)),
    "decode": Row("VAE decoder", 0, decode),
    "guided": Row("guided picture", 2, partial(picture, how="guided")),
    "batched": Row("guided picture, a call on a batch of two", 1, partial(picture, how="batched")),
    "merged": Row("one-pass picture, LoRA merged", 1, partial(picture, how="merged")),
    "unmerged": Row("one-pass picture, LoRA beside", 1, partial(picture, how="unmerged")),
    "trajectories": Row("distillation step, trajectories", 1, partial(distil, teacher_in_loop=False)),
    "recomputed": Row("the same, activations recomputed", 1, partial(distil, teacher_in_loop=False, recompute=True)),
    "noised": Row("distillation step, teacher in the loop", 3, partial(distil, teacher_in_loop=True)),
}
PICTURES = ("guided", "batched", "merged", "unmerged")
WITH_PEER = ("unet", "unet_alike", "unet_compiled", "guided", "batched", "trajectories", "recomputed", "noised")
PEERS = ("diffusers", "peft")


def contestants(compiled: bool = False) -> list[tuple[str, str]]:
    """(row, "ours") and, where there is one and its packages are installed, (row, "peer")."""
    rows = [row for row in ROWS if compiled or row != "unet_compiled"]
    rows_with_peer = WITH_PEER if all(map(find_spec, PEERS)) else ()
    return [(row, who) for row in rows for who in ("ours", "peer") if who == "ours" or row in rows_with_peer]
