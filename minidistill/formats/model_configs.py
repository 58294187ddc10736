"""The official folder layout: the JSON files in which Stable Diffusion says what it is, read and written."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from minidistill.config import ScheduleConfig, UNetConfig, VAEConfig
from minidistill.formats.files import CheckpointError, blamed, written_whole

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


JSON_LIMIT = 2**20  # bytes; parsed, they may take thirty times as much, and those of models are far smaller


def read_json(file: Path) -> dict:
    if file.exists() and file.stat().st_size > JSON_LIMIT:
        raise CheckpointError(f"{file} is far too long for what it should say: fetch it again.")
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: fetch the whole model folder.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable JSON ({error}): fetch it again.") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{file} is not the JSON of a configuration: fetch it again.")
    return contents


def write_json(path: Path, contents: dict) -> None:
    with written_whole(path) as beside:
        beside.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


# What SD 1.x and 2.x leave at its default; another value means a network this one is not.
UNET_FIXED = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
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
    "mid_block_only_cross_attention": False,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "resnet_out_scale_factor": 1,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
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


# What else has this layout.
OTHERS = {
    "SDXL": {"addition_embed_type": "text_time"},
    "an inpainting model": {"in_channels": 9},
    "InstructPix2Pix": {"in_channels": 8},
    "an upscaling model": {"in_channels": 7},
    "a depth-to-image model": {"in_channels": 5},
}


def is_fixed(given: object, value: object) -> bool:
    """Whether a file says ``value``: once, of every level, or null for no."""
    if isinstance(given, list):
        return all(one == value for one in given)
    return given == value or (given is None and value is False)


def refuse_others(found: dict, fixed: dict, file: Path) -> None:
    others = [
        f"{name} is {str(found[name])[:100]}, not {value!r}"
        for name, value in fixed.items()
        if not is_fixed(found.get(name, value), value)
    ]
    if others:
        kind = next((kind for kind, sign in OTHERS.items() if sign.items() <= found.items()), "another model")
        raise CheckpointError(f"{file} describes {kind}; SD 1.x and 2.x are read here: {'; '.join(others)}.")


Config = TypeVar("Config", UNetConfig, VAEConfig, ScheduleConfig)
MOST = {"layers": 4, "depth": 10, "mid_depth": 10}  # of these, a large number would be modules without end
LEAST = {"depth": 0}


def plausible(value: object, like: object, least: int = 1, most: int = 2**16) -> bool:
    """Whether a value is of the kind that ``like`` is, whole numbers (of a tuple each) from ``least`` to ``most``."""
    if isinstance(like, tuple):
        several = isinstance(value, tuple) and 0 < len(value) <= 8
        return several and all(plausible(v, like[0], least, most) for v in value)
    if isinstance(like, float):
        return type(value) in (int, float) and math.isfinite(value) and value > 0
    return type(value) is type(like) and (type(like) is not int or least <= value <= most)


def checked(config: Config, file: Path) -> Config:
    """The configuration, if its values are of the right kind and of a size that a network can have."""
    for field in fields(config):
        value = getattr(config, field.name)
        if not plausible(value, field.default, LEAST.get(field.name, 1), MOST.get(field.name, 2**16)):
            raise CheckpointError(f"{file} is damaged: {value!r} cannot be its {field.name}. Fetch it again.")
    return config


def per_level(value: int | list[int], levels: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else (value,) * levels


def mirrored(down_blocks: list[str]) -> list[str]:
    """The blocks on the way up, given those on the way down."""
    return [name.replace("Down", "Up") for name in reversed(down_blocks)]


def read_unet_config(file: Path) -> UNetConfig:
    """Keys that a file leaves out have the published layout's defaults."""
    found = read_json(file)
    with blamed(file):
        refuse_others(found, UNET_FIXED, file)
        widths = tuple(found.get("block_out_channels", (320, 640, 1280, 1280)))
        blocks = found.get("down_block_types", ["CrossAttnDownBlock2D"] * (len(widths) - 1) + ["DownBlock2D"])
        up_blocks = found.get("up_block_types", mirrored(blocks))
        if not set(blocks) <= {"CrossAttnDownBlock2D", "DownBlock2D"} or up_blocks != mirrored(blocks):
            raise CheckpointError(f"{file} asks for blocks that SD 1.x and 2.x have not: {blocks}, {up_blocks}.")
        side = found.get("sample_size")
        if isinstance(side, list) and side == side[:1] * 2:
            side = side[0]
        written_by = str(found.get("_diffusers_version", "1.0")).split(".")[:2]
        if side == 32 and [int(number) for number in written_by] < [0, 9]:
            side = 64  # early converters wrote 32 for all of SD 1.x; the official pipeline puts 64 in its place too
        depth = per_level(found.get("transformer_layers_per_block", 1), len(widths))
        config = UNetConfig(
            widths=widths,
            layers=found.get("layers_per_block", 2),
            depth=tuple(d if name.startswith("CrossAttn") else 0 for d, name in zip(depth, blocks)),
            mid_depth=depth[-1],
            # The published name says "head_dim", yet the value has always been the number of heads.
            heads=per_level(found.get("num_attention_heads") or found.get("attention_head_dim", 8), len(widths)),
            context_width=found.get("cross_attention_dim", 1280),
            linear_projection=found.get("use_linear_projection", False),
            upcast_attention=found.get("upcast_attention") or False,  # of converted checkpoints it is null
            groups=found.get("norm_num_groups", 32),
            sample_size=64 if side is None else side,
        )
        return checked(config, file)


