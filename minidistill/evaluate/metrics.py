"""How near the student is to its teacher, and pictures to other pictures and to their prompts."""

from collections.abc import Callable, Mapping, Sequence
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
from minidistill.pipeline import FRESH_NOISE, StableDiffusion
from minidistill.guidance import Interval, guided, plain, student as student_of
from minidistill.samplers import Predictor, fresh_noise
from minidistill.schedule import add_noise

EVALUATION_SEED = 1_000_000  # the noise of evaluation lies apart from that of training
Keep = Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]


@dataclass
class ErrorShare:
    """Of each picture and step of its trajectory, [N, S] each, with e = eps_student - eps_cond, g = eps_hat - eps_cond:

    ``errors`` |e - g|^2, ``gaps`` |g|^2, and ``along`` e . g.
    """

    errors: Tensor
    gaps: Tensor
    along: Tensor

    @property
    def pooled(self) -> float:
        return (self.errors.sum() / self.gaps.sum()).item()

    @property
    def per_step(self) -> Tensor:
        return self.errors.sum(0) / self.gaps.sum(0)


def each_step(model: Predictor, z_t: Tensor, timesteps: Sequence[int]) -> Tensor:
    """What ``model`` predicts for the states of S steps, [B, S, 4, h, w] -> [B, S, 4, h, w]."""
    times = (torch.full((len(z_t),), t, device=z_t.device) for t in timesteps)
    return torch.stack([model(z_t[:, i], t) for i, t in enumerate(times)], 1)


def teacher_states(
    sd: StableDiffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    negative_prompt: str,
    noised: bool,
    interval: Interval | None,
) -> dict[str, Tensor]:
    """``z_t`` of the teacher's guided trajectories, ``eps_hat`` and ``eps_cond`` there: [B, S, 4, h, w] each.

    With ``noised`` the states are the trajectories' ends z_0, noised afresh for the same time steps.
    """
    timesteps = sd.schedule.timesteps(steps)
    cond = sd.encode_prompt(list(prompts))
    uncond = sd.encode_prompt([negative_prompt]).expand(len(cond))
    z_T = sd.starting_noise(seeds)
    z_t, eps_hat, z_0 = teacher_trajectory(sd, cond, uncond, guidance, z_T, timesteps, interval)
    if noised:
        generators = [torch.Generator().manual_seed(FRESH_NOISE + own) for own in seeds]
        times = (torch.full((len(z_0),), t, device=z_0.device) for t in timesteps)
        z_t = torch.stack([add_noise(sd.schedule, z_0, fresh_noise(z_0, generators), t) for t in times], 1)
        eps_hat = each_step(guided(sd.unet, cond, uncond, guidance, interval), z_t, timesteps)
    return dict(z_t=z_t, eps_hat=eps_hat, eps_cond=each_step(plain(sd.unet, cond), z_t, timesteps))


@torch.no_grad()
def noise_error_share(
    sd: StableDiffusion,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    negative_prompt: str = "",
    interval: Interval | None = None,
    noised: bool = False,
    batch: int = 16,
    progress: bool = False,
    keep: Keep = lambda name, make: make(),
) -> ErrorShare:
    """What share of the guidance the student misses, on the teacher's own guided trajectories for ``prompts``.

    sum |eps_student - eps_hat|^2 / sum |eps_hat - eps_cond|^2 over all steps: 0 is the teacher, 1 is no guidance.
    With ``noised``, at the same time steps on the trajectories' ends z_0, each noised afresh. ``keep(name, make)`` may
    keep the tensors that ``make`` makes of the teacher, of a batch called ``name``, for the next student.
    """
    timesteps = sd.schedule.timesteps(steps)
    teacher = dict(steps=steps, guidance=guidance, negative_prompt=negative_prompt, noised=noised, interval=interval)
    found = []  # of each batch: errors, gaps, along, [B, S] each
    for first in tqdm(range(0, len(prompts), batch), desc="noise error", unit="batch", disable=not progress):
        some = list(prompts[first : first + batch])
        seeds = range(EVALUATION_SEED + first, EVALUATION_SEED + first + len(some))
        states = keep(f"{first:06d}", partial(teacher_states, sd, some, seeds, **teacher))
        student = student_of(sd.unet, sd.encode_prompt(some))
        z_t, eps_hat, eps_cond = (states[name].to(sd.device) for name in ("z_t", "eps_hat", "eps_cond"))
        e, g = (eps.double() - eps_cond for eps in (each_step(student, z_t, timesteps), eps_hat))
        found.append([x.sum((2, 3, 4)).cpu() for x in ((e - g).square(), g.square(), e * g)])
    return ErrorShare(*(torch.cat(x) for x in zip(*found)))


