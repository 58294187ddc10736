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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minidistill.config import SD21_BASE_UNET, SDXL_UNET
from minidistill.distill import Dial
from minidistill.formats.files import CheckpointError, read_json, reading, user_path
from minidistill.formats.hub import newest_snapshot
from minidistill.formats.model_configs import taught_steps
from minidistill.formats.model_folder import squeeze_kernel
from minidistill.formats.original_names import translate, unet_names
from minidistill.formats.tensor_files import check_finite, convert, read_tensors
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

    def shaped_like(self, weight: Tensor) -> "Pair | None":
        """The same pair in the shapes that go with ``weight`` [out, in, ...]; None if it is for another weight.

        Some programs write 1x1 convolutions for matrices, others matrices for convolutions, with the kernel flattened.
        """
        of_weight, of_down = squeeze_kernel(weight).shape[1:], squeeze_kernel(self.down).shape[1:]
        if len(self.up) != len(weight) or of_down not in (of_weight, weight.flatten(1).shape[1:]):
            return None
        down = self.down.reshape(self.rank, *weight.shape[1:])
        return self._replace(down=down, up=self.up.reshape(len(weight), self.rank, *[1] * (weight.ndim - 2)))

    def delta(self, device: torch.device) -> Tensor:
        """(alpha / rank) up down, what is added to W, on W's ``device``."""
        return low_rank(self.down.to(device), self.up.to(device), self.scale)


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
    def base(self) -> str:
        """The model that the LoRA was made for, as far as its header says."""
        stated = (self.metadata.get(key) for key in ("base", "ss_base_model_version", "modelspec.architecture"))
        return next(filter(None, stated), "an unnamed base")

    @property
    def interval(self) -> Interval | None:
        """The time steps at which the student's teacher was guided; None: at all of them."""
        with reading(self.path):
            return Interval(*map(float, self.metadata["interval"].split())) if "interval" in self.metadata else None

    @property
    def few_steps(self) -> tuple[int, int] | None:
        """``taught_steps`` of the file's header."""
        return taught_steps(self.metadata, self.path)

    @property
    def skips_steps(self) -> bool:
        """True for a student of fewer steps than its teacher's. It works at full strength only."""
        return bool(self.few_steps) and self.few_steps[0] < self.few_steps[1]

    @property
    def dial(self) -> Dial | None:
        """The strength for each guidance, as measured by ``evaluate dial``; None for a style, and for few steps."""
        if not self.is_student or self.guidance <= 1 or self.skips_steps:
            return None
        with reading(self.path):
            points = [point.split(":") for point in self.metadata.get("dial", "").split()]
            measured = [(float(guidance), float(strength)) for guidance, strength in points]
            return Dial.through(float(self.metadata["guidance"]), measured)

    def scaled(self, scale: float) -> "LoRAFile":
        """The same LoRA with every alpha multiplied by ``scale``. Raises ValueError if it has learned few steps."""
        if scale != 1 and self.skips_steps:
            raise ValueError(f"{self.path} takes few steps, which needs its full strength: leave out the scale.")
        layers = {name: pair._replace(alpha=scale * pair.alpha) for name, pair in self.layers.items()}
        return replace(self, layers=layers, scale=scale * self.scale)

    @property
    def guidance(self) -> float:
        """The guidance scale a student stands for: at strength lambda, w ~ 1 + lambda (s - 1), where it learned s."""
        with reading(self.path):
            return round(1 + self.scale * (float(self.metadata["guidance"]) - 1), 6)  # 3.1, not 3.0999999999999996


def xl_names(layers: Mapping[str, Pair]) -> dict[str, str]:
    """The names of an SDXL's layers, with a dot at the end -> those of single files, which number blocks consecutively.

    A smaller model has residual blocks of other widths. If all of them have a LoRA, their names tell how many there are
    at each level; otherwise two, as in SDXL.
    """
    widths = {len(pair.up) for name, pair in layers.items() if ".resnets." in name}
    if widths <= set(SDXL_UNET.widths):
        return unet_names(SDXL_UNET)
    blocks = set(re.findall(r"^(down|up)_blocks\.\d+\.resnets\.(\d+)\.", "\n".join(layers), re.MULTILINE))
    n = sum(side == "down" for side, _ in blocks)
    all_blocks = {("down", str(i)) for i in range(n)} | {("up", str(i)) for i in range(n + 1)}
    return unet_names(replace(SDXL_UNET, layers=n if n and blocks == all_blocks else SDXL_UNET.layers))


