"""The formats of LoRA files: our own, and those of peft and of kohya's scripts, which other tools read.

A file holds two thin matrices and alpha for each layer: W <- W + (alpha / rank) lora_up lora_down.

            keys                                                                 alpha
    ours    <layer>.lora_down, <layer>.lora_up                                   in the header, the same for all layers
    peft    unet.<layer>.lora_A.weight, .lora_B.weight                           the rank, unless the header has more
    kohya   lora_unet_<layer, underscored>.lora_down.weight, .lora_up.weight     <layer>.alpha, a tensor; else the rank

For SDXL, kohya's scripts use the layer names of single files.
"""

import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minidistill.config import SDXL_UNET
from minidistill.distill import Dial
from minidistill.formats.files import CheckpointError, reading
from minidistill.formats.original_names import translate, unet_names
from minidistill.formats.tensor_files import convert, read_tensors
from minidistill.guidance import Interval
from minidistill.lora import low_rank


class Pair(NamedTuple):
    """The LoRA of one layer: down [rank, in, ...], up [out, rank, ...], and alpha."""

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
        """W + (alpha / rank) up down on W's device, summed in float32 or wider and rounded once."""
        down, up = self.down.to(weight.device), self.up.to(weight.device)
        return (weight + low_rank(down, up, self.scale)).to(weight.dtype)


@dataclass(frozen=True)
class LoRAFile:
    """The contents of a LoRA file: ``layers`` by their names in the UNet, and the ``metadata`` of its header."""

    path: Path
    layers: dict[str, Pair]
    metadata: dict[str, str]
    scale: float = 1.0  # strength, already multiplied into every alpha

    @property
    def is_student(self) -> bool:
        """True if the LoRA has learned guidance. Any other LoRA is a style, which teacher and student share."""
        return "guidance" in self.metadata

    @property
    def interval(self) -> Interval | None:
        """The time steps at which the student's teacher was guided; None: at all of them."""
        with reading(self.path):
            return Interval(*map(float, self.metadata["interval"].split())) if "interval" in self.metadata else None

    @property
    def few_steps(self) -> tuple[int, int] | None:
        """The DDIM steps of a student that was taught how many to take, and those of its teacher; else None."""
        if (steps := self.metadata.get("student_steps")) is None:
            return None
        with reading(self.path):
            few = int(steps), int(self.metadata.get("teacher_steps", steps))
            if min(few) < 1:
                raise ValueError(f"student_steps {few[0]} and teacher_steps {few[1]} must be at least 1")
            return few

    @property
    def dial(self) -> Dial | None:
        """The strength for each guidance, as measured by ``evaluate dial``; None for a style, and for few steps."""
        if not self.is_student or (self.few_steps and self.few_steps[0] < self.few_steps[1]):
            return None
        with reading(self.path):
            points = [point.split(":") for point in self.metadata.get("dial", "").split()]
            measured = [(float(guidance), float(strength)) for guidance, strength in points]
            return Dial.through(float(self.metadata["guidance"]), measured)

    def scaled(self, scale: float) -> "LoRAFile":
        """The same LoRA with every alpha multiplied by ``scale``."""
        layers = {name: pair._replace(alpha=scale * pair.alpha) for name, pair in self.layers.items()}
        return replace(self, layers=layers, scale=scale * self.scale)

    @property
    def guidance(self) -> float:
        """The guidance scale a student stands for: at strength lambda, w ~ 1 + lambda (s - 1), where it learned s."""
        with reading(self.path):
            return 1 + self.scale * (float(self.metadata["guidance"]) - 1)


# Our names of SDXL's layers, with a dot at the end -> those of single files; and back, from underscores.
XL_NAMES = unet_names(SDXL_UNET)
UNDERSCORED_XL_NAMES = {theirs.replace(".", "_"): ours for ours, theirs in XL_NAMES.items()}


def is_xl(layers: Iterable[str]) -> bool:
    """True for layers of SDXL, the only UNet here with several transformer blocks in a row."""
    return any(".transformer_blocks.1." in name for name in layers)


# Writing


