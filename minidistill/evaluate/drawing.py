"""Pictures of each method from the same noise, what they cost, and all of them side by side."""

import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from minidistill.data.prompts import spread
from minidistill.evaluate.metrics import EVALUATION_SEED
from minidistill.guidance import Interval, selective_interval
from minidistill.pipeline import StableDiffusion


@dataclass
class Drawn:
    """Pictures of one method, and what one of them cost."""

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
    """Draw ``prompts`` as the "teacher", with "no guidance", or as the "student"; the same seeds for each.

    ``selective`` and ``options`` go to :meth:`StableDiffusion.sample`. The time is that of a picture, text encoder and
    VAE included.
    """
    guided = method == "teacher" and guidance != 1
    options |= dict(steps=steps, guidance=guidance if guided else 1.0, lora_enabled=method == "student")
    options = dict(seed=EVALUATION_SEED) | options
    start = time.perf_counter()
    images = sd.sample(prompts, selective=selective, interval=interval, **options)
    seconds = (time.perf_counter() - start) / len(prompts)
    interval = interval or selective_interval(sd.schedule, steps, selective) or Interval(0, sd.schedule.train_steps)
    unet_calls = steps + sum(interval.low <= t <= interval.high for t in sd.schedule.timesteps(steps)) * guided
    return Drawn(method, images, unet_calls, seconds)


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
        name = textwrap.wrap(drawn.method, 16)
        pen.multiline_text((6, y + side // 3), "\n".join(name), "black", font=font, spacing=4)
        pen.multiline_text((6, y + side // 3 + 18 * len(name)), cost, "dimgray", font=small, spacing=2)
        for column, i in enumerate(chosen):
            shown = drawn.images[i].resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(shown, (left + column * (side + gap), y))
    return sheet
