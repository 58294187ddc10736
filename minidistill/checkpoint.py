"""Official checkpoints in, read strictly: a folder, a single file, or a model of the hub."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPTextModel

from minidistill.config import ScheduleConfig
from minidistill.files import CheckpointError
from minidistill.folder import STEMS, match_text_names, read_text_config, read_weights, rename_old_attention
from minidistill.hub import fetch_model, is_hub_id
from minidistill.layout import read_schedule_config, read_unet_config, read_vae_config
from minidistill.single_file import read_single_file
from minidistill.stored import StoredTensor
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
    if not Path(path).exists():
        if not is_hub_id(str(path)):
            raise CheckpointError(f"There is no {path}: name a Stable Diffusion folder, a single file or a hub id.")
        path = fetch_model(str(path), variant)
    path = Path(path)
    flag = "--ema" if ema and path.is_dir() else "--variant" if variant and path.is_file() else None
    if flag:
        raise CheckpointError(f"{path} is a {'folder' if path.is_dir() else 'single file'}: leave {flag} out.")
    return read_folder(path, dtype, prediction, variant) if path.is_dir() else read_file(path, dtype, prediction, ema)


def read_folder(
    folder: Path, dtype: torch.dtype, prediction: str | None = None, variant: str | None = None
) -> Checkpoint:
    """Load ``unet/``, ``vae/``, ``text_encoder/`` and ``scheduler/`` of a folder in the official layout."""
    missing = [part for part in (*STEMS, "scheduler") if not (folder / part).is_dir()]
    if missing:
        raise CheckpointError(
            f"{folder} is not a complete Stable Diffusion folder: it has no {', '.join(missing)}. "
            "It should hold unet, vae, text_encoder, tokenizer and scheduler, as published."
        )
    unet_config = read_unet_config(folder / "unet/config.json")
    vae_config = read_vae_config(folder / "vae/config.json")
    text_config = read_text_config(folder / "text_encoder/config.json")
    schedule = read_schedule_config(folder / "scheduler/scheduler_config.json", prediction)

    unet_weights, unet_file = read_weights(folder / "unet", STEMS["unet"], variant)
    vae_weights, vae_file = read_weights(folder / "vae", STEMS["vae"], variant)
    text_weights, text_file = read_weights(folder / "text_encoder", STEMS["text_encoder"], variant)
    unet = build(lambda: UNet(unet_config), unet_weights, unet_file, dtype)
    vae = build(lambda: VAE(vae_config), rename_old_attention(vae_weights), vae_file, dtype)
    text_weights = match_text_names(text_weights)
    text_encoder = build(lambda: CLIPTextModel(text_config), text_weights, text_file, dtype)
    fill_positions(text_encoder)
    return Checkpoint(unet, vae, text_encoder, schedule, folder, folder / "tokenizer")


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
