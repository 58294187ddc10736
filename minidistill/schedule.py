"""The noise schedule and DDIM as plain functions of it ("Denoising Diffusion Implicit Models", arXiv 2010.02502).

z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps, and v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) z_0,
where alpha_bar is ``alphas_cumprod``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from minidistill.config import ScheduleConfig

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (z_t, t) -> eps or v, as the schedule's `prediction` says


@dataclass(frozen=True)
class Schedule:
    """``alphas_cumprod`` is [train_steps] float32; ``final_alpha`` stands for the step before t=0."""

    alphas_cumprod: Tensor
    final_alpha: Tensor
    prediction: str = "eps"
    steps_offset: int = 1

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> "Schedule":
        """Raises ValueError for a ``beta_schedule`` or ``prediction`` that is not known."""
        if config.prediction not in ("eps", "v"):
            raise ValueError(f'The prediction is "eps" or "v", not "{config.prediction}".')
        if config.beta_schedule == "scaled_linear":
            betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.train_steps) ** 2
        elif config.beta_schedule == "linear":
            betas = torch.linspace(config.beta_start, config.beta_end, config.train_steps)
        else:
            raise ValueError(f'The beta schedule is "scaled_linear" or "linear", not "{config.beta_schedule}".')
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        final_alpha = torch.tensor(1.0) if config.set_alpha_to_one else alphas_cumprod[0]
        return cls(alphas_cumprod, final_alpha, config.prediction, config.steps_offset)

    @property
    def train_steps(self) -> int:
        return len(self.alphas_cumprod)

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) of time steps [B], each [B, 1, 1, 1] in the dtype of ``like``."""
        wide = torch.promote_types(like.dtype, torch.float32)
        alpha_bar = self.alphas_cumprod[t.cpu()].view(-1, 1, 1, 1).to(wide)
        return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)

    def timesteps(self, steps: int) -> list[int]:
        """The ``steps`` training steps that DDIM visits, from noise to picture ("leading" spacing with SD's offset).

        Raises ValueError unless 1 <= steps <= train_steps.
        """
        if not 1 <= steps <= self.train_steps:
            raise ValueError(f"DDIM takes 1 to {self.train_steps} steps, not {steps}.")
        stride = self.train_steps // steps
        offset = min(self.steps_offset, self.train_steps - 1 - (steps - 1) * stride)  # 1000 steps leave no room for it
        return [i * stride + offset for i in reversed(range(steps))]


