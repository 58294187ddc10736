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
def is_lost(unet: LoRAModel | FullStudent, batches: Sequence[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]) -> bool:
    """Whether the student has diverged, by its last batches: z_t, t, cond and eps_hat of each, and its loss there.

    It has when it is twice as far from the teacher as W alone, from which it set out (four times the squared error), or
    further than an answer of zeros. On the same batches: how much guidance changes differs greatly with t.
    """
    missed = sum(loss for *_, loss in batches)
    without = sum(F.mse_loss(unet(z_t, t, cond), eps_hat) for z_t, t, cond, eps_hat, _ in batches)
    zeros = sum(eps_hat.square().mean() for *_, eps_hat, _ in batches)
    return bool(missed > min(4 * without, zeros))


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linearly up for ``warmup`` updates, then down half a cosine, reaching zero after ``steps``."""
    return peak * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