# The input of this convolution has 1920 channels in SDXL, and 2560 in SD 1.x and 2.x.
XL_CONV, XL_WIDTH = "up_blocks.1.resnets.0.conv1", SDXL_UNET.widths[2] + SDXL_UNET.widths[1]


def is_xl(layers: Mapping[str, Pair]) -> bool:
    """True for layers of SDXL, told by several transformer blocks in a row, by the embedding of sizes, or by the width
    of the prompt's embeddings or of one convolution. A LoRA with none of these gets the names of SD 1.x.
    """
    conv = layers.get(XL_CONV)
    return (
        any(".transformer_blocks.1." in name or name.startswith("add_embedding.") for name in layers)
        or SDXL_UNET.context_width in context_widths(layers)
        or bool(conv and conv.down.shape[1] == XL_WIDTH)
    )


def context_widths(layers: Mapping[str, Pair]) -> set[int]:
    """The widths of the prompt's embeddings that the layers were made for: one, or none without cross-attention."""
    return {pair.down.shape[1] for name, pair in layers.items() if name.endswith(("attn2.to_k", "attn2.to_v"))}


# Writing


def peft_tensors(file: LoRAFile) -> dict[str, Tensor]:
    """The tensors under the names of diffusers and peft.

    alpha / rank is multiplied into lora_B, because only diffusers reads an alpha from the header. Where it is 1, the
    default, the tensors are the same as in the file. Raises ValueError for layers named as in the original code.
    """
    if any(name.startswith(ORIGINAL) for name in file.layers):
        raise ValueError(f"{file.path} has the layer names of the original code, which peft lacks: export --to kohya.")
    linear = is_xl(file.layers) or SD21_BASE_UNET.context_width in context_widths(file.layers)  # SDXL's, SD 2.x's
    tensors = {}
    for name, pair in file.layers.items():
        down, up = pair.down, pair.scale * pair.up
        if linear and name.endswith(("proj_in", "proj_out")):
            down, up = squeeze_kernel(down), squeeze_kernel(up)  # kohya's scripts train them as 1x1 convolutions
        tensors[f"unet.{name}.lora_A.weight"], tensors[f"unet.{name}.lora_B.weight"] = down, up
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
    tensors, names = {}, xl_names(file.layers) if is_xl(file.layers) else {}
    for name, pair in file.layers.items():
        name = "lora_unet_" + translate(f"{name}.", names)[:-1].replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = pair.down
        tensors[f"{name}.lora_up.weight"] = pair.up if pair.alpha == alpha else pair.alpha / alpha * pair.up
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


# Reading

# The end of a key says which part of a layer it is. peft may put the name of its adapter in between.
PART = re.compile(r"[._]lora(?:_linear_layer)?[._](down|mid|up|A|B)(?:(?:\.[^.]+)?\.weight)?$|\.(alpha)$")
PART_NAMES = {"A": "down", "B": "up"}  # as peft calls them
PREFIXES = re.compile(r"^(?:(?:base_model\.)?model\.|diffusion_model[._]|unet[._]|lora_|lycoris_)+")
NOT_UNET = re.compile(  # what programs train besides the UNet: text encoders, and embeddings of new words
    r"^(?:base_model\.model\.|lora_|lycoris_)*(?:text_encoder|text_model|te\d?[._]|clip_[lg][._]|bundle_emb|.*string_to_param)"
)
UNDERSCORED = re.compile(
    "(down_blocks|mid_block|up_blocks|transformer_blocks|time_embedding|add_embedding|time_emb_proj|linear_1|linear_2|"
    "conv_in|conv_out|conv_shortcut|proj_in|proj_out|to_q|to_k|to_v|to_out|"
    "input_blocks|middle_block|output_blocks|in_layers|out_layers|emb_layers|skip_connection|time_embed|label_emb)|_"
)  # the names in a UNet that contain underscores; any other underscore stands for a dot
ORIGINAL = ("input_blocks.", "middle_block.", "output_blocks.")  # names of the original code, see original_names.py
UNET_PARTS = (  # where the layers of a UNet lie, by our names and by those of the original code
    "conv_in", "conv_out", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks",
    "out", "time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks",
)  # fmt: skip

