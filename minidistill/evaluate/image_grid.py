"""The images of several methods side by side, in one image."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from minidistill.data.prompts import spread
from minidistill.evaluate.sampling import Drawn
from minidistill.formats.files import atomic_write


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
        cost = f"{drawn.unet_calls} UNet calls" + f"\n{drawn.seconds:.2f} s an image" * (drawn.seconds > 0)
        name = textwrap.wrap(drawn.method, 16)
        pen.multiline_text((6, y + side // 3), "\n".join(name), "black", font=font, spacing=4)
        pen.multiline_text((6, y + side // 3 + 18 * len(name)), cost, "dimgray", font=small, spacing=2)
        for column, i in enumerate(chosen):
            image = ImageOps.pad(drawn.images[i], (side, side), Image.Resampling.BICUBIC, color="white")
            sheet.paste(image, (left + column * (side + gap), y))
    return sheet


def write_grid(path: Path, rows: Sequence[Drawn], prompts: Sequence[str], **layout: int) -> None:
    """Write ``comparison_grid(rows, prompts, **layout)`` as PNG."""
    with atomic_write(path) as temporary:
        comparison_grid(rows, prompts, **layout).save(temporary, "png")
