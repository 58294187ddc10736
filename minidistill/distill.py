"""Guidance distillation: the teacher calls the frozen UNet twice, the student calls the same UNet once, with its LoRA.

"LoRA-Enhanced Distillation on Guided Diffusion Models", arXiv 2312.06899.
"""

import math

import torch
from torch import Tensor

from minidistill.guidance import guided_noise
from minidistill.lora import LoRAModel


@torch.no_grad()
def teacher(unet: LoRAModel, z_t: Tensor, t: Tensor, cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
    """eps_hat = eps_u + s (eps_c - eps_u), by two calls with the LoRA switched off. [B, 4, h, w] -> [B, 4, h, w].

    The UNet computes in the dtype of the embeddings; latents and guidance stay in that of z_t, which may be wider.
    """
    return guided_noise(
        lambda z_t, t, context: unet(z_t.to(cond.dtype), t, context, lora_enabled=False).to(z_t.dtype),
        *(z_t, t, cond, uncond, guidance),
    )


def student(unet: LoRAModel, z_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    """One call with the LoRA switched on. [B, 4, h, w] -> [B, 4, h, w], in the dtypes that the teacher has."""
    return unet(z_t.to(cond.dtype), t, cond, lora_enabled=True).to(z_t.dtype)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linearly up for ``warmup`` updates, then down half a cosine, reaching zero after ``steps``."""
    return peak * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
