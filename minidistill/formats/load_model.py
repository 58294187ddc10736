"""Load a Stable Diffusion from a folder, a single file or the hub. Every tensor must be there and fit."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from minidistill.formats.files import CheckpointError, reading, user_path
from minidistill.formats.float8 import to_float8
from minidistill.formats.hub import fetch_tokenizer, find_model
from minidistill.formats.model_configs import Description, Network
from minidistill.formats.model_folder import read_model_folder
from minidistill.formats.single_file import read_single_file
from minidistill.formats.tensor_files import check_finite, convert, is_finite, release_pages
from minidistill.pipeline import StableDiffusion
from minidistill.schedule import Schedule
from minidistill.text import TwoTextEncoders
from minidistill.unet import UNet
from minidistill.vae import VAE

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    prediction: str | None = None,
    tokenizer: str | Path | None = None,
    ema: bool = False,
    variant: str | None = None,
    height: int | None = None,
    width: int | None = None,
    weights: str | None = None,
) -> StableDiffusion:
    """Load a Stable Diffusion 1.x, 2.x or XL.

    Args:
        path: a folder in the official layout, a single .safetensors or .ckpt file, or a hub id.
        dtype: the dtype of all weights. In float16 the VAE of SDXL overflows, and is loaded in float32.
        device: where they go.
        prediction: "eps" or "v", overriding what the folder's scheduler says or a single file implies.
        tokenizer: a folder with vocab.json and merges.txt, overriding the model's own.
        ema: load the UNet's EMA weights, which some single files hold.
        variant: which weights of a folder or hub id to load, for example "fp16".
        height, width: of images, in pixels; by default the size that the model was trained on.
        weights: "float8" keeps W of the UNet's linear layers and convolutions in 8 bits, and computes in ``dtype``.

    Raises:
        CheckpointError: names the file, what is wrong with it and what to do.
        ValueError: the device is not available here, or an image of that size is not a whole number of latents. (A
            CheckpointError is a ValueError too.)
    """
    require_device(device)
    if weights not in (None, "float8"):
        raise ValueError(f'weights={weights!r}: "float8", or None for the dtype.')
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: torch.float16, torch.bfloat16, torch.float32 or torch.float64.")
    path = find_model(path, variant, ema)
    is_folder = path.is_dir()
    model = read_model_folder(path, prediction, variant) if is_folder else read_single_file(path, prediction, ema)
    check_parts(model, path)
    schedule = noise_schedule(model, path)
    unet, vae, *texts = parts(model)
    unet = build(*unet, dtype, to_float8 if weights else None)
    overflows = model.is_xl and dtype == torch.float16
    vae = build(*vae, torch.float32 if overflows else dtype)
    encoders = [build(*text, dtype) for text in texts]
    text_encoder = TwoTextEncoders(*encoders) if model.is_xl else encoders[0]
    fill_positions(text_encoder)
    folder = path / "tokenizer" if is_folder else None
    if tokenizer:
        folder = user_path(tokenizer)
    fewest_words = min(model.text_configs, key=lambda text: text.vocab_size)  # SDXL's two encoders read the same ids
    return StableDiffusion(
        unet=place(unet, device),
        vae=place(vae, device),
        text_encoder=place(text_encoder, device),
        schedule=schedule,
        read_tokenizer=partial(read_tokenizer, folder, fewest_words, model.pad_token),
        path=path,
        height=height,
        width=width,
        force_zeros=model.force_zeros,
        learned_guidance=model.unet.learned_guidance,
        few_steps=model.unet.few_steps,
    )


def parts(model: Description) -> list[tuple[Callable[[], nn.Module], Network]]:
    """UNet, VAE and each text encoder: what makes the module, and its tensors."""
    encoders = zip((CLIPTextModel, CLIPTextModelWithProjection), model.text_configs, model.texts)
    return [
        (partial(UNet, model.unet_config), model.unet),
        (partial(VAE, model.vae_config), model.vae),
        *((partial(encoder, config), text) for encoder, config, text in encoders),
    ]


def noise_schedule(model: Description, path: Path) -> Schedule:
    """The model's noise levels. Raises CheckpointError for levels that its prediction does not allow."""
    try:
        return Schedule.from_config(model.schedule)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def check_model(model: Description, path: Path) -> None:
    """Raise CheckpointError, as ``load`` does, if any part is incomplete, does not fit its configuration or has NaN."""
    noise_schedule(model, path)
    for make, network in parts(model):
        check(skeleton(make, network.file), network)
        for name, tensor in network.tensors.items():
            check_finite({network.name_in_file(name): tensor}, network.file)
            release_pages(tensor)


def check_parts(model: Description, path: Path) -> None:
    """Raise CheckpointError if parts that are whole by themselves come from different models."""
    unet, texts = model.unet_config, model.text_configs
    for part, gives, reads in (
        ("text encoder gives embeddings", sum(text.hidden_size for text in texts), unet.context_width),
        ("text encoder gives pooled vectors", texts[1].projection_dim if model.is_xl else 0, unet.pooled_width),
        ("VAE gives latents", model.vae_config.latent_channels, unet.in_channels),
    ):
        if gives != reads:
            raise CheckpointError(
                f"{path} has parts of different models: its {part} of width {gives}, and its UNet reads {reads}. Use a "
                "UNet, text encoder and VAE that belong together."
            )


