"""The official folder layout: weights in half precision, and the JSON files that say what they are."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from minidistill.config import ScheduleConfig, UNetConfig, VAEConfig
from minidistill.files import written_whole

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


def write_json(path: Path, contents: dict) -> None:
    with written_whole(path) as beside:
        beside.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def write_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    with written_whole(path) as beside:
        save_file({name: x.half().contiguous() for name, x in tensors.items()}, beside, {"format": "pt"})


def write_unet(folder: Path, config: UNetConfig, tensors: dict[str, Tensor]) -> None:
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depth]
    published = {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": list(config.heads),  # the published name of the number of heads
        "block_out_channels": list(config.widths),
        "cross_attention_dim": config.context_width,
        "down_block_types": down,
        "in_channels": config.in_channels,
        "layers_per_block": config.layers,
        "norm_num_groups": config.groups,
        "out_channels": config.out_channels,
        "sample_size": config.sample_size,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
    }
    write_json(folder / "config.json", published)
    write_weights(folder / "diffusion_pytorch_model.safetensors", tensors)


def write_vae(folder: Path, config: VAEConfig, side: int, tensors: dict[str, Tensor]) -> None:
    published = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": list(config.widths),
        "down_block_types": ["DownEncoderBlock2D"] * len(config.widths),
        "in_channels": config.picture_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers,
        "norm_num_groups": config.groups,
        "out_channels": config.picture_channels,
        "sample_size": side,
        "scaling_factor": config.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * len(config.widths),
    }
    write_json(folder / "config.json", published)
    write_weights(folder / "diffusion_pytorch_model.safetensors", tensors)


def write_scheduler(folder: Path, config: ScheduleConfig) -> None:
    published = {
        "_class_name": "DDIMScheduler",
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "beta_start": config.beta_start,
        "clip_sample": False,
        "num_train_timesteps": config.train_steps,
        "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[config.prediction],
        "set_alpha_to_one": config.set_alpha_to_one,
        "steps_offset": config.steps_offset,
        "timestep_spacing": "leading",
    }
    write_json(folder / "scheduler_config.json", published)
