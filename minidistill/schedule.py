"""The noise schedule, and how z_0, eps and v follow from one another.

    z_t = alpha z_0 + sigma eps,  v = alpha eps - sigma z_0,  alpha = sqrt(alpha_bar_t),   sigma = sqrt(1 - alpha_bar_t)

z_0 are the clean latents of an image, eps is standard normal noise, and z_t mixes them: at time step t = 0 there is
almost no noise, at the last one almost nothing else. The network predicts eps or v from z_t, and either gives z_0.

alpha_bar is ``alphas_cumprod`` ("Denoising Diffusion Implicit Models", arXiv 2010.02502, writes it alpha).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from minidistill.config import ScheduleConfig

SPACINGS = ("leading", "trailing")


@dataclass(frozen=True)
class Schedule:
    """``alphas_cumprod`` is alpha_bar, [train_steps] float32; ``final_alpha`` the alpha_bar where sampling ends."""

    alphas_cumprod: Tensor
    final_alpha: Tensor
    prediction: str = "eps"  # what the UNet returns: "eps" or "v"
    steps_offset: int = 1
    spacing: str = "leading"  # the default spacing of a sampler's time steps

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> "Schedule":
        """Raises ValueError for an unknown ``beta_schedule`` or ``prediction``, and for eps with zero terminal SNR."""
        if config.prediction not in ("eps", "v"):
            raise ValueError(f'prediction must be "eps" or "v", not "{config.prediction}".')
        first, last, steps = config.beta_start, config.beta_end, config.train_steps
        if config.beta_schedule == "scaled_linear":
            betas = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float32) ** 2
        elif config.beta_schedule == "linear":
            betas = torch.linspace(first, last, steps, dtype=torch.float32)
        else:
            raise ValueError(f'beta_schedule must be "scaled_linear" or "linear", not "{config.beta_schedule}".')
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)  # "DDPM", arXiv 2006.11239, above eq. 4
        if config.zero_terminal_snr:  # arXiv 2305.08891, algorithm 1, but just above 0, as we divide by it
            if config.prediction == "eps":
                raise ValueError("With zero terminal SNR a UNet cannot predict eps, only v: --prediction v.")
            alpha = alphas_cumprod.sqrt()
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
            alphas_cumprod = (alpha**2).clamp(min=2**-24)
        final_alpha = torch.tensor(1.0) if config.set_alpha_to_one else alphas_cumprod[0]
        return cls(alphas_cumprod, final_alpha, config.prediction, config.steps_offset, config.spacing)

    @property
    def train_steps(self) -> int:
        return len(self.alphas_cumprod)

    def to(self, device: torch.device | str) -> "Schedule":
        """A copy with its table on ``device``, so that a lookup there does not synchronize."""
        table = dict(alphas_cumprod=self.alphas_cumprod.to(device), final_alpha=self.final_alpha.to(device))
        return replace(self, **table)

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at time steps t [B], each [B, 1, 1, 1] in the dtype and on the device of ``like``.

        A t below 0 is the end of sampling, with ``final_alpha``.
        """
        wide = torch.promote_types(like.dtype, torch.float32)
        levels = torch.cat([self.final_alpha.view(1), self.alphas_cumprod])  # the first one is that of t = -1
        alpha_bar = levels[t.to(levels.device).clamp(min=-1) + 1].view(-1, 1, 1, 1).to(wide)
        return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)

    def timesteps(self, steps: int, spacing: str | None = None) -> list[int]:
        """The ``steps`` time steps that DDIM visits, the noisiest first, with the model's own spacing by default.

        "leading" is Stable Diffusion's own, with its offset: with 4 steps the first is at t = 751. "trailing" starts at
        the noisiest t, 999 ("Common Diffusion Noise Schedules", arXiv 2305.08891, section 3.3): better for few steps.
        Raises ValueError unless 1 <= steps <= train_steps, and for another spacing.
        """
        if not 1 <= steps <= self.train_steps:
            raise ValueError(f"DDIM takes 1 to {self.train_steps} steps, not {steps}.")
        spacing = spacing or self.spacing
        if spacing not in SPACINGS:
            raise ValueError(f'spacing must be "leading" or "trailing", not "{spacing}".')
        if spacing == "trailing":
            grid = np.arange(self.train_steps, 0, -self.train_steps / steps)[:steps]  # rounds as diffusers does
            return (grid.round().astype(int) - 1).tolist()
        stride = self.train_steps // steps
        offset = min(self.steps_offset, self.train_steps - 1 - (steps - 1) * stride)  # 1000 steps leave no room for it
        return [i * stride + offset for i in reversed(range(steps))]


def add_noise(schedule: Schedule, z_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = alpha z_0 + sigma noise (DDIM, eq. 4), for z_0 and noise [B, 4, h, w] and time steps t [B]."""
    alpha, sigma = schedule.alpha_sigma(t, z_0)
    return alpha * z_0 + sigma * noise


def velocity(schedule: Schedule, z_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """v = alpha eps - sigma z_0 ("Progressive Distillation", arXiv 2202.00512, section 4)."""
    alpha, sigma = schedule.alpha_sigma(t, z_0)
    return alpha * noise - sigma * z_0


def clean_and_noise(kind: str, prediction: Tensor, z_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """z_0 and eps, each [B, 4, h, w], that a prediction of the given ``kind`` ("eps" or "v") implies at z_t."""
    if kind == "eps":
        return (z_t - sigma * prediction) / alpha, prediction  # DDIM, eq. 9
    return alpha * z_t - sigma * prediction, alpha * prediction + sigma * z_t  # "Progressive Distillation", section 4


def min_snr_weight(schedule: Schedule, t: Tensor, gamma: float) -> Tensor:
    """Loss weights at time steps t [B], [B, 1, 1, 1] ("Min-SNR", arXiv 2303.09556).

    min(SNR, gamma) / SNR for eps, and / (SNR + 1) for v, with SNR = alpha_bar / (1 - alpha_bar): in terms of z_0, the
    squared error is weighted by min(SNR, gamma). Without a cap, the many easy steps with little noise would
    dominate the gradient.
    """
    alpha_bar = schedule.alphas_cumprod[t.to(schedule.alphas_cumprod.device)].view(-1, 1, 1, 1)
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(max=gamma) / (snr if schedule.prediction == "eps" else snr + 1)
