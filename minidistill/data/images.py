"""Your own images with captions, instead of those the teacher samples: found, resized, encoded once.

A folder is laid out as for diffusers' training scripts: a ``metadata.jsonl`` with a line
``{"file_name": "a.jpg", "text": "its caption"}`` per image; or, beside an image ``a.jpg``, its caption in ``a.txt``,
which takes precedence. Subfolders are searched too, and may have a metadata.jsonl of their own.
"""

import json
import mimetypes
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from minidistill.data.shards import read_shard, vae_fingerprint, write_shard
from minidistill.formats.files import digest
from minidistill.pipeline import StableDiffusion, on_device

SUFFIXES = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
DECODERS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # no other, whatever a file claims to be


class CaptionedImage(NamedTuple):
    file: Path
    caption: str
    digest: str  # of the file's bytes


def read_folder(folder: Path) -> tuple[list[CaptionedImage], dict[Path, str]]:
    """The images that have a caption, sorted by name; and the files left out, with the reason for each.

    Raises ValueError if there is no such folder, no image with a caption, or a malformed line in metadata.jsonl.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: --images needs a folder of images with captions.")
    files = sorted(find_files(folder))
    listed = {}  # captions by the spelling of the image
    for file in files:
        if file.name == "metadata.jsonl":
            listed |= read_metadata(file)
    text_files = {spelling(file.with_suffix("")): file for file in files if file.suffix.lower() == ".txt"}
    captioned = {spelling(file.with_suffix("")) for file in files if file.suffix.lower() in SUFFIXES}
    images, left_out = [], {}
    for file in files:
        stem = spelling(file.with_suffix(""))
        caption, text_file = listed.pop(spelling(file), ""), text_files.get(stem)
        if file.suffix.lower() not in SUFFIXES:
            is_image = str(mimetypes.guess_type(file.name)[0]).startswith("image/")
            if is_image or caption or (text_file not in (None, file) and stem not in captioned):
                left_out[file] = f"only {', '.join(SUFFIXES)} are read: convert it"
            continue
        try:
            caption = " ".join(text_file.read_text(encoding="utf-8-sig").split()) if text_file else caption
            if "\0" in caption:  # UTF-16 without its mark is valid UTF-8, with a NUL beside each letter
                raise ValueError("its caption is not UTF-8 text")
            if caption:
                images.append(CaptionedImage(file, caption, digest(file.read_bytes())))
            else:
                left_out[file] = f"no caption, neither in {file.stem}.txt nor in metadata.jsonl"
        except (OSError, ValueError) as error:
            left_out[file] = f"cannot be read ({error})"
    left_out |= {Path(file): "listed in metadata.jsonl, but there is no such image" for file in listed}
    if not images:
        raise nothing_left(f"{folder} has no image ({', '.join(SUFFIXES)}) with a caption", left_out)
    return images, left_out


def find_files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Every file below ``folder``, and below linked folders too, but not round in circles."""
    above = (*above, folder.resolve())
    for path in folder.iterdir():
        if path.is_dir() and path.resolve() not in above:
            yield from find_files(path, above)
        elif path.is_file() or (path.is_symlink() and not path.is_dir()):  # a broken link, too, so that it is named
            yield path


def spelling(path: Path) -> str:
    """One spelling for a name: macOS writes an accent as a letter of its own."""
    return unicodedata.normalize("NFC", os.path.normpath(path))


