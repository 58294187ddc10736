"""Official checkpoints in, read strictly: a folder, a single file, or a model of the hub."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from minidistill.config import ScheduleConfig
from minidistill.formats.files import CheckpointError, blamed
from minidistill.formats.hub import fetch_tokenizer, find_model
from minidistill.formats.model_folder import match_text_names, read_model_folder
from minidistill.formats.single_file import read_single_file
from minidistill.formats.stored import StoredTensor
from minidistill.pipeline import StableDiffusion
from minidistill.schedule import Schedule
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


def fill_positions(encoder: nn.Module) -> None:
    """Give an encoder built on the meta device the one buffer that no checkpoint holds: positions 0, 1, 2, ..."""
    for module in encoder.modules():
        if "position_ids" in module._buffers:
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]


def read_tokenizer(folder: Path | None, context: int, pad_token: str | None = None) -> CLIPTokenizer:
    """The tokenizer in ``folder``, or CLIP's from the hub, for a text encoder of ``context`` tokens.

    Raises CheckpointError for a folder without a tokenizer. ``pad_token`` replaces the folder's own.
    """
    folder = folder or fetch_tokenizer()
    # transformers 5 writes everything into one tokenizer.json.
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise CheckpointError(
            f"{folder} holds no tokenizer (vocab.json, merges.txt): fetch it, or name another with --tokenizer FOLDER."
        )
    with blamed(folder):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.model_max_length = context
    if pad_token:
        tokenizer.pad_token = pad_token
    return tokenizer


def place(module: nn.Module, device: str | torch.device) -> nn.Module:
    """Move to the device; on a GPU, convolution weights become channels last."""
    module = module.to(device)
    return module.to(memory_format=torch.channels_last) if torch.device(device).type == "cuda" else module


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    prediction: str | None = None,
    tokenizer: str | Path | None = None,
    ema: bool = False,
    variant: str | None = None,
) -> StableDiffusion:
    """Load a Stable Diffusion 1.x or 2.x.

    Args:
        path: a folder in the official layout, a single .safetensors or .ckpt file, or a hub id.
        dtype: of all weights; other dtypes are cast.  device: where they go.
        prediction: "eps" or "v", overriding what the folder's scheduler says or a single file implies.
        tokenizer: a folder with vocab.json and merges.txt, overriding the model's own.
        ema: load the UNet's EMA weights, which some single files hold.
        variant: which weights of a folder or hub id to load, for example "fp16".

    Raises:
        CheckpointError: names the file, what is wrong with it and what to do.
        ValueError: the device is not available here. (A CheckpointError is a ValueError too.)
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'The device "{device}" is not available here: {str(error).splitlines()[0]}') from error
    parts = read_checkpoint(path, dtype, prediction=prediction, ema=ema, variant=variant)
    folder = Path(tokenizer) if tokenizer else parts.tokenizer_folder
    context = parts.text_encoder.config.max_position_embeddings
    return StableDiffusion(
        unet=place(parts.unet, device),
        vae=place(parts.vae, device),
        text_encoder=place(parts.text_encoder, device),
        schedule=Schedule.from_config(parts.schedule),
        read_tokenizer=partial(read_tokenizer, folder, context, parts.pad_token),
        path=parts.path,
    )
