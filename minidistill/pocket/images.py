"""The training images: an emoji from Noto Color Emoji on a flat coloured background, rendered with Pillow."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from minidistill.pocket.compositions import Composition

FONT_CANDIDATES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "NotoColorEmoji.ttf",
)
FONT_SIZE = 109  # the only size of this bitmap font
EMOJI_SIZE = (0.66, 0.84)  # the range of the emoji's longer side, relative to the image's side
SHIFT = 1 / 16  # the largest shift of the emoji from the centre, relative to the image's side
JITTER = 6  # the largest change of each background channel, of 255


def find_font(font: str | None = None) -> str:
    """The path of the emoji font: the given one, or the first candidate that exists.

    Raises FileNotFoundError if there is none.
    """
    for path in [font] if font else FONT_CANDIDATES:
        if Path(path).is_file():
            return path
    raise FileNotFoundError(
        f"No emoji font at {font or FONT_CANDIDATES[0]}: install the Debian package fonts-noto-color-emoji, "
        "or name a NotoColorEmoji.ttf with --font."
    )


@cache
def glyph(emoji: str, font: str) -> Image.Image:
    """One emoji at the font's size, RGBA on a transparent background, cropped to its visible part."""
    canvas = Image.new("RGBA", (2 * FONT_SIZE, 2 * FONT_SIZE), (0, 0, 0, 0))
    face = ImageFont.truetype(font, size=FONT_SIZE)
    ImageDraw.Draw(canvas).text((FONT_SIZE // 4, FONT_SIZE // 4), emoji, font=face, embedded_color=True)
    return canvas.crop(canvas.getchannel("A").getbbox())


def render_one(
    composition: Composition, rng: np.random.Generator, size: int = 64, font: str | None = None
) -> Image.Image:
    """Render an image of size x size pixels; ``rng`` varies scale, shift and background a little."""
    background = tuple(int(c) + int(rng.integers(-JITTER, JITTER + 1)) for c in composition.rgb)  # stays in 0..255
    image = Image.new("RGB", (size, size), background)

    stamp = glyph(composition.emoji, find_font(font))
    scale = rng.uniform(*EMOJI_SIZE) * size / max(stamp.size)
    stamp = stamp.resize([max(1, round(side * scale)) for side in stamp.size], Image.Resampling.LANCZOS)
    dx, dy = rng.uniform(-SHIFT, SHIFT, 2) * size
    x, y = round((size - stamp.width) / 2 + dx), round((size - stamp.height) / 2 + dy)
    image.paste(stamp, (x, y), stamp)
    return image


def render(
    compositions: list[Composition], per_composition: int, seed: int, size: int = 64, font: str | None = None
) -> tuple[Tensor, Tensor]:
    """Render every composition ``per_composition`` times; the same arguments give the same images.

    Returns the images, uint8 [N, 3, size, size], in the order of the list, and for each the index of its composition,
    int64 [N].
    """
    rng = np.random.default_rng(seed)
    font = find_font(font)
    index = torch.arange(len(compositions)).repeat_interleave(per_composition)
    images = torch.empty(len(index), 3, size, size, dtype=torch.uint8)
    for n, i in enumerate(tqdm(index.tolist(), desc="images", unit="image")):
        images[n] = torch.from_numpy(np.array(render_one(compositions[i], rng, size, font))).permute(2, 0, 1)
    return images, index


def to_pixels(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> the input of CLIP and VAE: float in [-1, 1], channels last."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