def read_metadata(file: Path) -> dict[str, str]:
    """Captions by the ``spelling`` of the image. Raises ValueError that names a bad line."""
    captions = {}
    for number, line in enumerate(re.split(rb"\r\n?|\n", file.read_bytes()), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image, text = file.parent / row["file_name"], " ".join(row["text"].split())
            if not image.exists():
                image = file.parent / row["file_name"].replace("\\", "/")  # as written on Windows
            text.encode()  # raises for half a character, which JSON can write
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            example = '{"file_name": "a.jpg", "text": "its caption"}'
            raise ValueError(f"{file}, line {number} should look like {example}.") from error
        if captions.setdefault(spelling(image), text) != text:
            raise ValueError(f"{file}, line {number}: {image} has another caption above: give each image one line.")
    return captions


def nothing_left(problem: str, left_out: dict[Path, str]) -> ValueError:
    if left_out:
        file, reason = next(iter(left_out.items()))
        problem += f"; {len(left_out)} left out; the first is {file}: {reason}"
    return ValueError(f"{problem}.")


def version(images: list[CaptionedImage]) -> str:
    """A digest that changes with any image or caption."""
    return digest("\n".join(f"{image.digest} {image.caption}" for image in images).encode())


def read_image(file: Path, height: int, width: int) -> Tensor:
    """[3, height, width] in [-1, 1]: rotated upright, on white where transparent, resized and its centre cropped.

    Raises ValueError for an image that would have to be enlarged more than twofold or does not have 8 bits per channel;
    and whatever a decoder raises at a damaged file.
    """
    with Image.open(file, formats=DECODERS) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"pixel format {image.mode} does not have 8 bits per channel")
        image = ImageOps.exif_transpose(image)
        if 2 * image.width < width or 2 * image.height < height:
            raise ValueError(
                f"{image.width}x{image.height} pixels is too small: less than half of the model's {width}x{height}"
            )
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def encode(
    sd: StableDiffusion,
    images: list[CaptionedImage],
    captions: list[str],
    folder: Path,
    rank: int = 0,
    wait: Callable[[], object] = lambda: None,
) -> tuple["ImageLatents", dict[Path, str]]:
    """The latents of the images whose caption is one of ``captions``; and the images that cannot be used, with reasons.

    Each image gets a file under ``folder``, named after its bytes, the VAE and the size. Existing files are kept, so an
    interrupted run continues where it stopped, and only new or changed images are encoded: one at a time, which takes
    the least memory and makes a latent independent of other images. A latent is the posterior mean; the posterior's
    spread (0.008 in the emoji model, where latents have 1) is below the least noise ever added (0.029). Process 0
    encodes; the others ``wait()`` for it.

    Raises ValueError if no image is left.
    """
    size = sd.height if sd.height == sd.width else f"{sd.width}x{sd.height}"
    made_with = f"{vae_fingerprint(sd.vae)} {size}"
    files = [folder / f"image-{digest(f'{made_with} {image.digest}'.encode())}.safetensors" for image in images]
    unusable: dict[Path, str] = {}  # latents that were not written, and why
    if rank == 0:
        missing = {file: image for file, image in zip(files, images) if not read_shard(file)}
        with torch.no_grad(), on_device(sd.vae, sd.device):
            for file, image in tqdm(missing.items(), "encoding images", unit="image"):
                try:
                    x = read_image(image.file, sd.height, sd.width)
                except Exception as error:  # decoders raise anything at a damaged file
                    unusable[file] = str(error) or type(error).__name__
                    continue
                # In half precision, as in trajectories.py.
                z_0 = sd.run_vae(sd.vae.encode, x[None].to(sd.device, sd.dtype))[0].half()  # [4, h, w]
                if not z_0.isfinite().all():
                    unusable[file] = "its latent overflows half precision"
                    continue
                write_shard(file, {"z_0": z_0.cpu().contiguous()}, made_with)
    wait()
    left_out = {image.file: unusable[file] for file, image in zip(files, images) if file in unusable}
    numbers = {caption: number for number, caption in enumerate(captions)}
    usable = [
        (file, numbers[image.caption])
        for file, image in zip(files, images)
        if image.caption in numbers and file.exists()
    ]
    if not usable:
        raise nothing_left("No image is left to learn from", left_out)
    return ImageLatents(usable), left_out


class ImageLatents:
    """Latents in files and the numbers of their prompts, with the same methods as data.trajectories.Trajectories."""

    def __init__(self, files: list[tuple[Path, int]]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def prompts(self, chosen: Tensor) -> Tensor:
        """The prompt number of each, [B]."""
        return torch.tensor([self.files[i][1] for i in chosen.tolist()])

    def ends(self, chosen: Tensor) -> Tensor:
        """z_0 of each, [B, 4, h, w] float32."""
        return torch.stack([load_file(self.files[i][0])["z_0"] for i in chosen.tolist()]).float()
