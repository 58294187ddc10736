"""How good is the student: its distance to the teacher, its agreement with the prompt, and pictures side by side."""

import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from minidistill.data import spread, teacher_trajectory
from minidistill.pipeline import StableDiffusion

EVALUATION_SEED = 1_000_000  # the noise of evaluation lies apart from that of training


@dataclass
class ErrorShare:
    """Squared errors and squared guidance gaps, summed over pictures: [S] each, one value a step of the trajectory."""

    errors: Tensor
    gaps: Tensor

    @property
    def pooled(self) -> float:
        return (self.errors.sum() / self.gaps.sum()).item()


@torch.no_grad()
def noise_error_share(
    sd: StableDiffusion,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    negative_prompt: str = "",
    seed: int = EVALUATION_SEED,
    batch: int = 16,
) -> ErrorShare:
    """What share of the guidance the student misses, on the teacher's own guided trajectories for ``prompts``.

    sum |eps_student - eps_hat|^2 / sum |eps_hat - eps_cond|^2 over all steps: 0 is the teacher, 1 is no guidance.
    """
    timesteps = sd.schedule.timesteps(steps)
    errors, gaps = torch.zeros(steps, dtype=torch.float64), torch.zeros(steps, dtype=torch.float64)
    uncond = sd.encode_prompt([negative_prompt])
    for first in range(0, len(prompts), batch):
        cond = sd.encode_prompt(list(prompts[first : first + batch]))
        z_T = sd.starting_noise(range(seed + first, seed + first + len(cond)))
        z_t, eps_hat, _ = teacher_trajectory(sd, cond, uncond.expand_as(cond), guidance, z_T, timesteps)
        for i, t in enumerate(timesteps):
            t = torch.full((len(cond),), t, device=z_T.device)
            eps_student = sd.denoiser(cond, lora_enabled=True)(z_t[:, i], t)
            eps_cond = sd.denoiser(cond)(z_t[:, i], t)
            errors[i] += (eps_student - eps_hat[:, i]).double().square().sum().cpu()
            gaps[i] += (eps_hat[:, i] - eps_cond).double().square().sum().cpu()
    return ErrorShare(errors, gaps)


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """PIL images of one size -> [N, 3, H, W] in [0, 1]."""
    pixels = [torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8) for image in images]
    width, height = images[0].size
    return torch.stack(pixels).view(len(images), height, width, 3).permute(0, 3, 1, 2).float() / 255


def psnr(images: Sequence[Image.Image], references: Sequence[Image.Image]) -> Tensor:
    """Peak signal-to-noise ratio of each picture to its reference in dB, [N]: -10 log10 of the mean squared error."""
    error = (to_tensor(images) - to_tensor(references)).square().mean((1, 2, 3))
    return -10 * torch.log10(error.clamp_min(1e-10))


class ClipScore:
    """Agreement of pictures and prompts by a CLIP of transformers ("CLIPScore", arXiv 2104.08718, without the 2.5).

    ``folder`` holds the model; its tokenizer is the one given.
    """

    def __init__(self, folder: str | Path, tokenizer: CLIPTokenizer):
        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        self.preprocess = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        self.tokenizer = tokenizer

    @torch.no_grad()
    def embed_pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """PIL images -> unit vectors [N, D]."""
        features = self.model.get_image_features(**self.preprocess(list(images), return_tensors="pt"))
        return F.normalize(features.pooler_output, dim=-1)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> unit vectors [N, D]."""
        ids = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        return F.normalize(self.model.get_text_features(**ids).pooler_output, dim=-1)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """100 times the cosine between each picture and its prompt, [N]."""
        return 100 * (self.embed_pictures(images) * self.embed_prompts(prompts)).sum(-1)


@dataclass
class Drawn:
    """Pictures of one method, and what one of them cost."""

    method: str
    images: list[Image.Image]
    unet_calls: int
    seconds: float


def draw(sd: StableDiffusion, method: str, prompts: Sequence[str], *, steps: int, guidance: float, **options) -> Drawn:
    """Draw ``prompts`` as the "teacher", with "no guidance", or as the "student"; the same seeds for each.

    ``options`` go to :meth:`StableDiffusion.sample`. The time is that of a picture, text encoder and VAE included.
    """
    options |= dict(steps=steps, guidance=guidance if method == "teacher" else 1.0, lora_enabled=method == "student")
    options = dict(seed=EVALUATION_SEED) | options
    start = time.perf_counter()
    images = sd.sample(prompts, **options)
    seconds = (time.perf_counter() - start) / len(prompts)
    return Drawn(method, images, steps * (2 if options["guidance"] != 1 else 1), seconds)


def comparison_grid(rows: Sequence[Drawn], prompts: Sequence[str], columns: int = 8, side: int = 128) -> Image.Image:
    """One picture: a row a method with its cost at the left, a column a prompt with its text above.

    ``columns`` of the prompts are shown, evenly spread over them.
    """
    chosen = spread(range(len(prompts)), columns)
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    left, top, gap = 128, 52, 6
    size = (left + len(chosen) * (side + gap), top + len(rows) * (side + gap))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, i in enumerate(chosen):
        text = "\n".join(textwrap.wrap(prompts[i], side // 6, max_lines=3, placeholder=" ..."))
        pen.multiline_text((left + column * (side + gap), 4), text, "black", font=small, spacing=2)
    for row, drawn in enumerate(rows):
        y = top + row * (side + gap)
        cost = f"{drawn.unet_calls} UNet calls\n{drawn.seconds:.2f} s a picture"
        pen.text((6, y + side // 3), drawn.method, "black", font=font)
        pen.multiline_text((6, y + side // 3 + 18), cost, "dimgray", font=small, spacing=2)
        for column, i in enumerate(chosen):
            shown = drawn.images[i].resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(shown, (left + column * (side + gap), y))
    return sheet