# Changes of weights that are not low-rank pairs, by a part of their keys.
OTHER_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude": "DoRA",
    "ia3_": "IA3",
    "on_input": "IA3",
    "oft_": "OFT",
    ".diff$": "full differences of weights",  # $: at the end
    ".diff_b$": "full differences of weights",
    "emb_params": "a textual inversion, words for the text encoder",
    "lora_B.bias": "trained biases",
}
PEFT_KEY = re.compile(r"base_model\.model\.|\.lora_A\.[^.]+\.weight$")  # peft's name of the model, or of its adapter
ADAPTER = "adapter_config.json"  # peft's, beside adapter_model.safetensors: alpha is in it
FILES_IN_FOLDERS = [
    "lora.safetensors",  # of train.py; then of diffusers, and of peft
    *(f"{name}.{suffix}" for name in ("pytorch_lora_weights", "adapter_model") for suffix in ("safetensors", "bin")),
]


def layer_name(name: str) -> str:
    """The UNet's name for a layer, from its name in a file of any format. Names of the original code stay."""
    bare = PREFIXES.sub("", name)
    if "." not in bare:
        return UNDERSCORED.sub(lambda match: match[1] or ".", bare)
    bare = bare.replace(".processor.", ".")  # the first training scripts of diffusers attached the LoRA to it
    return f"{bare}.0" if bare.endswith(".to_out") else bare


def find_lora(path: Path) -> Path:
    """The LoRA file in the folder of a run, of diffusers' scripts or of peft; a file itself. Raises CheckpointError."""
    if not path.is_dir():
        return path
    if file := next((path / name for name in FILES_IN_FOLDERS if (path / name).is_file()), None):
        return file
    files = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))) or "no .safetensors at all"
    raise CheckpointError(f"{path} is a folder without {FILES_IN_FOLDERS[0]}: name a LoRA file. It holds {files}.")


def read_lora(path: str | Path, scale: float = 1.0) -> LoRAFile:
    """Read a LoRA file of any of the three formats, or the one in a folder, with its alphas multiplied by ``scale``.

    A LoRA for the text encoder in the same file is ignored with a warning. Raises CheckpointError that names the file,
    what is wrong with it and what to do.
    """
    path = find_lora(newest_snapshot(user_path(path)))
    with reading(path):
        tensors, metadata = read_tensors(path)
        parts = group_by_layer(path, tensors)
        if any(key.endswith((".lora_down", ".lora_up")) for key in tensors):
            alphas = our_alphas(path, parts, metadata)
        elif config := peft_config(path, tensors, metadata):
            alphas = peft_alphas(path, parts, config)
        else:
            alphas = {name: len(part["down"]) for name, part in parts.items()}
        # An alpha beside its layer counts more than one in the header, which most readers ignore.
        alphas |= {name: part["alpha"].item() for name, part in parts.items() if "alpha" in part}
        if wrong := [name for name, alpha in alphas.items() if not math.isfinite(alpha)]:
            raise CheckpointError(f"{path} has no finite alpha for {', '.join(wrong)}: make or fetch it again.")
        layers = {name: Pair(parts[name]["down"], parts[name]["up"], alphas[name]) for name in sorted(parts)}
    return LoRAFile(path, layers, metadata).scaled(scale)


