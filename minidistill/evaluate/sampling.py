"""Sample images with each method from the same noise, and record what an image costs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from minidistill.evaluate.metrics import EVALUATION_SEED
from minidistill.guidance import Interval, selective_interval
from minidistill.pipeline import StableDiffusion


class Stopwatch:
    """Adds up the ``seconds`` spent in its ``with`` blocks; each ends when the device has finished."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __enter__(self) -> "Stopwatch":
        self.start = self.now()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += self.now() - self.start


@dataclass
class Drawn:
    """The images of one method, and the cost of one image."""

    method: str
    images: list[Image.Image]
    unet_calls: int
    seconds: float


def draw(
    sd: StableDiffusion,
    method: str,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    selective: float = 0.0,
    interval: Interval | None = None,
    spacing: str | None = None,
    student_steps: int | None = None,
    negative_prompt: str | None = None,
    student_negative: str | None = None,
    seed: int = EVALUATION_SEED,
    **options,
) -> Drawn:
    """Sample ``prompts`` with the "teacher", with "no guidance", or with the "student", from the same seeds.

    Other options go to :meth:`StableDiffusion.sample`. Where the student was taught few steps, it takes
    ``student_steps`` instead of ``steps``, and the spacing of all is trailing. ``negative_prompt`` is the teacher's,
    and the student has learned it; ``student_negative`` is another, for the student alone. The time is that of the DDIM
    steps and the VAE, without encoding prompts or moving networks.
    """
    spacing = spacing or ("trailing" if student_steps else None)
    scale = {"teacher": guidance, "no guidance": 1.0, "student": None}[method]
    if method == "student":
        steps, negative_prompt = student_steps or steps, student_negative
    clock = Stopwatch(sd.device)
    images = sd.sample(
        prompts, steps=steps, guidance=scale, seed=seed, lora_enabled=method == "student",
        negative_prompt=negative_prompt, selective=selective, interval=interval, spacing=spacing,
        clock=clock, **options,
    )  # fmt: skip
    unet_calls = steps
    if method == "teacher" and guidance != 1:
        interval = interval or selective_interval(sd.schedule, steps, selective, spacing)
        timesteps = torch.tensor(sd.schedule.timesteps(steps, spacing))
        unet_calls += int(interval.includes(timesteps).sum()) if interval else steps
    return Drawn(method, images, unet_calls, clock.seconds / len(prompts))
