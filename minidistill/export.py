"""LoRA files, out and in. One file is a whole student: thin matrices by layer name, and what they were made for."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from minidistill.files import CheckpointError, written_whole
from minidistill.lora import LoRAModel, inject_lora, lora_layers


@dataclass(frozen=True)
class LoRAFile:
    """The contents of a LoRA file: ``layers`` maps a layer's name to (lora_down, lora_up)."""

    layers: dict[str, tuple[Tensor, Tensor]]
    rank: int
    alpha: float
    metadata: dict[str, str]


def save_lora(model: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the LoRA of ``model`` as safetensors: ``<layer>.lora_down`` and ``<layer>.lora_up``.

    Rank and alpha go into the header beside ``metadata`` (base, guidance, method, negative_prompt, ...).
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("This model has no LoRA to save: call inject_lora first.")
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_down"] = layer.lora_down.detach().cpu().contiguous()
        tensors[f"{name}.lora_up"] = layer.lora_up.detach().cpu().contiguous()
    first = next(iter(layers.values()))
    rank, alpha = str(first.lora_down.shape[0]), repr(float(first.alpha)).removesuffix(".0")
    header = {"format": "pt", **(metadata or {}), "rank": rank, "alpha": alpha}
    with written_whole(path) as beside:
        beside.write_bytes(sorted_header(save(tensors, header)))


def sorted_header(data: bytes) -> bytes:
    """The same safetensors with its metadata in order: the library's order differs from call to call."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors stay aligned
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def read_lora(path: str | Path) -> LoRAFile:
    """Read a file that ``save_lora`` wrote. Raises CheckpointError that names the file and what is wrong."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no LoRA file {path}: name a lora.safetensors that train.py wrote.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}): make or fetch it again."
        ) from error

    names = sorted({name.removesuffix(".lora_down") for name in tensors if name.endswith(".lora_down")})
    expected = {f"{name}.{part}" for name in names for part in ("lora_down", "lora_up")}
    if not names or expected != set(tensors) or not {"rank", "alpha"} <= set(metadata):
        raise CheckpointError(
            f"{path} is not a LoRA of minidistill (pairs lora_down and lora_up, with rank and alpha in the header): "
            "name a lora.safetensors that train.py wrote."
        )
    layers = {name: (tensors[f"{name}.lora_down"], tensors[f"{name}.lora_up"]) for name in names}
    try:
        rank, alpha = int(metadata["rank"]), float(metadata["alpha"])
    except ValueError as error:
        raise CheckpointError(f"{path} has a header without numbers for rank and alpha ({error}).") from error
    wrong = [
        name
        for name, (down, up) in layers.items()
        if down.shape[:1] != (rank,) or up.shape[1:] != (rank, *[1] * (down.ndim - 2))
    ]
    if wrong:
        raise CheckpointError(f"{path} says rank {rank}, which does not fit {', '.join(wrong)}: the file is damaged.")
    return LoRAFile(layers, rank, alpha, metadata)


def load_lora(model: nn.Module, path: str | Path) -> LoRAModel:
    """Inject and fill: ``model`` with the LoRA of a file, rank, scale and layers as the file says.

    Raises CheckpointError, with the model untouched, for a LoRA that belongs to another network: all layers that it
    names and the model lacks, or that have another shape, are listed.
    """
    file = read_lora(path)
    modules = dict(model.named_modules())
    problems = []
    for name, (down, up) in file.layers.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            problems.append(f"no such layer: {name}")
        elif (up.shape[0], *down.shape[1:]) != tuple(weight.shape):
            problems.append(f"{name} is {list(weight.shape)}, the LoRA is for {[up.shape[0], *down.shape[1:]]}")
    if problems:
        raise CheckpointError(
            f"{path} is a LoRA for another model than this one ({len(problems)} layers differ; "
            f"it was made for {file.metadata.get('base', 'an unnamed base')}):\n  " + "\n  ".join(problems)
        )
    model = inject_lora(model, file.rank, file.alpha, targets=list(file.layers))
    fill_lora(model, file.layers)
    return model


@torch.no_grad()
def fill_lora(model: nn.Module, layers: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Copy pairs into the LoRA layers of the same names."""
    for name, layer in lora_layers(model).items():
        layer.lora_down.copy_(layers[name][0])
        layer.lora_up.copy_(layers[name][1])
