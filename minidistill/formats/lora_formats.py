"""The formats of LoRA files: our own, and those that peft and kohya's scripts write and other tools read.

A file holds two thin matrices and their alpha by layer name, W <- W + (alpha / rank) lora_up lora_down:

            keys                                                                 alpha
    ours    <layer>.lora_down, <layer>.lora_up                                   in the header, one for all
    peft    unet.<layer>.lora_A.weight, .lora_B.weight                           the rank, unless the header says more
    kohya   lora_unet_<layer, underscored>.lora_down.weight, .lora_up.weight     <layer>.alpha, a tensor; else the rank
"""

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minidistill.formats.files import CheckpointError, blamed
from minidistill.formats.stored import StoredTensor
from minidistill.formats.tensor_files import read_tensors
from minidistill.guidance import Interval
from minidistill.lora import low_rank


class Pair(NamedTuple):
    """What a file holds for one layer: down [rank, in, ...], up [out, rank, ...], and alpha."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def added_to(self, weight: Tensor) -> Tensor:
        """W + (alpha / rank) up down on W's device, summed in float32 or wider, then rounded once."""
        down, up = self.down.to(weight.device), self.up.to(weight.device)
        return (weight + low_rank(down, up, self.scale)).to(weight.dtype)


@dataclass(frozen=True)
class LoRAFile:
    """The contents of a LoRA file: ``layers`` by their names in the UNet, ``metadata`` as it stands in the header."""

    path: Path
    layers: dict[str, Pair]
    metadata: dict[str, str]
    scale: float = 1.0  # how much more or less of it than the file holds

    @property
    def is_student(self) -> bool:
        """Whether it has learned guidance, and says so. Any other changes W, for teacher and student alike: a style."""
        return "guidance" in self.metadata

    @property
    def interval(self) -> Interval | None:
        """The time steps at which the student's teacher was guided; None: at all of them."""
        return Interval(*map(float, self.metadata["interval"].split())) if "interval" in self.metadata else None

    def scaled(self, scale: float) -> "LoRAFile":
        """As much more or less of it: every alpha ``scale`` times what it was."""
        layers = {name: pair._replace(alpha=scale * pair.alpha) for name, pair in self.layers.items()}
        return replace(self, layers=layers, scale=scale * self.scale)

    @property
    def guidance(self) -> float:
        """The scale that a student stands for: w ~ 1 + lambda (s - 1), at lambda times the LoRA that learned s."""
        with blamed(self.path):
            return 1 + self.scale * (float(self.metadata["guidance"]) - 1)


# Out


def peft_tensors(file: LoRAFile) -> dict[str, Tensor]:
    """Under the names of diffusers and peft. alpha / rank goes into lora_B, because what a header says of alpha only
    diffusers reads; where it is 1, as it is unless asked for otherwise, the tensors are those of the file."""
    tensors = {}
    for name, pair in file.layers.items():
        tensors[f"unet.{name}.lora_A.weight"] = pair.down
        tensors[f"unet.{name}.lora_B.weight"] = pair.scale * pair.up
    return tensors


def kohya_tensors(file: LoRAFile) -> dict[str, Tensor]:
    """Under kohya's names, with alpha as the float32 tensor that every reader of theirs expects.

    All layers get one alpha, since diffusers takes attention's for that of the others. Where the file has several, or
    one that is no float32, such as 0.1, it becomes the largest rank, and lora_up makes up for it.
    """
    pairs = file.layers.values()
    alpha = torch.tensor(next(iter(pairs)).alpha).item()
    if any(pair.alpha != alpha for pair in pairs):
        alpha = float(max(pair.rank for pair in pairs))
    tensors = {}
    for name, pair in file.layers.items():
        name = "lora_unet_" + name.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = pair.down
        tensors[f"{name}.lora_up.weight"] = pair.up if pair.alpha == alpha else pair.alpha / alpha * pair.up
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


# In

