"""Your own pictures with captions, in place of those the teacher draws: found, brought to size, encoded once.

The folder is laid out as diffusers' training scripts take it: a ``metadata.jsonl``, with a line
``{"file_name": "a.jpg", "text": "its caption"}`` for each picture; or beside each picture ``a.jpg`` its caption in
``a.txt``, which counts first. Subfolders count too, and may have a metadata.jsonl of their own.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from minidistill.data.trajectories import fingerprint, read_shard, write_shard
from minidistill.formats.files import digest
from minidistill.pipeline import StableDiffusion, at_work
from minidistill.training.ranks import ALONE, Ranks

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # no other decoder, whatever a file says that it is


class Picture(NamedTuple):
    file: Path
    caption: str
    digest: str  # of the file's bytes


def read_folder(folder: Path) -> tuple[list[Picture], dict[Path, str]]:
    """The pictures that have a caption, by name; and of those that are left out, why.

    Raises ValueError when there is no such folder, no picture with a caption, or a line of metadata.jsonl says neither.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: --images takes one, of pictures with captions.")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    told = {file: text for m in files if m.name == "metadata.jsonl" for file, text in read_metadata(m).items()}
    beside = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    pictures, left_out = [], {}
    for file in (file for file in files if file.suffix.lower() in SUFFIXES):
        caption, text = told.pop(file, ""), beside.get(file.with_suffix(""))
        try:
            caption = " ".join(text.read_text(encoding="utf-8-sig").split()) if text else caption
            if caption:
                pictures.append(Picture(file, caption, digest(file.read_bytes())))
            else:
                left_out[file] = f"no caption, neither in {file.stem}.txt nor in metadata.jsonl"
        except (OSError, UnicodeDecodeError) as error:
            left_out[file] = f"cannot be read ({error})"
    left_out |= {file: "named in metadata.jsonl, but no such picture is there" for file in told}
    if not pictures:
        raise none_left(f"{folder} holds no picture ({', '.join(SUFFIXES)}) with a caption", left_out)
    return pictures, left_out


def read_metadata(file: Path) -> dict[Path, str]:
    """Captions by picture. Raises ValueError that names the line which is not as it should be."""
    captions = {}
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        try:
            if line.strip():
                row = json.loads(line)
                captions[file.parent / row["file_name"]] = " ".join(row["text"].split())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            wanted = '{"file_name": "a.jpg", "text": "its caption"}'
            raise ValueError(f"{file}, line {number} should read like {wanted}.") from error
    return captions


def none_left(what: str, left_out: dict[Path, str]) -> ValueError:
    first = [f"; of {len(left_out)} left out, the first is {file}: {why}" for file, why in left_out.items()][:1]
    return ValueError(f"{what}{''.join(first)}.")


def version(pictures: list[Picture]) -> str:
    """Another one for other pictures or captions."""
    return digest("\n".join(f"{picture.digest} {picture.caption}" for picture in pictures).encode())


def read_picture(file: Path, side: int) -> Tensor:
    """[3, side, side] in [-1, 1]: upright, on white where it is transparent, and the square in its middle.

    Raises ValueError for a picture that would have to be enlarged more than twofold, or that does not have 8 bits a
    channel; and whatever a decoder raises at a damaged file.
    """
    with Image.open(file, formats=FORMATS) as picture:
        width, height = picture.size
        if 2 * min(width, height) < side:
            raise ValueError(f"{width}x{height} pixels are too few, for less than half of the model's {side}")
        if picture.mode.startswith(("I", "F")):
            raise ValueError(f"pixels of kind {picture.mode}, not of 8 bits a channel")
        picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        picture = ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1


def encode(
    sd: StableDiffusion, pictures: list[Picture], captions: list[str], folder: Path, ranks: Ranks = ALONE
) -> tuple["Latents", dict[Path, str]]:
    """The latents of the pictures whose caption is one of ``captions``; and of pictures that cannot be used, why.

    Each picture has a file of its own under ``folder``, named after its bytes, the VAE and the side: what is there
    already is kept, so an interrupted run goes on where it stopped, and only new or changed pictures are encoded. One
    at a time, which takes the least memory, and gives a latent that no other picture has a part in. It is the
    posterior's mean, which needs no seed: its spread (in the embedded model 0.008, where latents have 1) is below the
    least noise that is ever added (0.029). Of several ``ranks`` the first encodes, and says what is left out.

    Raises ValueError when no picture is left.
    """
    side = sd.unet_config.sample_size * sd.vae.config.factor
    made_with = f"{fingerprint(sd.vae)} {sd.vae.config} {side}"
    files = [folder / f"picture-{digest(f'{made_with} {p.digest}'.encode())}.safetensors" for p in pictures]
    left_out = {}
    if ranks.first:
        missing = {file: picture for file, picture in zip(files, pictures) if not read_shard(file)}
        with torch.no_grad(), at_work(sd.vae, sd.device):
            for file, picture in tqdm(missing.items(), "encoding pictures", unit="picture"):
                try:
                    x = read_picture(picture.file, side)
                except Exception as error:  # given anything, decoders raise anything
                    left_out[picture.file] = str(error) or type(error).__name__
                    continue
                z_0 = sd.vae.encode(x[None].to(sd.device, sd.dtype))[0]  # [4, h, w]
                write_shard(file, {"z_0": z_0.half().cpu().contiguous()}, made_with)  # as data.generate stores them
    ranks.wait()
    numbers = {caption: number for number, caption in enumerate(captions)}
    found = zip(files, pictures)
    chosen = [(file, numbers[p.caption]) for file, p in found if p.caption in numbers and file.exists()]
    if not chosen:
        raise none_left("No picture is left to learn from", left_out)
    return Latents(chosen), left_out


class Latents:
    """Latents in files, and the numbers of their prompts: what ``--method noised`` asks of data.States."""

    def __init__(self, files: list[tuple[Path, int]]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def prompts(self, chosen: Tensor) -> Tensor:
        """The prompt's number of each, [B]."""
        return torch.tensor([self.files[i][1] for i in chosen.tolist()])

    def ends(self, chosen: Tensor) -> Tensor:
        """z_0 of each, [B, 4, h, w] float32."""
        return torch.stack([load_file(self.files[i][0])["z_0"] for i in chosen.tolist()]).float()