class Interval(NamedTuple):
    """A mean and the 95% interval it lies in."""

    value: float
    low: float
    high: float


def with_interval(found: Mapping[str, float], form: str) -> str:
    """What ``Interval._asdict`` gives, as "value (low to high)", each by a format such as "{:.2f}"."""
    return "{} ({} to {})".format(*(form.format(found[name]) for name in Interval._fields))


def resampled(prompts: int, resamples: int) -> Tensor:
    """Which prompts each resample of a bootstrap takes, [resamples, prompts] int64.

    Prompts, not pictures: those of one prompt are alike.
    """
    return torch.randint(prompts, (resamples, prompts), generator=torch.Generator().manual_seed(0))


def interval(values: Tensor, per: Tensor | None = None) -> Interval:
    """sum ``values`` / sum ``per`` (1 each unless given), both [P, ...], with P the prompts that are resampled."""
    per = torch.ones_like(values) if per is None else per
    values, per = values.double().flatten(1).sum(1), per.double().flatten(1).sum(1)
    chosen = resampled(len(values), 10_000)
    means = values[chosen].sum(1) / per[chosen].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return Interval((values.sum() / per.sum()).item(), low, high)


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """PIL images of one size -> uint8 [N, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).permute(0, 3, 1, 2)


def psnr(images: Sequence[Image.Image], references: Sequence[Image.Image]) -> Tensor:
    """Peak signal-to-noise ratio of each picture to its reference in dB, [N]: -10 log10 of the mean squared error."""
    pairs = zip(images, references, strict=True)
    error = torch.cat([(pixels([a]) / 255 - pixels([b]) / 255).square().mean((1, 2, 3)) for a, b in pairs])
    return -10 * torch.log10(error.clamp_min(1e-10))


def ssim(images: Sequence[Image.Image], references: Sequence[Image.Image]) -> Tensor:
    """Structural similarity of each picture to its reference, [N], by scikit-image (a development extra)."""
    from skimage.metrics import structural_similarity

    pairs = zip(map(np.asarray, images), map(np.asarray, references))
    return torch.tensor([structural_similarity(a, b, channel_axis=2) for a, b in pairs])


def frechet_distance(features: Tensor, references: Tensor) -> float:
    """Between two sets of features, [N, D] and [M, D], taken for Gaussian ("FID", arXiv 1706.08500, eq. 6).

    |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)): the square root's trace is the sum of the eigenvalues' roots,
    which are real and not negative.
    """
    means = [x.double().mean(0) for x in (features, references)]
    covariances = [x.double().T.cov() for x in (features, references)]
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp_min(0).sqrt()
    apart = (means[0] - means[1]).square().sum()
    return (apart + covariances[0].trace() + covariances[1].trace() - 2 * roots.sum()).item()


class ClipScore:
    """Agreement of pictures and prompts by a CLIP of transformers ("CLIPScore", arXiv 2104.08718, without the 2.5).

    ``folder``, or a hub id, is the model; its tokenizer is the one given.
    """

    def __init__(self, folder: str | Path, tokenizer: CLIPTokenizer):
        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.preprocess = CLIPImageProcessorPil.from_pretrained(folder)
        self.tokenizer = tokenizer

    @torch.no_grad()
    def embed_pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """PIL images -> unit vectors [N, D]."""
        found = []
        for first in range(0, len(images), 64):
            inputs = self.preprocess(list(images[first : first + 64]), return_tensors="pt")
            found.append(self.model.get_image_features(**inputs).pooler_output)
        return F.normalize(torch.cat(found), dim=-1)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> unit vectors [N, D]."""
        ids = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        return F.normalize(self.model.get_text_features(**ids).pooler_output, dim=-1)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """100 times the cosine between each picture and its prompt, [N]."""
        return 100 * (self.embed_pictures(images) * self.embed_prompts(prompts)).sum(-1)
