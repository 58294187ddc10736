"""Measure how close a student is to its teacher, and images to other images and to their prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from minidistill.data.trajectories import teacher_trajectory
from minidistill.distill import few_step_states
from minidistill.guidance import Interval, guided, plain, student
from minidistill.pipeline import FRESH_NOISE, StableDiffusion
from minidistill.samplers import Predictor, fresh_noise
from minidistill.schedule import add_noise

EVALUATION_SEED = 1_000_000  # far from the seeds of training
Make = Callable[[], dict[str, Tensor]]


@dataclass
class ErrorShare:
    """Squared errors and their reference, for N trajectories of S steps, [N, S] each.

    With e = eps_student - eps_cond and g = eps_hat - eps_cond: ``errors`` |e - g|^2, ``gaps`` |g|^2, ``along`` e . g.
    """

    errors: Tensor
    gaps: Tensor
    along: Tensor

    @property
    def pooled(self) -> float:
        return (self.errors.sum() / self.gaps.sum()).item()

    @property
    def per_step(self) -> Tensor:
        """The share at each step, [S]; nan where the teacher is not guided."""
        errors, gaps = self.errors.sum(0), self.gaps.sum(0)
        return torch.where(gaps > 1e-9 * gaps.max(), errors / gaps, torch.nan)


def predict_each(model: Predictor, z_t: Tensor, timesteps: Sequence[int]) -> Tensor:
    """The predictions of ``model`` for the states of S steps, [B, S, 4, h, w] -> [B, S, 4, h, w]."""
    times = (torch.full((len(z_t),), t, device=z_t.device) for t in timesteps)
    return torch.stack([model(z_t[:, i], t) for i, t in enumerate(times)], 1)


def teacher_states(
    sd: StableDiffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    negative_prompt: str | None,
    interval: Interval | None,
    noised: bool,
    student_steps: int | None,
) -> dict[str, Tensor]:
    """``z_t`` on the teacher's guided trajectories, with ``eps_hat`` and ``eps_cond`` there: [B, S, 4, h, w] each.

    With ``noised`` the states are the ends z_0 of the trajectories, with fresh noise for the same time steps. For a
    student of few steps, the states are those that it visits, and ``eps_hat`` leads from each of them to the next.
    """
    timesteps = sd.schedule.timesteps(steps, "trailing" if student_steps else None)
    cond = sd.encode_prompt(list(prompts))
    uncond = sd.encode_negative(negative_prompt).expand(len(cond))
    z_T = sd.starting_noise(seeds)
    z_t, eps_hat, z_0 = teacher_trajectory(sd, cond, uncond, guidance, z_T, timesteps, interval)
    if student_steps:
        z_t, eps_hat = few_step_states(sd.schedule, z_t, z_0, student_steps)
        timesteps = sd.schedule.timesteps(student_steps, "trailing")
    if noised:
        generators = [torch.Generator().manual_seed(FRESH_NOISE + seed) for seed in seeds]
        times = (torch.full((len(z_0),), t, device=z_0.device) for t in timesteps)
        z_t = torch.stack([add_noise(sd.schedule, z_0, fresh_noise(z_0, generators), t) for t in times], 1)
        eps_hat = predict_each(guided(sd.unet, cond, uncond, guidance, interval), z_t, timesteps)
    return dict(z_t=z_t, eps_hat=eps_hat, eps_cond=predict_each(plain(sd.unet, cond), z_t, timesteps))


@torch.no_grad()
def noise_error_share(
    sd: StableDiffusion,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    negative_prompt: str | None = None,
    interval: Interval | None = None,
    noised: bool = False,
    student_steps: int | None = None,
    batch: int = 16,
    progress: bool = False,
    cache: Callable[[str, Make], dict[str, Tensor]] = lambda name, make: make(),
) -> ErrorShare:
    """Measure which share of the guidance the student misses, on the teacher's guided trajectories for ``prompts``.

    sum |eps_student - eps_hat|^2 / sum |eps_hat - eps_cond|^2 over all steps: 0 is the teacher, 1 is no guidance.

    Args:
        interval: the time steps at which the teacher is guided; None means all.
        noised: measure on the ends z_0 of the trajectories instead, with fresh noise for the same time steps.
        student_steps: of a student of few steps. It is measured on the states that it visits, and eps_hat is then the
            prediction that leads from each state to the next.
        cache: ``cache(name, make)`` returns ``make()``, the teacher's tensors for one batch. It may store them for
            the next student.
    """
    if noised and student_steps:
        raise ValueError("A student of few steps is measured on the teacher's trajectories, not on noised latents.")
    timesteps = sd.schedule.timesteps(student_steps, "trailing") if student_steps else sd.schedule.timesteps(steps)
    teacher = dict(steps=steps, guidance=guidance, negative_prompt=negative_prompt, interval=interval, noised=noised)
    teacher |= dict(student_steps=student_steps)
    parts = []  # per batch: errors, gaps, along, [B, S] each
    for first in tqdm(range(0, len(prompts), batch), desc="noise error", unit="batch", disable=not progress):
        some = list(prompts[first : first + batch])
        seeds = range(EVALUATION_SEED + first, EVALUATION_SEED + first + len(some))
        states = cache(f"{first:06d}", partial(teacher_states, sd, some, seeds, **teacher))
        z_t, eps_hat, eps_cond = (states[name].to(sd.device) for name in ("z_t", "eps_hat", "eps_cond"))
        eps = predict_each(student(sd.unet, sd.encode_prompt(some)), z_t, timesteps)
        eps, eps_hat, eps_cond = (x.cpu().double() for x in (eps, eps_hat, eps_cond))  # Apple's GPUs have no float64
        e, g = eps - eps_cond, eps_hat - eps_cond
        parts.append([x.sum((2, 3, 4)) for x in ((e - g).square(), g.square(), e * g)])
    return ErrorShare(*(torch.cat(x) for x in zip(*parts)))


class Estimate(NamedTuple):
    """A mean and its 95% interval. f"{estimate:.2f}" is "value (low to high)", each number with two digits."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        value, low, high = (format(x, spec) for x in self)
        return f"{value} ({low} to {high})"