def peft_tensors(file: LoRAFile) -> dict[str, Tensor]:
    """The tensors under the names of diffusers and peft.

    alpha / rank is multiplied into lora_B, because only diffusers reads an alpha from the header. Where it is 1, the
    default, the tensors are the same as in the file.
    """
    tensors = {}
    for name, pair in file.layers.items():
        tensors[f"unet.{name}.lora_A.weight"] = pair.down
        tensors[f"unet.{name}.lora_B.weight"] = pair.scale * pair.up
    return tensors


def kohya_tensors(file: LoRAFile) -> dict[str, Tensor]:
    """The tensors under kohya's names, with alpha as the float32 tensor that all readers of the format expect.

    All layers get the same alpha, because diffusers uses attention's for all. If the file has several, or one that
    float32 cannot hold (such as 0.1), alpha becomes the largest rank and lora_up makes up for it.
    """
    pairs = file.layers.values()
    alpha = torch.tensor(next(iter(pairs)).alpha).item()
    if any(pair.alpha != alpha for pair in pairs):
        alpha = float(max(pair.rank for pair in pairs))
    tensors, names = {}, XL_NAMES if is_xl(file.layers) else {}
    for name, pair in file.layers.items():
        name = "lora_unet_" + translate(f"{name}.", names)[:-1].replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = pair.down
        tensors[f"{name}.lora_up.weight"] = pair.up if pair.alpha == alpha else pair.alpha / alpha * pair.up
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


# Reading