def peft_config(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict | None:
    """What peft says of its adapter, in the header (as diffusers writes it) or in the JSON beside it."""
    if "lora_adapter_metadata" in metadata:
        return json.loads(metadata["lora_adapter_metadata"])
    if not any(PEFT_KEY.search(key) for key in tensors):
        return None
    if (path.parent / ADAPTER).exists():
        return read_json(path.parent / ADAPTER)
    warnings.warn(f"{path} has no {ADAPTER} beside it, which holds its alpha: taking the rank instead.", stacklevel=3)
    return None


Parts = Mapping[str, Mapping[str, Tensor]]  # down, up and perhaps alpha of each layer


def group_by_layer(path: Path, tensors: Mapping[str, Tensor]) -> Parts:
    """The tensors of the UNet by layer and part. Warns of others, for text encoders."""
    parts: dict[str, dict[str, Tensor]] = {}
    others, unknown = 0, []
    for key, tensor in tensors.items():
        if NOT_UNET.match(key):
            others += 1
        elif match := PART.search(key):
            layer, part = layer_name(key[: match.start()]), match[1] or match[2]
            part = PART_NAMES.get(part, part)
            if part in parts.setdefault(layer, {}):
                raise CheckpointError(f"{path} has two LoRAs for {layer}: save them as two files.")
            parts[layer][part] = tensor
        else:
            unknown.append(key)
    for key, (mark, kind) in product(unknown, OTHER_KINDS.items()):
        if mark in f"{key}$":
            raise CheckpointError(f"{path} holds {kind} ({key}), which minidistill does not read: use a LoRA.")
    if not parts:
        raise CheckpointError(
            f"{path} is not a LoRA for a UNet in our own, peft's or kohya's format (it holds "
            f"{', '.join(list(tensors)[:2]) or 'nothing'} ...): name a LoRA file, such as one that train.py wrote."
        )
    if unknown:
        raise CheckpointError(
            f"{path} holds more than a plain LoRA: {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}. "
            "minidistill reads low-rank pairs and their alphas only: use a LoRA without the rest."
        )
    if wrong := [name for name, part in parts.items() if not is_pair(part)]:
        raise CheckpointError(
            f"{path} has layers whose lora_down and lora_up are missing, do not fit each other, or are not floats of "
            f"16 bits or more: {', '.join(wrong)}. The file is damaged: make or fetch it again."
        )
    for part in parts.values():  # to float32 at least: products of narrower numbers would lose digits
        part.update({key: convert(x, torch.promote_types(x.dtype, torch.float32)) for key, x in part.items()})
    check_finite({f"{n}.lora_{key}": x for n, part in parts.items() for key, x in part.items() if key != "alpha"}, path)
    for part in parts.values():
        if "mid" in part:  # LyCORIS: a 1x1 convolution, one with the kernel [rank, rank, k, k], and another 1x1
            part["down"] = torch.einsum("srkl,ri->sikl", part.pop("mid"), part["down"].flatten(1))
    if others:
        warnings.warn(
            f"{path} also changes the text encoder or teaches it words ({others} tensors), which minidistill "
            "leaves as it is: only the LoRA of the UNet is used.",
            stacklevel=3,
        )
    return parts


def is_pair(part: Mapping[str, Tensor]) -> bool:
    """True for floats [rank, in] or [rank, in, k, k], and [out, rank] or [out, rank, 1, 1], and at most one alpha.

    LyCORIS may have a third between the two, [rank, rank, k, k].
    """
    if not {"down", "up"} <= set(part):
        return False
    down, up = part["down"].shape, part["up"].shape
    fits = len(down) in (2, 4) and min(down) > 0 and up[1:] in ((down[0],), (down[0], 1, 1))
    fits = fits and ("mid" not in part or (part["mid"].ndim == 4 and part["mid"].shape[:2] == (down[0], down[0])))
    floats = all(part[key].is_floating_point() and part[key].itemsize > 1 for key in part if key != "alpha")
    return fits and floats and ("alpha" not in part or part["alpha"].numel() == 1)


def our_alphas(path: Path, parts: Parts, metadata: Mapping[str, str]) -> dict[str, float]:
    """The alpha in the header of our own format, for every layer."""
    if not {"rank", "alpha"} <= metadata.keys():
        raise CheckpointError(
            f"{path} is damaged (its header has no rank and alpha): some program saved the tensors without it, so take "
            "the file that train.py wrote."
        )
    rank, alpha = int(metadata["rank"]), float(metadata["alpha"])
    if wrong := [name for name, part in parts.items() if len(part["down"]) != rank]:
        raise CheckpointError(f"{path} says rank {rank}, which does not fit {', '.join(wrong)}: the file is damaged.")
    return dict.fromkeys(parts, alpha)


# Initialisations that subtract the pair from W, so that W is no longer the original.
CHANGED_W = ("pissa", "olora", "corda", "loftq", "lora_ga")


def peft_alphas(path: Path, parts: Parts, config: dict) -> dict[str, float]:
    """Alphas from the configuration of a peft adapter, which diffusers writes into the header."""
    config = {key.removeprefix("unet."): value for key, value in config.items() if value is not None}
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(CHANGED_W):
        raise CheckpointError(
            f'{path} was initialised by "{start}", which also changes W: convert it for the original W, in peft by '
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    ranks = {name: len(part["down"]) for name, part in parts.items()}
    alphas = {name: float(config.get("lora_alpha", rank)) for name, rank in ranks.items()}
    for pattern, alpha in reversed(config.get("alpha_pattern", {}).items()):  # peft applies the first that matches
        if not re.fullmatch(r"\^?[\w.]+", pattern):
            raise CheckpointError(
                f"{path} gives an alpha for {pattern}, and minidistill reads plain names only: save it again."
            )
        found = [name for name in ranks if re.fullmatch(rf"(.*\.)?({pattern})", name)]  # as peft does; ^: a whole name
        alphas |= dict.fromkeys(found, float(alpha))
    if config.get("use_rslora"):  # scaled by alpha / sqrt(rank)
        alphas = {name: alpha * ranks[name] ** 0.5 for name, alpha in alphas.items()}
    return alphas
