"""Sample images with each method from the same noise, record the cost, and show the images side by side."""

import math
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

from minidistill.data.prompts import spread
from minidistill.evaluate.metrics import EVALUATION_SEED
from minidistill.guidance import Interval, selective_interval
from minidistill.pipeline import StableDiffusion

ALWAYS = Interval(0, math.inf)


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
    **options,
) -> Drawn:
    """Sample ``prompts`` with the "teacher", with "no guidance", or with the "student", from the same seeds.

    The keyword arguments go to :meth:`StableDiffusion.sample`. The time covers the text encoder and the VAE.
    """
    guides = method == "teacher" and guidance != 1
    scale = guidance if guides else 1.0
    options = dict(seed=EVALUATION_SEED) | options | dict(steps=steps, guidance=scale, lora_enabled=method == "student")
    start = time.perf_counter()
    images = sd.sample(prompts, selective=selective, interval=interval, **options)
    seconds = (time.perf_counter() - start) / len(prompts)
    if selective:
        interval = selective_interval(sd.schedule, steps, selective)
    inside = (interval or ALWAYS).includes(torch.tensor(sd.schedule.timesteps(steps)))
    return Drawn(method, images, steps + (int(inside.sum()) if guides else 0), seconds)


def comparison_grid(rows: Sequence[Drawn], prompts: Sequence[str], columns: int = 8, side: int = 128) -> Image.Image:
    """One image with a row for each method, its cost on the left, and a column for each prompt, its text above.

    Shows ``columns`` of the prompts, evenly spread over the list.
    """
    chosen = spread(range(len(prompts)), columns)
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    left, top, gap = 128, 52, 6
    sheet = Image.new("RGB", (left + len(chosen) * (side + gap), top + len(rows) * (side + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, i in enumerate(chosen):
        text = "\n".join(textwrap.wrap(prompts[i], side // 6, max_lines=3, placeholder=" ..."))
        pen.multiline_text((left + column * (side + gap), 4), text, "black", font=small, spacing=2)
    for row, drawn in enumerate(rows):
        y = top + row * (side + gap)
        cost = f"{drawn.unet_calls} UNet calls\n{drawn.seconds:.2f} s an image"
        name = textwrap.wrap(drawn.method, 16)
        pen.multiline_text((6, y + side // 3), "\n".join(name), "black", font=font, spacing=4)
        pen.multiline_text((6, y + side // 3 + 18 * len(name)), cost, "dimgray", font=small, spacing=2)
        for column, i in enumerate(chosen):
            image = drawn.images[i].resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(image, (left + column * (side + gap), y))
    return sheet
