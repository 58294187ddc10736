"""The folder layout's weights: which files hold them, and the names that older ones use."""

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel

from minidistill.files import CheckpointError, blamed
from minidistill.layout import read_json
from minidistill.stored import StoredTensor
from minidistill.tensor_files import read_tensors

# Each network's folder, and how its files of weights begin.
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def candidates(stem: str, variant: str | None) -> Iterator[str]:
    """The names that a network's weights may have, the best first; of a variant ("fp16") only that one's.

    Without one, fp16 is the last resort. Sharded weights go by the name of their index.
    """
    for infix in [f".{variant}"] if variant else ["", ".fp16"]:
        for suffix in ("safetensors", "bin"):
            name = "pytorch_model" if (stem, suffix) == ("model", "bin") else stem
            yield f"{name}{infix}.{suffix}"
            yield f"{name}.{suffix}.index{infix}.json"


def find_weights(folder: Path, stem: str, variant: str | None = None) -> Path | None:
    """The file of weights, or the index of its shards."""
    return next((folder / name for name in candidates(stem, variant) if (folder / name).exists()), None)


def read_weights(folder: Path, stem: str, variant: str | None = None) -> tuple[dict[str, StoredTensor], Path]:
    """The tensors of one network's folder, and the file (or index) that was read. Raises CheckpointError."""
    file = find_weights(folder, stem, variant)
    if file is None:
        raise CheckpointError(
            f"{folder} holds no {next(candidates(stem, variant))} (nor .bin, nor shards with an index): "
            + ("fetch it, or leave --variant out." if variant else "fetch the model's weights.")
        )
    return read_shards(file) if file.suffix == ".json" else read_tensors(file)[0], file


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


def read_text_config(file: Path) -> CLIPTextConfig:
    found = read_json(file)
    with blamed(file):
        config = CLIPTextConfig.from_dict(found)
        sizes = (config.vocab_size, config.hidden_size, config.intermediate_size, config.max_position_embeddings)
        # Beyond these it is no CLIP, and would be modules without end.
        if config.model_type != "clip_text_model" or not 1 <= config.num_hidden_layers <= 64 or min(sizes) < 1:
            raise CheckpointError(f"{file} does not describe the CLIP text encoder of SD 1.x or 2.x.")
        return config


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
