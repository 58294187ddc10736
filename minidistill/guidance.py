"""Classifier-free guidance ("Classifier-Free Diffusion Guidance", arXiv 2207.12598), and predictors made with it.

``guide`` is the formula. ``guided_noise`` and ``batched_guided_noise`` call the UNet and apply it; ``interval_noise``
applies it only at some time steps. ``plain``, ``guided`` and ``student`` make predictors, which samplers call:
``model(z_t, t) -> eps`` or v, with the prompt already inside. ``away_from`` gives a negative prompt to a
student, which makes only one prediction.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minidistill.conditioning import Conditioning, cat
from minidistill.samplers import Predictor
from minidistill.schedule import Schedule

UNetCall = Callable[[Tensor, Tensor, Conditioning], Tensor]  # (z_t, t, cond) -> eps or v, [B, 4, h, w]


def guide(eps_cond: Tensor, eps_uncond: Tensor, guidance: float | Tensor) -> Tensor:
    """eps_hat = eps_uncond + s (eps_cond - eps_uncond): eq. 6 with s = 1 + w, as Stable Diffusion writes it.

    v is affine in eps at a given z_t, and the weights s and 1 - s sum to 1, so the same formula holds for v.
    """
    if isinstance(guidance, Tensor) and guidance.ndim == 1:  # one for each image, not for each column of its pixels
        guidance = guidance.view(-1, 1, 1, 1)
    return eps_uncond + guidance * (eps_cond - eps_uncond)


def guided_noise(
    unet: UNetCall, z_t: Tensor, t: Tensor, cond: Conditioning, uncond: Conditioning, guidance: float | Tensor
) -> Tensor:
    """The guided prediction eps_hat (or v_hat) [B, 4, h, w], by two calls of ``unet(z_t, t, cond)``.

    Args:
        z_t: noisy latents [B, 4, h, w].  t: time steps [B].
        cond: B prompts.  uncond: the empty or negative prompt, B times. Both may be token embeddings [B, L, D].
        guidance: the scale s, or one for each image as a tensor [B] or [B, 1, 1, 1]. 1 is no guidance.
    """
    return guide(unet(z_t, t, cond), unet(z_t, t, uncond), guidance)


def batched_guided_noise(
    unet: UNetCall, z_t: Tensor, t: Tensor, cond: Conditioning, uncond: Conditioning, guidance: float | Tensor
) -> Tensor:
    """``guided_noise`` by one call on a batch of 2B: more memory, often less time."""
    both = unet(torch.cat([z_t, z_t]), torch.cat([t, t]), cat([cond, uncond]))  # [2B, 4, h, w]
    return guide(*both.chunk(2), guidance)


class Interval(NamedTuple):
    """Guide only at time steps low <= t <= high; a batch without such a t needs one call.

    "Applying Guidance in a Limited Interval", arXiv 2404.07724.
    """

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g} {self.high:g}"

    def includes(self, t: Tensor) -> Tensor:
        """[B] time steps -> [B] bool."""
        return (self.low <= t) & (t <= self.high)


def selective_interval(schedule: Schedule, steps: int, share: float, spacing: str | None = None) -> Interval | None:
    """Selective guidance (arXiv 2305.09847): no guidance in the last ``share`` of the ``steps``.

    Returns None if every step is guided. Raises ValueError for a share outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"selective must be a share of the steps, from 0 to 1, not {share:g}.")
    guided_steps = steps - round(share * steps)
    if guided_steps == steps:
        return None
    timesteps = schedule.timesteps(steps, spacing)  # the noisiest first
    low = timesteps[guided_steps - 1] if guided_steps else schedule.train_steps  # no step is guided: above every t
    return Interval(low, schedule.train_steps)


def interval_noise(
    unet: UNetCall,
    z_t: Tensor,
    t: Tensor,
    cond: Conditioning,
    uncond: Conditioning,
    guidance: float,
    interval: Interval | None = None,
    batched: bool = False,
) -> Tensor:
    """The guided prediction inside ``interval``, the plain one outside it; t [B] may mix both.

    None guides everywhere. Where no t lies inside there is only one call; ``batched`` guides in one call of 2B.
    """
    guided_call = batched_guided_noise if batched else guided_noise
    if interval is None:
        return guided_call(unet, z_t, t, cond, uncond, guidance)
    inside = interval.includes(t)  # [B]
    if not inside.any():
        return unet(z_t, t, cond)
    scale = 1 + (guidance - 1) * inside.to(z_t.dtype)  # [B]: s inside, 1 outside
    return guided_call(unet, z_t, t, cond, uncond, scale)


def plain(unet: UNetCall, cond: Conditioning) -> Predictor:
    """One call of the UNet, without guidance."""
    return lambda z_t, t: unet(z_t, t, cond)


def guided(
    unet: UNetCall, cond: Conditioning, uncond: Conditioning, guidance: float, interval: Interval | None = None
) -> Predictor:
    """The teacher: two calls of the UNet, or one outside ``interval``."""
    return lambda z_t, t: interval_noise(unet, z_t, t, cond, uncond, guidance, interval)


def student(unet: Callable[..., Tensor], cond: Conditioning) -> Predictor:
    """The student: one call of the UNet with its LoRA switched on."""
    return lambda z_t, t: unet(z_t, t, cond, lora_enabled=True)


def normalized_guidance(
    positive: Tensor, negative: Tensor, scale: float = 5.0, limit: float = 2.5, share: float = 0.25
) -> Tensor:
    """Push what attention reads from the prompt (Z+) away from what it reads from the negative prompt (Z-).

    All are [B, L, C]. "Normalized Attention Guidance", arXiv 2505.21179, section 3, for each token, with phi
    ``scale`` - 1, tau ``limit`` and alpha ``share``:

        Z~ = Z+ + phi (Z+ - Z-)
        Z^ = Z~ min(|Z~|_1, tau |Z+|_1) / |Z~|_1
        alpha Z^ + (1 - alpha) Z+
    """
    extrapolated = guide(positive, negative, scale)  # Z~
    norm, norm_positive = (x.norm(p=1, dim=-1, keepdim=True) for x in (extrapolated, positive))  # [B, L, 1]
    normalized = extrapolated * (limit * norm_positive / norm).clamp(max=1)  # Z^
    return torch.lerp(positive, normalized, share)


@contextmanager
def away_from(unet: nn.Module, negative: Conditioning) -> Iterator[None]:
    """Within the ``with`` block, push cross-attention of ``unet`` away from one prompt. A step is still one call."""

    def read_away(read: Callable[[Tensor, Tensor], Tensor], q: Tensor, context: Tensor) -> Tensor:
        return normalized_guidance(read(q, context), read(q, negative.tokens.expand(len(q), -1, -1)))

    layers = [layer for name, layer in unet.named_modules() if name.endswith(".attn2")]
    before = [vars(layer).get("read") for layer in layers]  # None, unless another ``away_from`` is around this one
    for layer in layers:
        layer.read = partial(read_away, layer.read)
    try:
        yield
    finally:
        for layer, read in zip(layers, before):
            del layer.read  # back to the method of the class
            if read is not None:
                layer.read = read
