"""Official checkpoints in: the folder layout that Stable Diffusion is published in, read strictly."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from minidistill.config import ScheduleConfig
from minidistill.files import CheckpointError
from minidistill.layout import read_json, read_schedule_config, read_unet_config, read_vae_config
from minidistill.text import fill_positions
from minidistill.unet import UNet
from minidistill.vae import VAE


@dataclass(frozen=True)
class Checkpoint:
    """The parts of one Stable Diffusion, loaded; what :class:`minidistill.pipeline.StableDiffusion` is made of."""

    unet: UNet
    vae: VAE
    text_encoder: CLIPTextModel
    schedule: ScheduleConfig


def read_folder(folder: Path, dtype: torch.dtype, prediction: str | None = None) -> Checkpoint:
    """Load ``unet/``, ``vae/``, ``text_encoder/`` and ``scheduler/`` of a folder in the official layout.

    ``prediction`` ("eps" or "v") overrides what the scheduler's configuration says. Raises CheckpointError.
    """
    parts = ("unet", "vae", "text_encoder", "scheduler")
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise CheckpointError(
            f"{folder} is not a complete Stable Diffusion folder: it has no {', '.join(missing)}. "
            "It should hold unet, vae, text_encoder, tokenizer and scheduler, as published."
        )
    unet_config = read_unet_config(folder / "unet/config.json")
    vae_config = read_vae_config(folder / "vae/config.json")
    text_config = CLIPTextConfig.from_dict(read_json(folder / "text_encoder/config.json"))
    schedule = read_schedule_config(folder / "scheduler/scheduler_config.json", prediction)

    unet = build(lambda: UNet(unet_config), *read_weights(folder / "unet", "diffusion_pytorch_model"), dtype)
    vae_weights, vae_file = read_weights(folder / "vae", "diffusion_pytorch_model")
    vae = build(lambda: VAE(vae_config), rename_old_attention(vae_weights), vae_file, dtype)
    text_weights, text_file = read_weights(folder / "text_encoder", "model")
    text_encoder = build(
        lambda: CLIPTextModel(text_config), match_text_names(text_weights, text_config), text_file, dtype
    )
    fill_positions(text_encoder)
    return Checkpoint(unet, vae, text_encoder, schedule)


def build(make: Callable[[], nn.Module], tensors: dict[str, Tensor], file: Path, dtype: torch.dtype) -> nn.Module:
    """A frozen module straight from its tensors: built without storage, each parameter then *is* the file's tensor.

    Raises CheckpointError that lists every missing, unexpected and misshapen tensor.
    """
    with torch.device("meta"):
        module = make()
    check_names_and_shapes(module.state_dict(), tensors, file)
    tensors = {name: channels_last(tensor.to(dtype)) for name, tensor in tensors.items()}
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


def channels_last(tensor: Tensor) -> Tensor:
    """Convolution weights [out, in, k, k] in the layout that CPU and GPU convolutions are fastest in."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def check_names_and_shapes(expected: dict[str, Tensor], found: dict[str, Tensor], file: Path) -> None:
    problems = [f"missing: {name} {list(expected[name].shape)}" for name in expected if name not in found]
    problems += [f"unexpected: {name} {list(found[name].shape)}" for name in found if name not in expected]
    problems += [
        f"misshapen: {name} is {list(found[name].shape)}, should be {list(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    if problems:
        raise CheckpointError(
            f"{file} does not fit the configuration beside it ({len(problems)} tensors):\n  "
            + "\n  ".join(problems)
            + "\nThe folder is damaged, or holds a model of another kind; fetch it again, or use one of SD 1.x or 2.x."
        )


def read_weights(folder: Path, stem: str) -> tuple[dict[str, Tensor], Path]:
    """The tensors of ``<stem>.safetensors`` (or ``<stem>.fp16.safetensors``), memory-mapped, and that file's path."""
    candidates = [folder / f"{stem}.safetensors", folder / f"{stem}.fp16.safetensors"]
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} holds no {candidates[0].name}: fetch the model's safetensors files.")
    try:
        return load_file(file), file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file ({error}): fetch it again.") from error


OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename_old_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The VAE's attention under its present names; older files have others, and 1x1 convolutions for linears."""
    renamed = {}
    for name, tensor in tensors.items():
        if ".attentions.0." in name:
            for old, new in OLD_ATTENTION.items():
                name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
            tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
        renamed[name] = tensor
    return renamed


def match_text_names(tensors: dict[str, Tensor], config: CLIPTextConfig) -> dict[str, Tensor]:
    """The text encoder's tensors under the names this version of transformers uses: with or without ``text_model.``."""
    with torch.device("meta"):
        prefixed = next(iter(CLIPTextModel(config).state_dict())).startswith("text_model.")
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    bare.pop("embeddings.position_ids", None)  # older files hold it; it is only 0, 1, 2, ...
    return {f"text_model.{name}": tensor for name, tensor in bare.items()} if prefixed else bare
