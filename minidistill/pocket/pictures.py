"""Pictures to learn from: an emoji of Noto Color Emoji, drawn with Pillow on a flat coloured background."""

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
FONT_SIZE = 109  # the only size this bitmap font has
DRAWN_SIZE = (0.66, 0.84)  # the emoji's longer side, as a share of the picture's side
SHIFT = 1 / 16  # the furthest the emoji moves from the centre, as a share of the picture's side
JITTER = 6  # the furthest each channel of the background moves from its named colour, of 255


def find_font(font: str | None = None) -> str:
    """The path of the emoji font: the one given, or the first candidate that exists.

    Raises FileNotFoundError when there is none.
    """
    for path in [font] if font else FONT_CANDIDATES:
        if Path(path).is_file():
            return path
    looked = font or FONT_CANDIDATES[0]
    raise FileNotFoundError(
        f"No emoji font at {looked}: install the Debian package fonts-noto-color-emoji, "
        "or name a NotoColorEmoji.ttf with --font."
    )


@cache
def glyph(emoji: str, font: str) -> Image.Image:
    """One emoji at the font's own size, RGBA on a transparent ground, cropped to what is visible."""
    canvas = Image.new("RGBA", (2 * FONT_SIZE, 2 * FONT_SIZE), (0, 0, 0, 0))
    face = ImageFont.truetype(font, size=FONT_SIZE)
    ImageDraw.Draw(canvas).text((FONT_SIZE // 4, FONT_SIZE // 4), emoji, font=face, embedded_color=True)
    return canvas.crop(canvas.getchannel("A").getbbox())


def draw(composition: Composition, rng: np.random.Generator, size: int = 64, font: str | None = None) -> Image.Image:
    """One picture of size x size pixels: scale, shift and background vary a little with the generator."""
    background = tuple(int(c) + int(rng.integers(-JITTER, JITTER + 1)) for c in composition.rgb)  # stays in 0..255
    picture = Image.new("RGB", (size, size), background)

    stamp = glyph(composition.emoji, find_font(font))
    scale = rng.uniform(*DRAWN_SIZE) * size / max(stamp.size)
    stamp = stamp.resize([max(1, round(side * scale)) for side in stamp.size], Image.Resampling.LANCZOS)
    dx, dy = rng.uniform(-SHIFT, SHIFT, 2) * size
    x, y = round((size - stamp.width) / 2 + dx), round((size - stamp.height) / 2 + dy)
    picture.paste(stamp, (x, y), stamp)
    return picture


def render(
    compositions: list[Composition], per_composition: int, seed: int, size: int = 64, font: str | None = None
) -> tuple[Tensor, Tensor]:
    """Draw every composition several times.

    Returns the pictures, uint8 [N, 3, size, size], and the index of each one's composition in the list, int64 [N],
    in the list's order. The same arguments give the same pictures.
    """
    rng = np.random.default_rng(seed)
    font = find_font(font)
    index = torch.arange(len(compositions)).repeat_interleave(per_composition)
    pictures = torch.empty(len(index), 3, size, size, dtype=torch.uint8)
    for n, i in enumerate(tqdm(index.tolist(), desc="pictures", unit="picture")):
        pictures[n] = torch.from_numpy(np.array(draw(compositions[i], rng, size, font))).permute(2, 0, 1)
    return pictures, index


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> what CLIP and VAE take: float in [-1, 1], channels last."""
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