def add_noise(schedule: Schedule, z_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t of clean latents [B, 4, h, w], noise of that shape and time steps [B] (DDIM, eq. 4)."""
    alpha, sigma = schedule.alpha_sigma(t, z_0)
    return alpha * z_0 + sigma * noise


def velocity(schedule: Schedule, z_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """v = alpha eps - sigma z_0 ("Progressive Distillation", arXiv 2202.00512, section 4)."""
    alpha, sigma = schedule.alpha_sigma(t, z_0)
    return alpha * noise - sigma * z_0


def min_snr_weight(schedule: Schedule, t: Tensor, most: float) -> Tensor:
    """What a prediction's squared error counts at time steps t [B], [B, 1, 1, 1] ("Min-SNR", arXiv 2303.09556).

    min(SNR, most) / SNR of eps, and / (SNR + 1) of v: the squared error of z_0 then counts min(SNR, most). Steps of
    little noise are many, easy and alike, and where every error of eps counts the same they take most of the gradient.
    """
    alpha_bar = schedule.alphas_cumprod[t.cpu()].view(-1, 1, 1, 1)
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(max=most) / (snr if schedule.prediction == "eps" else snr + 1)


def clean_and_noise(kind: str, prediction: Tensor, z_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """z_0 and eps, each [B, 4, h, w], according to a prediction of the given kind ("eps" or "v") at z_t."""
    if kind == "eps":
        return (z_t - sigma * prediction) / alpha, prediction
    return alpha * z_t - sigma * prediction, alpha * prediction + sigma * z_t


def ddim_step(
    schedule: Schedule,
    prediction: Tensor,
    z_t: Tensor,
    t: int,
    t_next: int,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """One step from t to t_next, forwards or back (DDIM, eq. 12); either below 0 is the end of sampling.

    ``eta`` scales the fresh ``noise`` (same shape as z_t): 0 is deterministic, 1 is DDPM's variance (DDIM, eq. 16).
    """
    alpha_bar = schedule.alphas_cumprod[t] if t >= 0 else schedule.final_alpha
    alpha_bar_next = schedule.alphas_cumprod[t_next] if t_next >= 0 else schedule.final_alpha
    alpha, sigma = alpha_bar.sqrt().to(z_t), (1 - alpha_bar).sqrt().to(z_t)
    z_0, eps = clean_and_noise(schedule.prediction, prediction, z_t, alpha, sigma)
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    spread = eta * variance.sqrt() if eta else torch.zeros(())  # the variance is negative on the way back
    direction = (1 - alpha_bar_next - spread**2).sqrt()
    z_next = alpha_bar_next.sqrt().to(z_t) * z_0 + direction.to(z_t) * eps
    return z_next + spread.to(z_t) * noise if eta else z_next


def fresh_noise(z_t: Tensor, generator: Generator | Sequence[Generator] | None) -> Tensor:
    """Standard normal, of z_t's shape [B, 4, h, w]; from one generator, or from one for each of the batch."""
    if isinstance(generator, Sequence):
        return torch.cat([fresh_noise(own[None], g) for own, g in zip(z_t, generator, strict=True)])
    device = generator.device if generator else z_t.device
    return torch.randn(z_t.shape, generator=generator, device=device, dtype=z_t.dtype).to(z_t.device)


@torch.no_grad()
def ddim_sample(
    model: Denoiser,
    schedule: Schedule,
    z_T: Tensor,
    steps: int,
    eta: float = 0.0,
    generator: Generator | Sequence[Generator] | None = None,
) -> Iterator[Tensor]:
    """Denoise z_T [B, 4, h, w] in ``steps`` calls of ``model(z_t, t)``, t [B] int64; yields z_t after each step.

    What the model predicts, eps or v, is what ``schedule`` says. Raises ValueError for more steps than it has, and for
    an eta that is not from 0 to 1 (beyond, more noise would be added than there is at the next step).
    ``generator`` draws the noise that eta > 0 asks for: one for all, or one for each picture of the batch.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is from 0, deterministic, to 1, as much noise as DDPM adds; not {eta:g}.")
    z_t = z_T
    for t in schedule.timesteps(steps):
        t_next = t - schedule.train_steps // steps
        prediction = model(z_t, torch.full((len(z_t),), t, device=z_t.device))
        noise = fresh_noise(z_t, generator) if eta else None
        z_t = ddim_step(schedule, prediction, z_t, t, t_next, eta, noise)
        yield z_t


@torch.no_grad()
def ddim_invert(model: Denoiser, schedule: Schedule, z_0: Tensor, steps: int) -> Iterator[Tensor]:
    """Deterministic DDIM run backwards, from clean latents towards the noise that yields them; yields after each step.

    ``model`` and ``schedule`` are those of ``ddim_sample``; z_0 is [B, 4, h, w], and so are the ``steps`` latents that
    are yielded. Raises ValueError for more steps than the schedule has.

    The prediction at the next, noisier time is taken to be that at the present one (DDIM, section 4.3), so going there
    and back is exact only in the limit of many steps.
    """
    z_t = z_0
    for t_next in reversed(schedule.timesteps(steps)):
        t = t_next - schedule.train_steps // steps
        prediction = model(z_t, torch.full((len(z_t),), max(t, 0), device=z_t.device))
        z_t = ddim_step(schedule, prediction, z_t, t, t_next)
        yield z_t