def build(
    make: Callable[[], nn.Module],
    network: Network,
    dtype: torch.dtype,
    quantize: Callable[[str, Tensor], Tensor] | None = None,
) -> nn.Module:
    """The frozen module that ``make`` returns, with the network's tensors as its parameters.

    It is made without memory of its own, so weights that need no conversion stay mapped from the file.
    ``quantize(name, tensor)`` replaces each. Raises CheckpointError that lists every missing, unexpected and misshapen
    tensor.
    """
    module = skeleton(make, network.file)
    check(module, network)
    with reading(network.file):
        weights = {}
        for name, tensor in network.tensors.items():
            weight = convert(tensor, dtype)
            if not is_finite(weight):
                original, kind = network.name_in_file(name), str(dtype).removeprefix("torch.")
                check_finite({original: tensor.float()}, network.file)
                raise CheckpointError(
                    f"{network.file} has values in {original} that {kind} cannot hold: load it in float32 or bfloat16."
                )
            weights[name] = quantize(name, weight) if quantize else weight
            release_pages(weight)
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)


def skeleton(make: Callable[[], nn.Module], file: Path) -> nn.Module:
    """The module that ``make`` returns, on the meta device. Raises CheckpointError for an impossible configuration."""
    try:
        with torch.device("meta"):
            return make()
    except Exception as error:  # the configuration comes from a file, and may ask for anything
        raise CheckpointError(
            f"{file} comes with a configuration that no network can have ({error}): fetch it again."
        ) from error


def check(module: nn.Module, network: Network) -> None:
    """Raise CheckpointError that lists every tensor, by the file's own name, that does not fit the module."""
    expected, tensors, original = module.state_dict(), network.tensors, network.name_in_file
    problems = [f"missing: {original(name)} {list(expected[name].shape)}" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"unexpected: {original(name)} {list(tensor.shape)}")
        elif tensor.shape != (shape := expected[name].shape):
            problems.append(f"misshapen: {original(name)} is {list(tensor.shape)}, should be {list(shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"not floating point: {original(name)} holds {str(tensor.dtype).removeprefix('torch.')}")
    if problems:
        raise CheckpointError(
            f"{network.file} does not fit its configuration ({len(problems)} tensors):\n  "
            + "\n  ".join(problems)
            + "\nIt is damaged, or another kind of model: fetch it again, or use an SD 1.x, 2.x or XL."
        )


def fill_positions(encoder: nn.Module) -> None:
    """Fill the one buffer that no checkpoint holds, positions 0, 1, 2, ..., of an encoder made on the meta device."""
    for module in encoder.modules():
        if "position_ids" in module._buffers:
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]


def read_tokenizer(folder: Path | None, encoder: CLIPTextConfig, pad_token: str | None = None) -> CLIPTokenizer:
    """The tokenizer in ``folder``, or CLIP's from the hub, for a text ``encoder``.

    Raises CheckpointError for a folder without a tokenizer, for one that lacks merges, for one with more words than the
    encoder has embeddings of, and for a learned word of several embeddings. ``pad_token`` replaces the folder's own.
    """
    folder = folder or fetch_tokenizer()
    # transformers 5 writes everything into one tokenizer.json.
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise CheckpointError(
            f"{folder} holds no tokenizer (vocab.json, merges.txt): fetch it, or name another with --tokenizer FOLDER."
        )
    with reading(folder):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    added = tokenizer.get_added_vocab()
    # Every word is a byte, or two that merge, or added whole. A merges.txt that was cut off still reads.
    whole = {"".join(pair) for pair in bpe["merges"]} | added.keys()
    if lost := [word for word in bpe["vocab"] if len(word.removesuffix("</w>")) > 1 and word not in whole]:
        raise CheckpointError(f'{folder} is damaged (no merge makes the token "{lost[0]}"): fetch it again.')
    if len(tokenizer) > encoder.vocab_size:
        raise CheckpointError(
            f"{folder} and the text encoder are of different models: the tokenizer has {len(tokenizer)} tokens, and "
            f"the encoder knows {encoder.vocab_size}. Name the tokenizer that belongs to it with --tokenizer FOLDER."
        )
    if several := next((word for word in added if f"{word}_1" in added), None):  # diffusers writes it out in prompts
        raise CheckpointError(
            f'{folder} has a learned word of several embeddings ("{several}", "{several}_1", ...), which minidistill '
            "does not read: name a tokenizer without it with --tokenizer FOLDER."
        )
    tokenizer.model_max_length = encoder.max_position_embeddings
    if pad_token:
        tokenizer.pad_token = pad_token
    return tokenizer


def require_device(device: str | torch.device) -> None:
    """Raise ValueError for a device that PyTorch does not know, or that this machine lacks."""
    try:
        torch.zeros(1, device=device).item()  # "meta" exists, but nothing can be read from it
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'The device "{device}" is not available here: {str(error).splitlines()[0]}') from error


def place(module: nn.Module, device: str | torch.device) -> nn.Module:
    """Move to the device; on a GPU, convolution weights become channels last."""
    module = module.to(device)
    return module.to(memory_format=torch.channels_last) if torch.device(device).type == "cuda" else module
