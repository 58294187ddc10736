"""Official checkpoints in, read strictly: a folder, a single file, or a model of the hub."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPTextModel

from minidistill.config import ScheduleConfig
from minidistill.formats.files import CheckpointError
from minidistill.formats.hub import find_model
from minidistill.formats.model_folder import match_text_names, read_model_folder
from minidistill.formats.single_file import read_single_file
from minidistill.formats.stored import StoredTensor
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
    path: Path  # of the folder or file
    tokenizer_folder: Path | None  # None: a single file holds no tokenizer
    pad_token: str | None = None  # None: as the tokenizer says


def read_checkpoint(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    prediction: str | None = None,
    ema: bool = False,
    variant: str | None = None,
) -> Checkpoint:
    """Load what ``path`` names: a folder in the official layout, a single .safetensors or .ckpt file, or a hub id.

    Args:
        dtype: of all weights.
        prediction: "eps" or "v", whatever the checkpoint says.
        ema: of a single file, the UNet's averaged copy.
        variant: of a folder or hub model, which files of weights, for example "fp16".

    Raises:
        CheckpointError: names the file, what is wrong with it and what to do.
    """
    path = find_model(path, variant, ema)
    return read_folder(path, dtype, prediction, variant) if path.is_dir() else read_file(path, dtype, prediction, ema)


def read_folder(
    folder: Path, dtype: torch.dtype, prediction: str | None = None, variant: str | None = None
) -> Checkpoint:
    """Load a folder in the official layout."""
    found = read_model_folder(folder, prediction, variant)
    unet = build(lambda: UNet(found.unet_config), *found.unet, dtype)
    vae = build(lambda: VAE(found.vae_config), *found.vae, dtype)
    text_encoder = build(lambda: CLIPTextModel(found.text_config), *found.text, dtype)
    fill_positions(text_encoder)
    return Checkpoint(unet, vae, text_encoder, found.schedule, folder, folder / "tokenizer")


def read_file(path: Path, dtype: torch.dtype, prediction: str | None = None, ema: bool = False) -> Checkpoint:
    """Load a single file."""
    file = read_single_file(path, prediction, ema)
    text_weights = match_text_names(file.text.tensors)
    unet = build(lambda: UNet(file.unet_config), file.unet.tensors, path, dtype, file.unet.called)
    vae = build(lambda: VAE(file.vae_config), file.vae.tensors, path, dtype, file.vae.called)
    text_encoder = build(lambda: CLIPTextModel(file.text_config), text_weights, path, dtype, file.text.called)
    fill_positions(text_encoder)
    return Checkpoint(unet, vae, text_encoder, file.schedule, path, None, file.version.pad_token)


def build(
    make: Callable[[], nn.Module],
    tensors: Mapping[str, StoredTensor],
    file: Path,
    dtype: torch.dtype,
    called: Callable[[str], str] = str,
) -> nn.Module:
    """A frozen module straight from its tensors: built without storage, each parameter then *is* the loaded tensor.

    Args:
        called: what the file calls a tensor, given our name.

    Raises:
        CheckpointError: lists every missing, unexpected and misshapen tensor.
    """
    try:
        with torch.device("meta"):
            module = make()
    except Exception as error:  # the configuration came from a file too, and may ask for anything
        raise CheckpointError(
            f"{file} comes with a configuration that no network can have ({error}): fetch it again."
        ) from error
    check(module.state_dict(), tensors, file, called)
    module.load_state_dict({name: tensor.load(dtype) for name, tensor in tensors.items()}, assign=True)
    return module.eval().requires_grad_(False)


def check(
    expected: Mapping[str, torch.Tensor], found: Mapping[str, StoredTensor], file: Path, called: Callable[[str], str]
) -> None:
    """Names, shapes, and that they are numbers with a point."""
    problems = [f"missing: {called(name)} {list(expected[name].shape)}" for name in expected if name not in found]
    problems += [f"unexpected: {called(name)} {list(found[name].shape)}" for name in found if name not in expected]
    for name in (name for name in expected if name in found):
        shape, dtype = found[name].shape, found[name].dtype
        if shape != expected[name].shape:
            problems.append(f"misshapen: {called(name)} is {list(shape)}, should be {list(expected[name].shape)}")
        elif not dtype.is_floating_point:
            problems.append(f"of the wrong kind: {called(name)} holds {str(dtype).removeprefix('torch.')}")
    if problems:
        raise CheckpointError(
            f"{file} does not fit its configuration ({len(problems)} tensors):\n  "
            + "\n  ".join(problems)
            + "\nIt is damaged, or a model of another kind; fetch it again, or use one of SD 1.x or 2.x."
        )
