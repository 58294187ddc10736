"""DDIM ("Denoising Diffusion Implicit Models", arXiv 2010.02502) and its inversion.

Samplers are plain functions of ``model(z_t, t)``, which returns eps or v as ``schedule.prediction`` says; guidance.py
makes such models from a UNet and a prompt. They yield after each step, so callers own progress bars and early stops.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Generator, Tensor

from minidistill.schedule import Schedule, clean_and_noise

Predictor = Callable[[Tensor, Tensor], Tensor]  # (z_t [B, 4, h, w], t [B]) -> eps or v [B, 4, h, w]


def ddim_step(
    schedule: Schedule,
    prediction: Tensor,
    z_t: Tensor,
    t: int,
    t_next: int,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """Step from t to t_next, towards the image or away from it. Times below 0 are the end of sampling.

    The prediction at z_t implies z_0 and eps; mix them again at the noise level of t_next (DDIM, eq. 12 and 16):

        z_next = sqrt(alpha_bar_next) z_0 + sqrt(1 - alpha_bar_next - sigma_eta^2) eps + sigma_eta noise
        sigma_eta = eta sqrt((1 - alpha_bar_next) / (1 - alpha_bar)) sqrt(1 - alpha_bar / alpha_bar_next)

    ``eta`` 0 is deterministic, 1 has DDPM's variance. ``noise`` is standard normal, in the shape of z_t.
    """
    alpha_bar, alpha_bar_next = (schedule.alphas_cumprod[s] if s >= 0 else schedule.final_alpha for s in (t, t_next))
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()  # they stay on the CPU, so that a GPU never waits for them
    z_0, eps = clean_and_noise(schedule.prediction, prediction, z_t, alpha, sigma)
    sigma_eta = torch.zeros(())
    if eta:  # never on the way back to noise, where the variance would be negative
        sigma_eta = eta * ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)).sqrt()
    z_next = alpha_bar_next.sqrt() * z_0 + (1 - alpha_bar_next - sigma_eta**2).clamp(min=0).sqrt() * eps
    return z_next + sigma_eta * noise if eta else z_next


def fresh_noise(z_t: Tensor, generator: Generator | Sequence[Generator] | None) -> Tensor:
    """Standard normal noise of z_t's shape [B, 4, h, w], from one generator or from one per image of the batch."""
    if isinstance(generator, Sequence):  # in float32, like z_T: the same noise in every dtype
        return torch.cat([fresh_noise(own[None].float(), g) for own, g in zip(z_t, generator, strict=True)]).to(z_t)
    device = generator.device if generator else z_t.device
    return torch.randn(z_t.shape, generator=generator, device=device, dtype=z_t.dtype).to(z_t.device)


@torch.no_grad()
def ddim_loop(
    model: Predictor,
    schedule: Schedule,
    z_t: Tensor,
    steps: Sequence[tuple[int, int]],
    eta: float = 0.0,
    generator: Generator | Sequence[Generator] | None = None,
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Take ``steps``, pairs (t, t_next), from z_t [B, 4, h, w].

    Yields (z, prediction, t) after each step: the latents at t_next, and what the model predicted at t.
    The other arguments are those of ``ddim_sample``.
    """
    for t, t_next in steps:
        prediction = model(z_t, torch.full((len(z_t),), max(t, 0), device=z_t.device))
        noise = fresh_noise(z_t, generator) if eta else None
        z_t = ddim_step(schedule, prediction, z_t, t, t_next, eta, noise)
        yield z_t, prediction, t


def step_pairs(schedule: Schedule, steps: int, spacing: str | None = None) -> list[tuple[int, int]]:
    """(t, t_next) of each step, the noisiest first; the last t_next is usually below 0, the end of sampling."""
    timesteps, spacing = schedule.timesteps(steps, spacing), spacing or schedule.spacing
    end = timesteps[-1] - schedule.train_steps // steps if spacing == "leading" else -1
    return list(pairwise([*timesteps, end]))


def ddim_sample(
    model: Predictor,
    schedule: Schedule,
    z_T: Tensor,
    steps: int,
    eta: float = 0.0,
    generator: Generator | Sequence[Generator] | None = None,
    spacing: str | None = None,
) -> Iterator[Tensor]:
    """Denoise z_T [B, 4, h, w] in ``steps`` calls of ``model(z_t, t)``, t [B] int64; yields z_t after each step.

    ``model`` predicts eps or v, as ``schedule`` says. ``eta`` from 0 (deterministic) to 1 adds fresh noise, drawn from
    ``generator``: one for the batch, or one per image. ``spacing`` of the steps is "leading" or "trailing",
    by default the schedule's, see ``Schedule.timesteps``.

    Raises ValueError for more steps than the schedule has, and for an eta outside 0 to 1, which would add more noise
    than the next step has.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta runs from 0 (deterministic) to 1 (as much noise as DDPM), not {eta:g}.")
    for z_t, _, _ in ddim_loop(model, schedule, z_T, step_pairs(schedule, steps, spacing), eta, generator):
        yield z_t


def ddim_invert(model: Predictor, schedule: Schedule, z_0: Tensor, steps: int) -> Iterator[Tensor]:
    """Run DDIM backwards, from clean latents z_0 [B, 4, h, w] towards their noise; yields after each step.

    ``model``, ``schedule`` and ``steps`` are those of ``ddim_sample``. Each step uses the prediction at the cleaner of
    its two times in place of the noisier (DDIM, section 4.3), so going there and back is exact only in the limit of
    many steps. Raises ValueError for more steps than the schedule has.
    """
    upwards = [(t_next, t) for t, t_next in reversed(step_pairs(schedule, steps))]
    for z_t, _, _ in ddim_loop(model, schedule, z_0, upwards):
        yield z_t
