"""A Stable Diffusion in the official folder layout: where its weights are, and the names that older files use."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from transformers import CLIPTextConfig

from minidistill.formats.files import CheckpointError, read_json, reading
from minidistill.formats.model_configs import (
    Description,
    Network,
    read_schedule_config,
    read_text_config,
    read_unet_config,
    read_vae_config,
)
from minidistill.formats.tensor_files import read_tensors

# The folder of each network, and how the names of its weight files begin.
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
XL_STEMS = STEMS | {"text_encoder_2": "model"}


def stems(folder: Path) -> dict[str, str]:
    """``STEMS`` of the model in ``folder``: SDXL has a second text encoder."""
    is_xl = "text_encoder_2" in read_index(folder) or (folder / "text_encoder_2").is_dir()
    return XL_STEMS if is_xl else STEMS


def read_index(folder: Path) -> dict:
    """The contents of ``model_index.json``, which names the parts; empty if the folder has none."""
    index = folder / "model_index.json"
    return read_json(index) if index.exists() else {}


def read_model_folder(folder: Path, prediction: str | None = None, variant: str | None = None) -> Description:
    """Describe the model in ``unet/``, ``vae/``, ``text_encoder/`` and ``scheduler/``. Raises CheckpointError."""
    refuse_other_pipelines(folder)
    parts = stems(folder)
    missing = [part for part in (*parts, "scheduler") if not (folder / part).is_dir()]
    if missing:
        raise CheckpointError(
            f"{folder} is not a complete Stable Diffusion folder: it has no {', '.join(missing)}. {advice(folder)}"
        )
    xl = parts is XL_STEMS
    unet_config = read_unet_config(folder / "unet/config.json")
    vae_config = read_vae_config(folder / "vae/config.json")
    text_configs = [read_text_config(folder / part / "config.json") for part in parts if "text" in part]
    schedule = read_schedule_config(folder / "scheduler/scheduler_config.json", prediction, xl)
    require_variant(folder, variant)
    unet, vae, *texts = (read_weights(folder / part, stem, variant) for part, stem in parts.items())
    vae = vae._replace(tensors=rename_old_attention(vae.tensors))
    texts = [text._replace(tensors=match_text_names(text.tensors, projects=i > 0)) for i, text in enumerate(texts)]
    texts[0] = texts[0]._replace(tensors=skip_last_layers(texts[0].tensors, text_configs[0], texts[0].file))
    pad_token = "<|endoftext|>" if xl else None
    force_zeros = xl and bool(read_index(folder).get("force_zeros_for_empty_prompt", True))
    return Description(unet_config, vae_config, text_configs, schedule, unet, vae, texts, pad_token, force_zeros)


def refuse_other_schedules(folder: Path) -> None:
    """Raise CheckpointError that names a model of few steps, of flow matching, or with noise levels of its own."""
    file = folder / "scheduler/scheduler_config.json"
    schedule = read_json(file) if file.exists() else {}
    kind = str(schedule.get("_class_name"))
    if kind.startswith("EDM"):
        raise CheckpointError(f"{folder} is Playground 2.5, whose noise levels minidistill does not have: use SDXL.")
    if kind.startswith("FlowMatch") or schedule.get("use_flow_sigmas"):
        raise CheckpointError(f"{file} belongs to a model of flow matching: use one that predicts eps or v.")
    if kind.startswith(("LCM", "TCD")) or (
        schedule.get("timestep_spacing") == "trailing" and not schedule.get("rescale_betas_zero_snr")
    ):
        raise CheckpointError(
            f"{file} belongs to a model that takes a few steps without guidance, like Turbo and Lightning: there is "
            "nothing to distil. Use the model that it was made from."
        )


def refuse_other_padding(folder: Path) -> None:
    """Raise CheckpointError if SDXL's second tokenizer says that it pads with anything but "!"."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # older folders have both, and the second counts
        file = folder / "tokenizer_2" / name
        pad = read_json(file).get("pad_token") if file.exists() else None
        pad = pad.get("content") if isinstance(pad, dict) else pad
        if pad not in (None, "!"):
            raise CheckpointError(f'{file} pads with {pad}, but minidistill pads with "!", as SDXL: fetch it again.')


def advice(folder: Path) -> str:
    """What to name instead of a folder that is not a Stable Diffusion."""
    if (folder.parent / "unet").is_dir():
        return f"Name the whole folder, {folder.parent}."
    if inner := sorted([*folder.glob("*/model_index.json"), *folder.glob("*/unet")]):
        return f"Name the folder in it, {inner[0].parent}."
    if files := sorted([*folder.glob("*.safetensors"), *folder.glob("*.ckpt")]):
        return f"To load a single file in it, name that file: {files[0]}."
    return "It should hold unet, vae, text_encoder, tokenizer and scheduler, as published."


def refuse_other_pipelines(folder: Path) -> None:
    """Raise CheckpointError that names a pipeline without a UNet, such as SD 3 or Flux, or the refiner of SDXL."""
    contents = read_index(folder)
    if contents and "unet" not in contents:
        kind = str(contents.get("_class_name"))[:100]
        raise CheckpointError(f"{folder} is a {kind}, without a UNet: minidistill reads SD 1.x, 2.x and XL.")
    if contents.get("requires_aesthetics_score"):
        raise CheckpointError(f"{folder} is the SDXL refiner, which only finishes images: name SDXL itself.")
    refuse_other_schedules(folder)
    if stems(folder) is XL_STEMS:
        refuse_other_padding(folder)


