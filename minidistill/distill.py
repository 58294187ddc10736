"""Guidance distillation: the teacher calls the frozen UNet twice; the student calls the same UNet once, with its LoRA.

The loss is mean(weight * (eps_student(z_t, t, cond) - eps_hat)^2), with eps_hat guided at one scale s. The student is
not told s, so there is one LoRA per guidance scale. "LoRA-Enhanced Distillation on Guided Diffusion Models", arXiv
2312.06899.

The method comes first: batches, targets and the learning rate. Variants and checks follow: a full copy as the student,
students of few steps, how to tell that a student has diverged, and the dial from guidance scales to strengths.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from minidistill.conditioning import Conditioning
from minidistill.guidance import Interval, UNetCall, interval_noise
from minidistill.lora import LoRAModel
from minidistill.schedule import Schedule


@dataclass(frozen=True)
class Batch:
    """Examples to learn from. ``batch[i:j]`` selects some of them.

    Attributes:
        z_t: noisy latents [B, 4, h, w].  t: time steps [B].  cond: prompts.
        weight: the weight of each example in the loss, [B, 1, 1, 1].
        target: the teacher's prediction [B, 4, h, w], where it was stored with the latents; otherwise None.
    """

    z_t: Tensor
    t: Tensor
    cond: Conditioning
    weight: Tensor
    target: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply ``function`` to every tensor."""
        target = None if self.target is None else function(self.target)
        return Batch(function(self.z_t), function(self.t), self.cond.map(function), function(self.weight), target)

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, index: slice | Tensor) -> "Batch":
        return self.map(lambda x: x[index])

    def split(self, parts: int) -> list["Batch"]:
        """At most ``parts`` parts of ceil(B / parts) examples; the last may be smaller."""
        size = -(-len(self) // parts)
        return [self[first : first + size] for first in range(0, len(self), size)]


# A target function takes the frozen UNet (LoRA off) and a batch; it returns what the student should predict.
Target = Callable[[UNetCall, Batch], Tensor]


def stored_target(frozen: UNetCall, batch: Batch) -> Tensor:
    """The guided prediction that the teacher made when it sampled these latents: no call now."""
    return batch.target


def guided_target(uncond: Conditioning, guidance: float, interval: Interval | None, batched: bool) -> Target:
    """A target that calls the teacher now, for latents that it has not seen. ``uncond`` is one prompt."""

    @torch.no_grad()
    def target(frozen: UNetCall, batch: Batch) -> Tensor:
        # Contiguous, because torch.compile would make another graph for the zero strides of expand.
        unconds = uncond.expand(len(batch)).map(Tensor.contiguous)
        return interval_noise(frozen, batch.z_t, batch.t, batch.cond, unconds, guidance, interval, batched)

    return target


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """The smaller of a linear warm-up and half a cosine that falls from ``peak`` to zero over all ``steps``."""
    return peak * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


class FullStudent(nn.Module):
    """Plain distillation: a second UNet, ``student``, is trained in full beside the frozen teacher ``base``.

    Called like a :class:`~minidistill.lora.LoRAModel`: ``lora_enabled`` selects the student.
    """

    def __init__(self, base: nn.Module, student: nn.Module):
        super().__init__()
        self.base, self.student = base, student

    def forward(self, z_t: Tensor, t: Tensor, cond: Conditioning | Tensor, lora_enabled: bool = False) -> Tensor:
        unet = self.student if lora_enabled else self.base  # the student is in float32, the teacher may be in bfloat16
        return unet(z_t, t, cond.to(next(unet.parameters()).dtype))


def few_step_states(schedule: Schedule, z_t: Tensor, z_0: Tensor, student_steps: int) -> tuple[Tensor, Tensor]:
    """The states of the teacher that N ``student_steps`` visit, and the prediction that leads from each to the next.

    A DDIM step (eq. 12 with eta 0) is linear in the prediction: z_s = k z_t + q eps. So eps* = (z_s - k z_t) / q leads
    to the teacher's own z_s, however many steps it took there. If it took one, eps* is its guided prediction.

    z_t: states at ``schedule.timesteps(steps, "trailing")``, [B, S, 4, h, w], with S a multiple of N; z_0: the ends
    [B, 4, h, w]. Returns z_t and eps* (or v*, as the schedule says), [B, N, 4, h, w] each.
    """
    z_t = z_t[:, :: z_t.shape[1] // student_steps]  # [B, N, 4, h, w]
    z_s = torch.cat([z_t[:, 1:], z_0[:, None]], 1)
    k, q = (x.to(z_t) for x in ddim_coefficients(schedule, student_steps))
    return z_t, (z_s - k * z_t) / q


def few_step_weight(schedule: Schedule, student_steps: int) -> Tensor:
    """The weight of the squared error at each of N steps, [N], with mean 1: q^2, which makes it the error of z_s."""
    squares = ddim_coefficients(schedule, student_steps)[1].flatten().square().float()
    return squares / squares.mean()


def ddim_coefficients(schedule: Schedule, steps: int) -> tuple[Tensor, Tensor]:
    """k and q in z_s = k z_t + q prediction, for ``steps`` with trailing spacing: [N, 1, 1, 1] each, float64.

    They follow from z_s = alpha_s z_0 + sigma_s eps, with the z_0 and eps that the prediction implies at z_t.
    """
    t = torch.tensor([*schedule.timesteps(steps, "trailing"), -1])
    alpha, sigma = (x.double() for x in schedule.alpha_sigma(t, like=schedule.alphas_cumprod))  # as in ddim_step
    (alpha_t, alpha_s), (sigma_t, sigma_s) = (alpha[:-1], alpha[1:]), (sigma[:-1], sigma[1:])
    if schedule.prediction == "eps":
        k = alpha_s / alpha_t
        return k, sigma_s - k * sigma_t
    return alpha_s * alpha_t + sigma_s * sigma_t, sigma_s * alpha_t - alpha_s * sigma_t  # v


ENOUGH_EXAMPLES = 10  # to tell whether a student has diverged


@torch.no_grad()
def error_and_limit(
    unet: LoRAModel | FullStudent, batches: Sequence[Batch], interval: Interval | None = None
) -> tuple[float, float]:
    """The student's loss on ``batches`` with targets, and the most it can be without having diverged.

    A student has diverged if it is further from the teacher than a prediction of zeros, or twice as far (four times the
    squared error) as W alone, where it started. The second test needs ``ENOUGH_EXAMPLES``, because the effect of
    guidance depends strongly on t. It uses only examples inside the teacher's ``interval``: elsewhere W alone is right.
    """
    guided = [b[interval.includes(b.t)] for b in batches] if interval else batches
    guided = [batch for batch in guided if len(batch)]
    enough = sum(map(len, guided)) >= ENOUGH_EXAMPLES
    batches = guided if enough else batches

    def squared_error(lora_enabled: bool) -> Tensor:
        predictions = [unet(b.z_t, b.t, b.cond, lora_enabled=lora_enabled) for b in batches]
        return sum((b.weight * (p - b.target).square()).mean() for b, p in zip(batches, predictions)) / len(batches)

    limit = sum((b.weight * b.target.square()).mean() for b in batches) / len(batches)
    if enough:
        limit = min(limit, 4 * squared_error(lora_enabled=False))
    return squared_error(lora_enabled=True).item(), limit.item()


@dataclass(frozen=True)
class Dial:
    """Which strength of a student's LoRA stands for which guidance scale.

    ``points`` are pairs (guidance, strength), joined by straight lines. The first is (1, 0), no guidance; another is
    (s, 1), the scale that the student has learned; the rest were measured.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def through(cls, learned: float, measured: Sequence[tuple[float, float]] = ()) -> "Dial":
        """The dial of a student of guidance ``learned``, through further points that were measured."""
        return cls(tuple(sorted({1.0: 0.0, **dict(measured), learned: 1.0}.items())))

    def strength(self, guidance: float) -> float:
        """The strength for ``guidance``; beyond the last point it follows the last line, with a warning.

        Raises ValueError for 1 or less. In other tools 1 means the student as it is; here it would switch it off.
        """
        if guidance <= 1:
            raise ValueError(
                f"A student samples at guidance scales above 1, not at {guidance:g}: leave guidance out for the scale "
                "that it has learned, or leave out the LoRA to sample without guidance."
            )
        highest = self.points[-1][0]
        if guidance > highest:
            warnings.warn(f"This student was measured up to guidance {highest:g}, not at {guidance:g}.", stacklevel=2)
        elif len(self.points) == 2 and guidance < highest:
            warnings.warn(
                f"The strength for guidance {guidance:g} is a guess: this student was measured at {highest:g} alone. "
                "Measure it by `python -m minidistill.evaluate dial LORA --write`.",
                stacklevel=2,
            )
        lines = list(pairwise(self.points))
        (s_0, low), (s_1, high) = next((line for line in lines if guidance <= line[1][0]), lines[-1])
        return low + (guidance - s_0) / (s_1 - s_0) * (high - low)
