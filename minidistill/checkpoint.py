"""Official checkpoints in: the folder layout that Stable Diffusion is published in, read strictly."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from minidistill.config import ScheduleConfig, UNetConfig, VAEConfig
from minidistill.text import fill_positions
from minidistill.unet import UNet
from minidistill.vae import VAE


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. Says which file, what is wrong with it, and what to do."""


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


def read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: fetch the whole model folder.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not readable JSON ({error}): fetch it again.") from error


# What SD 1.x and 2.x leave at its default; another value means a network this one is not.
UNET_FIXED = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
}
VAE_FIXED = {
    "act_fn": "silu",
    "in_channels": 3,
    "latents_mean": None,
    "latents_std": None,
    "out_channels": 3,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
SCHEDULE_FIXED = {"rescale_betas_zero_snr": False, "trained_betas": None}


def refuse_others(found: dict, fixed: dict, file: Path) -> None:
    others = [
        f"{name} is {found[name]!r}, not {value!r}" for name, value in fixed.items() if found.get(name, value) != value
    ]
    if others:
        raise CheckpointError(
            f"{file} describes a model other than SD 1.x and 2.x, which are read here: {'; '.join(others)}."
        )


def per_level(value: int | list[int], levels: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else (value,) * levels


def read_unet_config(file: Path) -> UNetConfig:
    """Keys that a file leaves out have the published layout's defaults."""
    found = read_json(file)
    refuse_others(found, UNET_FIXED, file)
    widths = tuple(found.get("block_out_channels", (320, 640, 1280, 1280)))
    blocks = found.get("down_block_types", ["CrossAttnDownBlock2D"] * (len(widths) - 1) + ["DownBlock2D"])
    mirrored = [name.replace("Down", "Up") for name in reversed(blocks)]
    up_blocks = found.get("up_block_types", mirrored)
    if not set(blocks) <= {"CrossAttnDownBlock2D", "DownBlock2D"} or up_blocks != mirrored:
        raise CheckpointError(f"{file} asks for blocks that SD 1.x and 2.x have not: {blocks}, {up_blocks}.")
    depth = per_level(found.get("transformer_layers_per_block", 1), len(widths))
    return UNetConfig(
        widths=widths,
        layers=found.get("layers_per_block", 2),
        depth=tuple(d if name.startswith("CrossAttn") else 0 for d, name in zip(depth, blocks)),
        mid_depth=depth[-1],
        # The published name says "head_dim", yet the value has always been the number of heads.
        heads=per_level(found.get("num_attention_heads") or found.get("attention_head_dim", 8), len(widths)),
        context_width=found.get("cross_attention_dim", 1280),
        linear_projection=found.get("use_linear_projection", False),
        upcast_attention=found.get("upcast_attention", False),
        groups=found.get("norm_num_groups", 32),
        sample_size=found.get("sample_size", 64),
    )


def read_vae_config(file: Path) -> VAEConfig:
    found = read_json(file)
    refuse_others(found, VAE_FIXED, file)
    return VAEConfig(
        latent_channels=found.get("latent_channels", 4),
        widths=tuple(found.get("block_out_channels", (128, 256, 512, 512))),
        layers=found.get("layers_per_block", 2),
        groups=found.get("norm_num_groups", 32),
        scaling_factor=found.get("scaling_factor", 0.18215),
    )


PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}


def read_schedule_config(file: Path, prediction: str | None) -> ScheduleConfig:
    """Betas, parameterisation, offset; whichever sampler the file names. What it leaves out is as SD was trained."""
    found = read_json(file)
    refuse_others(found, SCHEDULE_FIXED, file)
    published = found.get("prediction_type", "epsilon")
    if published not in PREDICTIONS:
        raise CheckpointError(f'{file}: prediction_type is "{published}"; known are {", ".join(PREDICTIONS)}.')
    sd = ScheduleConfig()
    return ScheduleConfig(
        train_steps=found.get("num_train_timesteps", sd.train_steps),
        beta_start=found.get("beta_start", sd.beta_start),
        beta_end=found.get("beta_end", sd.beta_end),
        beta_schedule=found.get("beta_schedule", sd.beta_schedule),
        prediction=prediction or PREDICTIONS[published],
        steps_offset=found.get("steps_offset", sd.steps_offset),
        set_alpha_to_one=found.get("set_alpha_to_one", sd.set_alpha_to_one),
    )


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
