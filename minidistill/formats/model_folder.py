"""A whole Stable Diffusion in the folder layout: which files hold the weights, and the names that older ones use."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import CLIPTextConfig, CLIPTextModel

from minidistill.config import ScheduleConfig, UNetConfig, VAEConfig
from minidistill.formats.files import CheckpointError, blamed
from minidistill.formats.model_configs import (
    plausible,
    read_json,
    read_schedule_config,
    read_unet_config,
    read_vae_config,
)
from minidistill.formats.stored import StoredTensor
from minidistill.formats.tensor_files import read_tensors

# Each network's folder, and how its files of weights begin.
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


class Weights(NamedTuple):
    """One network's tensors, and the file (or the index of several) that holds them."""

    tensors: dict[str, StoredTensor]
    file: Path


@dataclass(frozen=True)
class ModelFolder:
    unet_config: UNetConfig
    vae_config: VAEConfig
    text_config: CLIPTextConfig
    schedule: ScheduleConfig
    unet: Weights
    vae: Weights
    text: Weights


def read_model_folder(folder: Path, prediction: str | None = None, variant: str | None = None) -> ModelFolder:
    """Describe ``unet/``, ``vae/``, ``text_encoder/`` and ``scheduler/``, with all tensors under our names.

    ``prediction`` and ``variant`` are those of :func:`minidistill.formats.checkpoint.read_checkpoint`. Raises CheckpointError.
    """
    refuse_other_pipelines(folder)
    missing = [part for part in (*STEMS, "scheduler") if not (folder / part).is_dir()]
    if missing:
        raise CheckpointError(
            f"{folder} is not a complete Stable Diffusion folder: it has no {', '.join(missing)}. {meant(folder)}"
        )
    unet_config = read_unet_config(folder / "unet/config.json")
    vae_config = read_vae_config(folder / "vae/config.json")
    text_config = read_text_config(folder / "text_encoder/config.json")
    schedule = read_schedule_config(folder / "scheduler/scheduler_config.json", prediction)
    unet, vae, text = (read_weights(folder / part, stem, variant) for part, stem in STEMS.items())
    vae = Weights(rename_old_attention(vae.tensors), vae.file)
    text = Weights(match_text_names(text.tensors), text.file)
    return ModelFolder(unet_config, vae_config, text_config, schedule, unet, vae, text)


def meant(folder: Path) -> str:
    """What to name in place of a folder that is none of Stable Diffusion's."""
    if (folder.parent / "unet").is_dir():
        return f"Name the whole folder, {folder.parent}."
    if inner := sorted(folder.glob("*/model_index.json")):
        return f"Name the folder in it, {inner[0].parent}."
    if files := sorted([*folder.glob("*.safetensors"), *folder.glob("*.ckpt")]):
        return f"If you mean a single file in it, name that: {files[0]}."
    return "It should hold unet, vae, text_encoder, tokenizer and scheduler, as published."


def refuse_other_pipelines(folder: Path) -> None:
    """Raises CheckpointError that names a pipeline without a UNet, such as those of SD 3 and Flux."""
    index = folder / "model_index.json"
    if index.exists() and "unet" not in (found := read_json(index)):
        kind = str(found.get("_class_name"))[:100]
        raise CheckpointError(f"{folder} is a {kind}, without a UNet: SD 1.x and 2.x are read here.")


def candidates(stem: str, variant: str | None) -> Iterator[str]:
    """The names that a network's weights may have, the best first. Sharded weights go by the name of their index."""
    infix = f".{variant}" if variant else ""
    for suffix in ("safetensors", "bin"):
        name = "pytorch_model" if (stem, suffix) == ("model", "bin") else stem
        yield f"{name}{infix}.{suffix}"
        yield f"{name}.{suffix}.index{infix}.json"


def find_weights(folder: Path, stem: str, variant: str | None) -> Path | None:
    """The file of weights, or the index of its shards."""
    return next((folder / name for name in candidates(stem, variant) if (folder / name).exists()), None)


def read_weights(folder: Path, stem: str, variant: str | None = None) -> Weights:
    """One network's folder, with the names it has there. Raises CheckpointError.

    Of a ``variant`` ("fp16") only those; without one, fp16 is the last resort.
    """
    file = find_weights(folder, stem, variant) or (None if variant else find_weights(folder, stem, "fp16"))
    if file is None:
        raise CheckpointError(
            f"{folder} holds no {next(candidates(stem, variant))} (nor .bin, nor shards with an index): "
            + ("fetch it, or leave --variant out." if variant else "fetch the model's weights.")
        )
    return Weights(read_shards(file) if file.suffix == ".json" else read_tensors(file)[0], file)


def read_shards(index: Path) -> dict[str, StoredTensor]:
    """The tensors of all the files that an index names, which are to lie beside it."""
    with blamed(index):
        places = read_json(index)["weight_map"]
        shards = {}
        for name in sorted(set(places.values())):
            if name != Path(name).name or "\\" in name:
                raise CheckpointError(f'{index} names "{name}", which is not a file beside it: do not use this model.')
            shards[name] = read_tensors(index.with_name(name))[0]
        return {tensor: shards[name][tensor] for tensor, name in places.items()}


# What there is to say of a CLIP text encoder, and how large it may be. (Transformers would take anything else that a
# file says too, up to the name of code to fetch and run.)
TEXT_SIZES = {
    "vocab_size": 2**16,
    "hidden_size": 2**16,
    "intermediate_size": 2**16,
    "projection_dim": 2**16,
    "num_hidden_layers": 64,
    "num_attention_heads": 2**16,
    "max_position_embeddings": 2**16,
}
TEXT_OTHERS = ("hidden_act", "layer_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id")


def read_text_config(file: Path) -> CLIPTextConfig:
    found = read_json(file)
    with blamed(file):
        if found.get("model_type", "clip_text_model") != "clip_text_model":
            raise CheckpointError(f"{file} does not describe the CLIP text encoder of SD 1.x or 2.x.")
        known = {name: found[name] for name in (*TEXT_SIZES, *TEXT_OTHERS) if found.get(name) is not None}
        usual = CLIPTextConfig()
        for name, value in known.items():
            least = 1 if name in TEXT_SIZES else 0
            if not plausible(value, getattr(usual, name), least, TEXT_SIZES.get(name, 2**16)):
                raise CheckpointError(f"{file} is damaged: {value!r} cannot be its {name}. Fetch it again.")
        return CLIPTextConfig(**known, attn_implementation="sdpa")


OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename_old_attention(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The VAE's attention under its present names; older files have others, and 1x1 convolutions for linears."""
    renamed = {}
    for name, tensor in tensors.items():
        if ".attentions.0." in name:
            for old, new in OLD_ATTENTION.items():
                name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
            tensor = tensor.without_kernel()
        renamed[name] = tensor
    return renamed


def match_text_names(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The text encoder's tensors under the names this version of transformers uses: with or without ``text_model.``."""
    with torch.device("meta"):
        any_encoder = CLIPTextModel(CLIPTextConfig(num_hidden_layers=1))
    prefixed = next(iter(any_encoder.state_dict())).startswith("text_model.")
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    bare.pop("embeddings.position_ids", None)  # older files hold it; it is only 0, 1, 2, ...
    return {f"text_model.{name}": tensor for name, tensor in bare.items()} if prefixed else bare