ENDINGS = {
    ".lora_down": "down",
    ".lora_up": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",  # older training scripts of diffusers use this for attention, and peft's for the rest
    ".lora.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
UNDERSCORED = re.compile(
    "(down_blocks|mid_block|up_blocks|transformer_blocks|time_embedding|add_embedding|time_emb_proj|linear_1|linear_2|"
    "conv_in|conv_out|conv_shortcut|proj_in|proj_out|to_q|to_k|to_v|to_out)|_"
)  # the names in a UNet that contain underscores; any other underscore stands for a dot


def layer_name(name: str) -> str:
    """The UNet's name for a layer, from its name in a file of any format."""
    if name.startswith("lora_unet_"):
        name = translate(name.removeprefix("lora_unet_") + "_", UNDERSCORED_XL_NAMES)
        return UNDERSCORED.sub(lambda match: match[1] or ".", name)[:-1]
    return name.removeprefix("unet.")


def read_lora(path: str | Path, scale: float = 1.0) -> LoRAFile:
    """Read a LoRA file of any of the three formats, with its alphas multiplied by ``scale``.

    A LoRA for the text encoder in the same file is ignored with a warning. Raises CheckpointError that names the file,
    what is wrong with it and what to do.
    """
    path = Path(path)
    with reading(path):
        tensors, metadata = read_tensors(path)
        parts, text_encoder = group_by_layer(path, tensors)
        if text_encoder:
            warnings.warn(
                f"{path} also changes the text encoder ({text_encoder} tensors), which minidistill leaves as it is: "
                "only the LoRA of the UNet is used.",
                stacklevel=2,
            )
        if any(key.endswith((".lora_down", ".lora_up")) for key in tensors):
            alphas = our_alphas(path, parts, metadata)
        elif "lora_adapter_metadata" in metadata:
            alphas = peft_alphas(path, parts, json.loads(metadata["lora_adapter_metadata"]))
        else:
            alphas = {n: part["alpha"].item() if "alpha" in part else len(part["down"]) for n, part in parts.items()}
        if wrong := [name for name, alpha in alphas.items() if not math.isfinite(alpha)]:
            raise CheckpointError(f"{path} has no finite alpha for {', '.join(wrong)}: make or fetch it again.")
        layers = {name: Pair(parts[name]["down"], parts[name]["up"], alphas[name]) for name in sorted(parts)}
        return LoRAFile(path, layers, metadata).scaled(scale)


def read_run(path: Path, scale: float = 1.0) -> LoRAFile:
    """``read_lora`` for a run's folder, or for a file."""
    return read_lora(path / "lora.safetensors" if path.is_dir() else path, scale)


Parts = Mapping[str, Mapping[str, Tensor]]  # down, up and perhaps alpha of each layer


def group_by_layer(path: Path, tensors: Mapping[str, Tensor]) -> tuple[Parts, int]:
    """The tensors of the UNet by layer and part, and the number of tensors for the text encoder."""
    parts: dict[str, dict[str, Tensor]] = {}
    text_encoder, others = 0, []
    for key, tensor in tensors.items():
        # The first training scripts of diffusers attached the LoRA to attention's processor.
        key = re.sub(r"\.processor\.(to_[qkv])_lora\.", r".\1.lora.", key)
        key = key.replace(".processor.to_out_lora.", ".to_out.0.lora.")
        ending = next((ending for ending in ENDINGS if key.endswith(ending)), None)
        if key.startswith(("text_encoder", "lora_te")):
            text_encoder += 1
        elif ending is None:
            others.append(key)
        else:
            parts.setdefault(layer_name(key.removesuffix(ending)), {})[ENDINGS[ending]] = tensor
    if not parts:
        raise CheckpointError(
            f"{path} is not a LoRA for a UNet in our own, peft's or kohya's format (it holds "
            f"{', '.join(list(tensors)[:2]) or 'nothing'} ...): name a LoRA file, such as one that train.py wrote."
        )
    if others:
        raise CheckpointError(
            f"{path} holds more than a plain LoRA: {', '.join(others[:5])}{' ...' * (len(others) > 5)}. "
            "minidistill does not read LoHa, LoKr, DoRA or trained biases: use a LoRA without them."
        )
    if wrong := [name for name, part in parts.items() if not is_pair(part)]:
        raise CheckpointError(
            f"{path} has layers whose lora_down and lora_up are missing, do not fit each other, or are not floats of "
            f"16 bits or more: {', '.join(wrong)}. The file is damaged: make or fetch it again."
        )
    return {name: {key: widen(tensor) for key, tensor in part.items()} for name, part in parts.items()}, text_encoder


def widen(tensor: Tensor) -> Tensor:
    """To float32 at least: products of narrower numbers would lose digits."""
    return convert(tensor, torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def is_pair(part: Mapping[str, Tensor]) -> bool:
    """True for floats [rank, in] and [out, rank], or [rank, in, k, k] and [out, rank, 1, 1], and at most one alpha."""
    if not {"down", "up"} <= set(part):
        return False
    down, up = part["down"].shape, part["up"].shape
    fits = len(down) in (2, 4) and min(down) > 0 and up[1:] == (down[0], *[1] * (len(down) - 2))
    floats = all(part[key].is_floating_point() and part[key].itemsize > 1 for key in ("down", "up"))
    return fits and floats and ("alpha" not in part or part["alpha"].numel() == 1)


def our_alphas(path: Path, parts: Parts, metadata: Mapping[str, str]) -> dict[str, float]:
    """The alpha in the header of our own format, for every layer."""
    rank, alpha = int(metadata["rank"]), float(metadata["alpha"])
    if wrong := [name for name, part in parts.items() if len(part["down"]) != rank]:
        raise CheckpointError(f"{path} says rank {rank}, which does not fit {', '.join(wrong)}: the file is damaged.")
    return dict.fromkeys(parts, alpha)


def peft_alphas(path: Path, parts: Parts, config: dict) -> dict[str, float]:
    """Alphas from the configuration of a peft adapter, which diffusers writes into the header."""
    config = {key.removeprefix("unet."): value for key, value in config.items()}
    ranks = {name: len(part["down"]) for name, part in parts.items()}
    alphas = {name: float(config.get("lora_alpha", rank)) for name, rank in ranks.items()}
    for pattern, alpha in reversed((config.get("alpha_pattern") or {}).items()):  # peft applies the first that matches
        ending = pattern.removeprefix("^")
        if not re.fullmatch(r"[\w.]+", ending):
            raise CheckpointError(
                f"{path} gives an alpha for {pattern}, and minidistill reads plain names only: save it again."
            )
        alphas |= {name: float(alpha) for name in ranks if f".{name}".endswith(f".{ending}")}
    if config.get("use_rslora"):  # scaled by alpha / sqrt(rank)
        alphas = {name: alpha * ranks[name] ** 0.5 for name, alpha in alphas.items()}
    return alphas