PARTS = {
    ".lora_down": "down",
    ".lora_up": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",  # diffusers' former training scripts name attention so, and the rest like peft
    ".lora.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
UNDERSCORED = re.compile(
    "(down_blocks|mid_block|up_blocks|transformer_blocks|time_embedding|time_emb_proj|linear_1|linear_2|"
    "conv_in|conv_out|conv_shortcut|proj_in|proj_out|to_q|to_k|to_v|to_out)|_"
)  # the names in a UNet that have underscores of their own; any other stands for a dot


def layer_name(name: str) -> str:
    """A layer as the UNet calls it, given as a file does, in whichever format."""
    if name.startswith("lora_unet_"):
        return UNDERSCORED.sub(lambda found: found[1] or ".", name.removeprefix("lora_unet_"))
    return name.removeprefix("unet.")


def read_lora(path: str | Path, scale: float = 1.0) -> LoRAFile:
    """Read a LoRA file of any of the three formats; ``scale`` times its alphas.

    What it says of the text encoder is left out, with a warning. Raises CheckpointError that names the file, what is
    wrong with it and what to do.
    """
    path = Path(path)
    with blamed(path):
        stored, metadata = read_tensors(path)
        parts, of_text_encoder = sort_out(path, stored)
        if of_text_encoder:
            warnings.warn(
                f"{path} changes the text encoder too ({of_text_encoder} tensors), which is left as it is here: "
                "only the LoRA of the UNet counts.",
                stacklevel=2,
            )
        if any(key.endswith((".lora_down", ".lora_up")) for key in stored):
            alphas = our_alphas(path, parts, metadata)
        elif "lora_adapter_metadata" in metadata:
            alphas = peft_alphas(path, parts, json.loads(metadata["lora_adapter_metadata"]))
        else:
            alphas = {
                name: found["alpha"].item() if "alpha" in found else len(found["down"]) for name, found in parts.items()
            }
        if wrong := [name for name, alpha in alphas.items() if not math.isfinite(alpha)]:
            raise CheckpointError(f"{path} has no finite alpha for {', '.join(wrong)}: make or fetch it again.")
        layers = {name: Pair(parts[name]["down"], parts[name]["up"], alphas[name]) for name in sorted(parts)}
        return LoRAFile(path, layers, metadata).scaled(scale)


def read_run(path: Path, scale: float = 1.0) -> LoRAFile:
    """``read_lora`` of what a run left in its folder; or of a file."""
    return read_lora(path / "lora.safetensors" if path.is_dir() else path, scale)


def sort_out(path: Path, stored: Mapping[str, StoredTensor]) -> tuple[dict[str, dict[str, Tensor]], int]:
    """The UNet's tensors by layer and part, and how many others are the text encoder's."""
    parts: dict[str, dict[str, StoredTensor]] = {}
    of_text_encoder, others = [], []
    for key, tensor in stored.items():
        # diffusers' first training scripts hung the LoRA on attention's processor.
        key = re.sub(r"\.processor\.(to_[qkv])_lora\.", r".\1.lora.", key)
        key = key.replace(".processor.to_out_lora.", ".to_out.0.lora.")
        ending = next((ending for ending in PARTS if key.endswith(ending)), None)
        if key.startswith(("text_encoder", "lora_te")):
            of_text_encoder.append(key)
        elif ending is None:
            others.append(key)
        else:
            parts.setdefault(layer_name(key.removesuffix(ending)), {})[PARTS[ending]] = tensor
    if not parts:
        raise CheckpointError(
            f"{path} is not a LoRA for a UNet in our own, peft's or kohya's format (it holds "
            f"{', '.join(list(stored)[:2]) or 'nothing'} ...): name a LoRA file, such as one that train.py wrote."
        )
    if others:
        raise CheckpointError(
            f"{path} holds what is no part of a plain LoRA: {', '.join(others[:5])}{' ...' * (len(others) > 5)}. "
            "LoHa, LoKr, DoRA and trained biases are not read here: use a LoRA without them."
        )
    if wrong := [name for name, found in parts.items() if not is_pair(found)]:
        raise CheckpointError(
            f"{path} has layers whose lora_down and lora_up are missing or do not fit each other: {', '.join(wrong)}. "
            "Or they are not floats of 16 bits or more. The file is damaged: make or fetch it again."
        )
    return {name: {part: wide(t) for part, t in found.items()} for name, found in parts.items()}, len(of_text_encoder)


def wide(tensor: StoredTensor) -> Tensor:
    """In float32 at least: products of narrower ones would lose digits."""
    return tensor.load(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def is_pair(found: Mapping[str, StoredTensor]) -> bool:
    """[rank, in] with [out, rank], or [rank, in, k, k] with [out, rank, 1, 1], of floats; and one alpha."""
    if not {"down", "up"} <= set(found):
        return False
    down, up = found["down"].shape, found["up"].shape
    fits = len(down) in (2, 4) and min(down) > 0 and up[1:] == (down[0], *[1] * (len(down) - 2))
    numbers = all(found[part].dtype.is_floating_point and found[part].dtype.itemsize > 1 for part in ("down", "up"))
    return fits and numbers and ("alpha" not in found or prod(found["alpha"].shape) == 1)


def our_alphas(path: Path, parts: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str]) -> dict[str, float]:
    """One for all, in the header."""
    rank, alpha = int(metadata["rank"]), float(metadata["alpha"])
    if wrong := [name for name, found in parts.items() if len(found["down"]) != rank]:
        raise CheckpointError(f"{path} says rank {rank}, which does not fit {', '.join(wrong)}: the file is damaged.")
    return dict.fromkeys(parts, alpha)


def peft_alphas(path: Path, parts: Mapping[str, Mapping[str, Tensor]], config: dict) -> dict[str, float]:
    """From the configuration of the peft adapter that diffusers writes into the header."""
    config = {key.removeprefix("unet."): value for key, value in config.items()}
    ranks = {name: len(found["down"]) for name, found in parts.items()}
    alphas = {name: float(config.get("lora_alpha", rank)) for name, rank in ranks.items()}
    for pattern, alpha in reversed((config.get("alpha_pattern") or {}).items()):  # of several, peft takes the first
        ending = pattern.removeprefix("^")
        if not re.fullmatch(r"[\w.]+", ending):
            raise CheckpointError(f"{path} gives an alpha for {pattern}: only plain names are read. Save it again.")
        alphas |= {name: float(alpha) for name in ranks if f".{name}".endswith(f".{ending}")}
    if config.get("use_rslora"):  # scaled by alpha / sqrt(rank)
        alphas = {name: alpha * ranks[name] ** 0.5 for name, alpha in alphas.items()}
    return alphas