def resample(prompts: int, resamples: int) -> Tensor:
    """The prompts in each bootstrap resample, [resamples, prompts] int64.

    We resample prompts rather than images, because the images of one prompt are alike.
    """
    return torch.randint(prompts, (resamples, prompts), generator=torch.Generator().manual_seed(0))


def estimate(values: Tensor, per: Tensor | None = None) -> Estimate:
    """sum ``values`` / sum ``per`` (default: ones) with its 95% interval, both [P, ...], resampled over P prompts."""
    per = torch.ones_like(values) if per is None else per
    values, per = values.double().flatten(1).sum(1), per.double().flatten(1).sum(1)
    chosen = resample(len(values), 10_000)
    means = values[chosen].sum(1) / per[chosen].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return Estimate((values.sum() / per.sum()).item(), low, high)


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """PIL images of one size -> uint8 [N, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).permute(0, 3, 1, 2)


def psnr(images: Sequence[Image.Image], references: Sequence[Image.Image]) -> Tensor:
    """Peak signal-to-noise ratio of each image to its reference in dB, [N]: -10 log10 of the mean squared error."""
    pairs = zip(images, references, strict=True)
    error = torch.cat([(pixels([a]) / 255 - pixels([b]) / 255).square().mean((1, 2, 3)) for a, b in pairs])
    return -10 * torch.log10(error.clamp_min(1e-10))


def ssim(images: Sequence[Image.Image], references: Sequence[Image.Image]) -> Tensor:
    """Structural similarity of each image to its reference, [N], by scikit-image (a development extra)."""
    from skimage.metrics import structural_similarity

    pairs = zip(map(np.asarray, images), map(np.asarray, references))
    return torch.tensor([structural_similarity(a, b, channel_axis=2) for a, b in pairs])


def frechet_distance(features: Tensor, references: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to [N, D] and [M, D] features ("FID", arXiv 1706.08500, eq. 6).

    |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)). The trace of the square root is the sum of the square roots of
    the eigenvalues of C_1 C_2, which are real and not negative.
    """
    means = [x.double().mean(0) for x in (features, references)]
    covariances = [x.double().T.cov() for x in (features, references)]
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp_min(0).sqrt()
    distance = (means[0] - means[1]).square().sum()
    distance = distance + covariances[0].trace() + covariances[1].trace() - 2 * roots.sum()
    return max(0.0, distance.item())  # rounding may leave a little less than 0


def frechet_interval(features: Tensor, references: Tensor, each: int) -> Estimate:
    """``frechet_distance`` of two sets [P * each, D], the same P prompts in the same order, resampled over prompts.

    A resample lacks some prompts, which raises every distance. So the interval's width comes from the resamples, and
    its place from the distance itself.
    """
    value = frechet_distance(features, references)
    ours, theirs = (x.view(-1, each, x.shape[-1]) for x in (features, references))
    values = [frechet_distance(ours[i].flatten(0, 1), theirs[i].flatten(0, 1)) for i in resample(len(ours), 200)]
    low, high = torch.tensor(values).quantile(torch.tensor([0.025, 0.975])).tolist()
    mean = sum(values) / len(values)
    return Estimate(value, max(0.0, value + low - mean), value + high - mean)


class ClipScore:
    """Agreement of images and prompts by a CLIP model ("CLIPScore", arXiv 2104.08718, without its factor 2.5).

    ``folder`` is the model's folder or hub id; ``tokenizer`` encodes the prompts.
    """

    def __init__(self, folder: str | Path, tokenizer: CLIPTokenizer):
        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.preprocess = CLIPImageProcessorPil.from_pretrained(folder)
        self.tokenizer = tokenizer

    @classmethod
    def in_model(cls, sd: StableDiffusion) -> "ClipScore | None":
        """The CLIP that comes with the model, in its folder ``clip``, if there is one."""
        return cls(sd.path / "clip", sd.tokenizer) if (sd.path / "clip").is_dir() else None

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """PIL images -> unit vectors [N, D]."""
        features = []
        for first in range(0, len(images), 64):
            inputs = self.preprocess(list(images[first : first + 64]), return_tensors="pt")
            features.append(self.model.get_image_features(**inputs).pooler_output)
        return F.normalize(torch.cat(features), dim=-1)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> unit vectors [N, D]."""
        ids = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        return F.normalize(self.model.get_text_features(**ids).pooler_output, dim=-1)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """100 times the cosine between each image and its prompt, [N]."""
        return 100 * (self.embed_images(images) * self.embed_prompts(prompts)).sum(-1)