def published_unet(config: UNetConfig) -> dict:
    """The inverse of ``read_unet_config``, for the one transformer layer a block that SD 1.x and 2.x have."""
    blocks = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depth]
    return {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": list(config.heads),  # the published name of the number of heads
        "block_out_channels": list(config.widths),
        "cross_attention_dim": config.context_width,
        "down_block_types": blocks,
        "in_channels": config.in_channels,
        "layers_per_block": config.layers,
        "norm_num_groups": config.groups,
        "out_channels": config.out_channels,
        "sample_size": config.sample_size,
        "up_block_types": mirrored(blocks),
        "upcast_attention": config.upcast_attention,
        "use_linear_projection": config.linear_projection,
    }


def read_vae_config(file: Path) -> VAEConfig:
    found = read_json(file)
    with blamed(file):
        refuse_others(found, VAE_FIXED, file)
        config = VAEConfig(
            latent_channels=found.get("latent_channels", 4),
            widths=tuple(found.get("block_out_channels", (128, 256, 512, 512))),
            layers=found.get("layers_per_block", 2),
            groups=found.get("norm_num_groups", 32),
            scaling_factor=found.get("scaling_factor", 0.18215),
        )
        return checked(config, file)


def published_vae(config: VAEConfig, side: int) -> dict:
    """The inverse of ``read_vae_config``; ``side`` is that of the pictures it was trained on, in pixels."""
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": list(config.widths),
        "down_block_types": ["DownEncoderBlock2D"] * len(config.widths),
        "in_channels": config.image_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers,
        "norm_num_groups": config.groups,
        "out_channels": config.image_channels,
        "sample_size": side,
        "scaling_factor": config.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * len(config.widths),
    }


PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}  # published name: ours


def read_schedule_config(file: Path, prediction: str | None) -> ScheduleConfig:
    """Betas and parameterisation, whichever sampler the file names. What it leaves out has that sampler's default."""
    found = read_json(file)
    with blamed(file):
        refuse_others(found, SCHEDULE_FIXED, file)
        kind = found.get("_class_name")
        if kind in ("DDIMScheduler", "PNDMScheduler"):  # others have spacings of their own, and are DDIM here
            refuse_others(found, {"timestep_spacing": "leading"}, file)
        published = found.get("prediction_type", "epsilon")
        if published not in list(PREDICTIONS):  # a list, for this may be anything
            raise CheckpointError(f'{file}: prediction_type is "{published}"; known are {", ".join(PREDICTIONS)}.')
        config = ScheduleConfig(
            train_steps=found.get("num_train_timesteps", 1000),
            beta_start=found.get("beta_start", 0.0001),
            beta_end=found.get("beta_end", 0.02),
            beta_schedule=found.get("beta_schedule", "linear"),
            prediction=prediction or PREDICTIONS[published],
            steps_offset=1,  # in a Stable Diffusion the official pipeline puts this in place of any other
            set_alpha_to_one=found.get("set_alpha_to_one", kind == "DDIMScheduler"),
        )
        if config.beta_schedule not in ("scaled_linear", "linear"):
            raise CheckpointError(
                f'{file}: beta_schedule is "{config.beta_schedule}"; known are scaled_linear, linear.'
            )
        config = checked(config, file)
        if max(config.beta_start, config.beta_end) >= 1:
            raise CheckpointError(f"{file} is damaged: its betas are to lie between 0 and 1. Fetch it again.")
        return config


def published_schedule(config: ScheduleConfig) -> dict:
    """The inverse of ``read_schedule_config``."""
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "beta_start": config.beta_start,
        "clip_sample": False,
        "num_train_timesteps": config.train_steps,
        "prediction_type": next(published for published, ours in PREDICTIONS.items() if ours == config.prediction),
        "set_alpha_to_one": config.set_alpha_to_one,
        "steps_offset": config.steps_offset,
        "timestep_spacing": "leading",
    }
