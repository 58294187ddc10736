"""Guidance distillation: the teacher calls the frozen UNet twice, the student calls the same UNet once, with its LoRA.

"LoRA-Enhanced Distillation on Guided Diffusion Models", arXiv 2312.06899.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidistill.guidance import batched_guided_noise, guided_noise
from minidistill.lora import LoRAModel

ENOUGH = 10  # examples to judge a student by


class FullStudent(nn.Module):
    """Plain distillation: beside the frozen teacher ``base`` a second UNet learns, in all its weights.

    Called as a :class:`~minidistill.lora.LoRAModel` is: the flag says which of the two.
    """

    def __init__(self, base: nn.Module, student: nn.Module):
        super().__init__()
        self.base, self.student = base, student

    def forward(self, z_t: Tensor, t: Tensor, context: Tensor, lora_enabled: bool = False) -> Tensor:
        unet = self.student if lora_enabled else self.base
        return unet(z_t, t, context.to(next(unet.parameters()).dtype))


@torch.no_grad()
def teacher(
    unet: LoRAModel | FullStudent,
    z_t: Tensor,
    t: Tensor,
    cond: Tensor,
    uncond: Tensor,
    guidance: float,
    batched: bool = False,
) -> Tensor:
    """eps_hat = eps_u + s (eps_c - eps_u), by two calls with the LoRA switched off. [B, 4, h, w] -> [B, 4, h, w].

    By one on a batch of twice the size if ``batched``.
    """
    guided = batched_guided_noise if batched else guided_noise
    return guided(partial(unet, lora_enabled=False), z_t, t, cond, uncond, guidance)


def student(unet: LoRAModel | FullStudent, z_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    """One call with the LoRA switched on. [B, 4, h, w] -> [B, 4, h, w]."""
    return unet(z_t, t, cond, lora_enabled=True)


@torch.no_grad()
def far_off(
    unet: LoRAModel | FullStudent, batches: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]
) -> tuple[float, float]:
    """How far the student, as it is now, is from the teacher, and how far one can be that has not diverged.

    Mean squared errors on its last batches: z_t, t, cond and eps_hat of each. It has diverged when it is further than
    an answer of zeros, or twice as far as W alone, from which it set out (four times the squared error). The latter
    takes ``ENOUGH`` examples to tell: how much guidance changes differs greatly with t.
    """

    def squared_error(lora_enabled: bool) -> Tensor:
        return sum(F.mse_loss(unet(*x, lora_enabled=lora_enabled), eps_hat) for *x, eps_hat in batches) / len(batches)

    most = sum(eps_hat.square().mean() for *_, eps_hat in batches) / len(batches)
    if sum(len(t) for _, t, *_ in batches) >= ENOUGH:
        most = min(most, 4 * squared_error(lora_enabled=False))
    return squared_error(lora_enabled=True).item(), most.item()


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linearly up for ``warmup`` updates, then down half a cosine, reaching zero after ``steps``."""
    return peak * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
