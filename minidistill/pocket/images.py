"""The training images: Fluent Emoji 3D on flat coloured backgrounds, composed on any device, a batch at a time."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from minidistill.pocket.compositions import THINGS, Composition

# The range of the length of a thing's longer side, relative to the side of the image.
ALONE, IN_A_PAIR = (0.70, 0.86), (0.38, 0.45)
SIZES = 8  # in each range
PAIR_CENTRE = 0.235  # how far each thing of a pair is from the middle of the image
SHIFT_ALONE, SHIFT_IN_A_PAIR = (0.05, 0.05), (0.02, 0.03)  # largest shift in x and y, relative to the image's side
JITTER = 6  # the largest change of each background channel, of 255
NOTHING = len(THINGS)  # the index of the absent second thing of a single composition

WORK = Path("runs/pocket")  # the judge's classifier, and the images of the emoji
PACKAGE = WORK / "package"  # where `npm pack` and tar put the images; see find_emoji


def find_emoji(emoji: str, folder: Path) -> Path:
    """The file of an emoji. Raises FileNotFoundError, which says how to get the images, if there is none."""
    for suffix in ("", "-fe0f"):  # a selector that asks for the colourful form
        if (path := folder / f"assets/{ord(emoji):04x}{suffix}.webp").is_file():
            return path
    raise FileNotFoundError(
        f"{folder} has no image of {emoji}. In {WORK}, get the images by `npm pack @lobehub/fluent-emoji-3d@1.1.0` and "
        "unpack them by `tar xf`."
    )


def stamp(emoji: str, folder: Path) -> Image.Image:
    """One emoji, RGBA, 256 pixels or less a side, cropped to its visible part."""
    image = Image.open(find_emoji(emoji, folder)).convert("RGBA")
    return image.crop(image.getchannel("A").getbbox())


def centred(image: Image.Image, longer_side: float, side: int) -> Tensor:
    """The image, resized and centred: uint8 [4, side, side], the colours multiplied by the coverage (alpha)."""
    scale = longer_side / max(image.size)
    image = image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return torch.from_numpy(np.array(canvas.convert("RGBa"))).permute(2, 0, 1)


class Renderer:
    """Draws compositions of ``side`` x ``side`` pixels. Holds every thing in all its sizes on ``device``.

    Raises FileNotFoundError if ``folder`` is not the unpacked package of emoji.
    """

    def __init__(self, folder: Path, side: int = 64, device: torch.device | str = "cpu"):
        sizes = [share * side for kind in (ALONE, IN_A_PAIR) for share in np.linspace(*kind, SIZES)]
        images = (stamp(emoji, folder) for emoji in THINGS)
        stamps = [torch.stack([centred(image, size, side) for size in sizes]) for image in images]
        nothing = torch.zeros_like(stamps[0])
        self.stamps = torch.stack([*stamps, nothing]).to(device)  # uint8 [E + 1, 2 SIZES, 4, S, S]
        self.side, self.device = side, self.stamps.device
        self.reach = torch.tensor([SHIFT_ALONE, SHIFT_IN_A_PAIR], device=device)

    def draw(self, things: Tensor, rgb: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw a batch; size, place and background of each image vary a little. Returns uint8 [B, 3, S, S].

        things: int64 [B, 2], rows of THINGS, the second NOTHING for a single thing. rgb: [B, 3], 0..255.
        ``generator`` is on the CPU; without one, random numbers are drawn on the device.
        """

        def random(low: float, high: float, *shape: int) -> Tensor:
            where = generator.device if generator else self.device
            drawn = torch.rand(len(things), *shape, generator=generator, device=where)
            return (low + (high - low) * drawn).to(self.device)

        pair = (things[:, 1] != NOTHING).long()  # [B]
        place = torch.arange(self.side, device=self.device)
        x = (rgb + random(-JITTER, JITTER, 3).round()).clamp(0, 255)[:, :, None, None] / 255  # [B, 3, 1, 1]
        for slot, centre in enumerate((-PAIR_CENTRE, PAIR_CENTRE)):
            size = random(0, SIZES).long() + SIZES * pair
            shift = random(-1, 1, 2) * self.reach[pair]  # [B, 2], x and y
            shift[:, 0] += centre * pair
            pixels = (shift * self.side).round().long()  # [B, 2]
            columns, rows = (place - pixels[..., None]).clamp(0, self.side - 1).unbind(1)  # [B, S]; the rim is empty
            which = things[:, slot, None, None], size[:, None, None]
            layer = self.stamps[(*which, slice(None), rows[:, :, None], columns[:, None, :])]  # [B, S, S, 4]
            layer = layer.permute(0, 3, 1, 2).float() / 255
            x = layer[:, :3] + (1 - layer[:, 3:]) * x
        return (255 * x).round().to(torch.uint8)


def as_tensors(compositions: Sequence[Composition], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """``things`` and ``rgb`` of each composition, as Renderer.draw takes them."""
    row = {emoji: i for i, emoji in enumerate(THINGS)}
    things = [[row[e] for e in c.emoji] + [NOTHING] * (2 - len(c.emoji)) for c in compositions]
    return torch.tensor(things, device=device), torch.tensor([c.rgb for c in compositions], device=device)


def render(renderer: Renderer, compositions: Sequence[Composition], each: int, seed: int, batch: int = 256) -> Tensor:
    """Draw every composition ``each`` times in a row: uint8 [C * each, 3, S, S], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    things, rgb = (x.repeat_interleave(each, 0) for x in as_tensors(compositions, renderer.device))
    return torch.cat([renderer.draw(*some, generator) for some in zip(things.split(batch), rgb.split(batch))])


def to_pixels(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> the input of CLIP and VAE: float in [-1, 1], channels last."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