def candidates(stem: str, variant: str | None) -> Iterator[str]:
    """The names that a network's weights can have, best first. Sharded weights are found by their index."""
    infix = f".{variant}" if variant else ""
    for suffix in ("safetensors", "bin"):
        name = "pytorch_model" if (stem, suffix) == ("model", "bin") else stem
        yield f"{name}{infix}.{suffix}"
        yield f"{name}.{suffix}.index{infix}.json"


def find_weights(folder: Path, stem: str, variant: str | None) -> Path | None:
    """The file of weights, or the index of its shards."""
    return next((folder / name for name in candidates(stem, variant) if (folder / name).exists()), None)


def require_variant(folder: Path, variant: str | None) -> None:
    """Raise CheckpointError unless some network has weights of this variant; often the UNet alone has them."""
    if variant and not any(find_weights(folder / part, stem, variant) for part, stem in stems(folder).items()):
        first = next(candidates(STEMS["unet"], variant))
        raise CheckpointError(f"{folder} has no {first} or other weights of this variant: leave --variant out.")


def read_weights(folder: Path, stem: str, variant: str | None = None) -> Network:
    """One network's tensors, by the names in its folder. Raises CheckpointError.

    Weights of the ``variant`` come first, then those without one, and fp16 is the last resort.
    """
    wanted = find_weights(folder, stem, variant)
    file = wanted or find_weights(folder, stem, None) or find_weights(folder, stem, "fp16")
    if file is None:
        there = sorted(path.name for path in folder.glob("*.safetensors"))
        raise CheckpointError(
            f"{folder} holds no {next(candidates(stem, variant))} (nor .bin, nor shards with an index): "
            + (f"--variant can select others, such as {there[0]}." if there else "fetch the model's weights.")
        )
    if wanted is None and variant:
        warnings.warn(f"{folder} has no weights of variant {variant}: reading {file.name} instead.", stacklevel=2)
    tensors, metadata = {}, {}
    for part in weight_files(file):
        in_part, header = read_tensors(part)
        tensors, metadata = tensors | in_part, metadata | header
    if inside := next((name for name in tensors if LORA_INSIDE.search(name)), None):
        raise CheckpointError(
            f"{file} was saved with a LoRA inside that is not merged ({inside}): merge or unload it where it was made "
            "(fuse_lora, then unload_lora_weights, in diffusers), and save the model again."
        )
    return Network(tensors, file, metadata=metadata)


def weight_files(file: Path) -> list[Path]:
    """The file itself; if it is an index, the shards that it names. They must lie next to it."""
    if file.suffix != ".json":
        return [file]
    with reading(file):
        names = sorted(set(read_json(file)["weight_map"].values()))
        for name in names:
            if name != Path(name).name or "\\" in name:
                raise CheckpointError(f'{file} names "{name}", which is not a file beside it: do not use this model.')
        return [file.with_name(name) for name in names]


PROJECTION = "text_projection.weight"  # of SDXL's second text encoder
LORA_INSIDE = re.compile(r"\.base_layer\.|[._]lora_(A|B|down|up)\.|[._]lora(_layer)?\.(down|up)\.")
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename_old_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The VAE's attention under its present names. Older files use other names, and 1x1 convolutions as linears."""
    renamed = {}
    for name, tensor in tensors.items():
        if ".attentions.0." in name:
            for old, new in OLD_ATTENTION.items():
                name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
            tensor = squeeze_kernel(tensor)
        renamed[name] = tensor
    return renamed


def squeeze_kernel(tensor: Tensor) -> Tensor:
    """A 1x1 convolution [out, in, 1, 1] -> the equivalent matrix [out, in]; anything else unchanged."""
    return tensor[:, :, 0, 0] if tensor.shape[2:] == (1, 1) else tensor


def match_text_names(tensors: dict[str, Tensor], projects: bool = False) -> dict[str, Tensor]:
    """The text encoder's tensors under the names of transformers 5, from files with and without ``text_model.``.

    ``projects``: for CLIPTextModelWithProjection, SDXL's second, which has that prefix and a projection.
    """
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    bare.pop("embeddings.position_ids", None)  # 0, 1, 2, ...: in older files only
    if projects:
        return {name if name == PROJECTION else f"text_model.{name}": tensor for name, tensor in bare.items()}
    others = ("text_projection", "logit_scale", "visual_projection.", "vision_model.")  # some files hold all of a CLIP
    return {name: tensor for name, tensor in bare.items() if not name.startswith(others)}


def skip_last_layers(tensors: dict[str, Tensor], config: CLIPTextConfig, file: Path) -> dict[str, Tensor]:
    """Without the layers that the configuration leaves out. "Clip skip" is often written that way."""
    numbers = {name: re.match(r"encoder\.layers\.(\d+)\.", name) for name in tensors}
    skipped = {name for name, match in numbers.items() if match and int(match[1]) >= config.num_hidden_layers}
    if skipped:
        warnings.warn(
            f"{file} has more layers than its configuration asks for (num_hidden_layers {config.num_hidden_layers}): "
            "leaving out the last.",
            stacklevel=3,
        )
    return {name: tensor for name, tensor in tensors.items() if name not in skipped}
