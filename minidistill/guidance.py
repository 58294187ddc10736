"""Classifier-free guidance ("Classifier-Free Diffusion Guidance", arXiv 2207.12598, eq. 6, as SD writes it)."""

from collections.abc import Callable

import torch
from torch import Tensor


def steps_without(selective: float, steps: int) -> int:
    """How many of ``steps``, the last ones, go without guidance ("Selective Guidance", arXiv 2305.09847)."""
    return round(selective * steps)


def guided_noise(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    z_t: Tensor,
    t: Tensor,
    cond: Tensor,
    uncond: Tensor,
    guidance: float,
) -> Tensor:
    """The teacher's prediction: two calls of ``model(z_t, t, context)`` on the same latents.

    Args:
        z_t: noisy latents [B, 4, h, w].  t: time steps [B].
        cond, uncond: embeddings [B, L, D] of the prompts, and of the empty or negative prompt.
        guidance: the scale s. 1 is no guidance at all.

    Returns:
        eps_hat (or v_hat: the formula is linear, and so are the two) [B, 4, h, w].
    """
    eps_cond = model(z_t, t, cond)
    eps_uncond = model(z_t, t, uncond)
    return eps_uncond + guidance * (eps_cond - eps_uncond)


def batched_guided_noise(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    z_t: Tensor,
    t: Tensor,
    cond: Tensor,
    uncond: Tensor,
    guidance: float,
) -> Tensor:
    """The same by one call of ``model``, on a batch of twice the size: faster where memory and device allow."""
    both = model(torch.cat([z_t, z_t]), torch.cat([t, t]), torch.cat([cond, uncond]))  # [2B, 4, h, w]
    halves = iter(both.chunk(2))  # handed out as if they were two calls: the formula stands above, once
    return guided_noise(lambda *inputs: next(halves), z_t, t, cond, uncond, guidance)
