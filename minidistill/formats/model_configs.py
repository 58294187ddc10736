"""What describes a Stable Diffusion: its networks' tensors, and the official layout's JSON files, read and written."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch import Tensor
from transformers import CLIPTextConfig

from minidistill.config import ScheduleConfig, UNetConfig, VAEConfig
from minidistill.formats.files import CheckpointError, read_json, reading


class Network(NamedTuple):
    """The tensors of one network, by our names, and the file (or index of shards) that holds them."""

    tensors: dict[str, Tensor]
    file: Path
    name_in_file: Callable[[str], str] = str  # our name -> the file's
    metadata: Mapping[str, str] = {}  # of a .safetensors file

    @property
    def learned_guidance(self) -> str | None:
        """The guidance scale of a student that was merged into a UNet, as its header says."""
        guidance = self.metadata.get("guidance")
        return guidance if guidance != "1" else None  # 1: merged at strength 0

    @property
    def few_steps(self) -> tuple[int, int] | None:
        """``taught_steps`` of a student that was merged into a UNet; None if it was merged at strength 0."""
        return taught_steps(self.metadata, self.file) if self.learned_guidance else None


def taught_steps(header: Mapping[str, str], file: Path) -> tuple[int, int] | None:
    """The DDIM steps of a student that was taught how many to take, and those of its teacher; else None."""
    if (steps := header.get("student_steps")) is None:
        return None
    with reading(file):
        few = int(steps), int(header.get("teacher_steps", steps))
        if min(few) < 1:
            raise ValueError(f"student_steps {few[0]} and teacher_steps {few[1]} must be at least 1")
        return few


@dataclass(frozen=True)
class Description:
    """What a folder or a single file says about a model. Its tensors are mapped, not read."""

    unet_config: UNetConfig
    vae_config: VAEConfig
    text_configs: list[CLIPTextConfig]  # SDXL has two text encoders
    schedule: ScheduleConfig
    unet: Network
    vae: Network
    texts: list[Network]
    pad_token: str | None  # None: as the tokenizer's own files say
    force_zeros: bool  # with no negative prompt, its embeddings are zeros

    @property
    def is_xl(self) -> bool:
        return len(self.texts) == 2


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

XL_INDEX = MODEL_INDEX | {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}

# What SD 1.x, 2.x and XL leave at these defaults. Any other value means a network that we do not have.
# fmt: off
UNET_FIXED = dict(
    act_fn="silu", attention_type="default", center_input_sample=False, class_embed_type=None,
    conv_in_kernel=3, conv_out_kernel=3, cross_attention_norm=None, downsample_padding=1, dual_cross_attention=False,
    encoder_hid_dim=None, encoder_hid_dim_type=None, flip_sin_to_cos=True, freq_shift=0, in_channels=4,
    mid_block_only_cross_attention=False, mid_block_scale_factor=1, mid_block_type="UNetMidBlock2DCrossAttn",
    norm_eps=1e-5, num_class_embeds=None, only_cross_attention=False, out_channels=4, resnet_out_scale_factor=1,
    resnet_skip_time_act=False, resnet_time_scale_shift="default", reverse_transformer_layers_per_block=None,
    time_cond_proj_dim=None, time_embedding_act_fn=None, time_embedding_type="positional", timestep_post_act=None,
)
VAE_FIXED = dict(
    act_fn="silu", in_channels=3, latents_mean=None, latents_std=None, mid_block_add_attention=True, out_channels=3,
    shift_factor=None, use_post_quant_conv=True, use_quant_conv=True,
)
# fmt: on

# Field of our configuration: its key in the file, and the value of a key that is absent.
Keys = dict[str, tuple[str, object]]
UNET_KEYS: Keys = {
    "widths": ("block_out_channels", (320, 640, 1280, 1280)),
    "layers": ("layers_per_block", 2),
    "heads": ("attention_head_dim", 8),  # it says "head_dim", but the value has always been the number of heads
    "context_width": ("cross_attention_dim", 1280),
    "linear_projection": ("use_linear_projection", False),
    "upcast_attention": ("upcast_attention", False),  # null in converted checkpoints
    "groups": ("norm_num_groups", 32),
    "sample_size": ("sample_size", 64),
}
VAE_KEYS: Keys = {
    "latent_channels": ("latent_channels", 4),
    "widths": ("block_out_channels", (128, 256, 512, 512)),
    "layers": ("layers_per_block", 2),
    "groups": ("norm_num_groups", 32),
    "scaling_factor": ("scaling_factor", 0.18215),
}
SCHEDULE_KEYS: Keys = {
    "train_steps": ("num_train_timesteps", 1000),
    "beta_start": ("beta_start", 0.0001),
    "beta_end": ("beta_end", 0.02),
    "beta_schedule": ("beta_schedule", "linear"),
    "zero_terminal_snr": ("rescale_betas_zero_snr", False),
}


def pick(contents: dict, keys: Keys) -> dict:
    """The fields of our configuration, from the contents of a file. Null counts as absent."""
    values = {}
    for field, (key, default) in keys.items():
        value = default if contents.get(key) is None else contents[key]
        values[field] = tuple(value) if isinstance(value, list) else value
    return values


def publish(config: UNetConfig | VAEConfig | ScheduleConfig, keys: Keys, **others: object) -> dict:
    """The inverse of ``pick``, with ``others`` added."""
    values = {key: getattr(config, field) for field, (key, _) in keys.items()}
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return dict(sorted((values | others).items()))


# Other models, by the channels of their UNet's input.
OTHER_INPUTS = {9: "an inpainting model", 8: "InstructPix2Pix", 7: "an upscaling model", 5: "a depth-to-image model"}


def check_fixed(contents: dict, fixed: dict, file: Path) -> None:
    """Raise CheckpointError that lists every setting of ``contents`` that differs from ``fixed``."""

    def agrees(value: object, expected: object) -> bool:
        if isinstance(value, list):  # one value per level
            return all(one == expected for one in value)
        value = "silu" if value == "swish" else value  # two names of one function
        return value == expected or (value is None and expected is False)

    differing = [
        f"{name} is {str(contents[name])[:100]}, not {expected!r}"
        for name, expected in fixed.items()
        if not agrees(contents.get(name, expected), expected)
    ]
    if differing:
        channels = contents.get("in_channels")
        kind = OTHER_INPUTS.get(channels if isinstance(channels, int) else None, "another model")
        kind = "Playground 2.5" if contents.get("latents_mean") else kind
        raise CheckpointError(
            f"{file} describes {kind}, but minidistill reads SD 1.x, 2.x and XL only: {'; '.join(differing)}."
        )


Config = TypeVar("Config", UNetConfig, VAEConfig, ScheduleConfig)
LARGEST = {"layers": 4, "depth": 10, "mid_depth": 10, "num_hidden_layers": 64}  # more would build modules without end
SMALLEST = dict.fromkeys(("depth", "pooled_width", "bos_token_id", "eos_token_id", "pad_token_id", "steps_offset"), 0)


def is_plausible(value: object, like: object, least: int, most: int) -> bool:
    """True if the value has the type of ``like``, and its integers, also those in a tuple, lie in [least, most]."""
    if isinstance(like, tuple):
        is_levels = isinstance(value, tuple) and 0 < len(value) <= 8
        return is_levels and all(is_plausible(v, like[0], least, most) for v in value)
    if isinstance(like, float):
        return type(value) in (int, float) and math.isfinite(value) and value > 0
    return type(value) is type(like) and (type(like) is not int or least <= value <= most)


def check_values(values: dict, defaults: object, file: Path) -> None:
    """Raise CheckpointError if a value has another type than the default, or an impossible size."""
    for name, value in values.items():
        if not is_plausible(value, getattr(defaults, name), SMALLEST.get(name, 1), LARGEST.get(name, 2**16)):
            raise CheckpointError(f"{file} is damaged: {value!r} cannot be its {name}. Fetch it again.")


def check_config(config: Config, file: Path) -> Config:
    """The configuration itself, after ``check_values``."""
    check_values(vars(config), type(config)(), file)
    return config


def per_level(value: object, levels: int) -> tuple:
    """One value per level, from a list or from one value for all. Raises ValueError for a list of another length."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
    if len(values) != levels:
        raise ValueError(f"{str(value)[:100]} should have {levels} values, one for each of block_out_channels")
    return values


def one_for_all(value: object) -> object:
    """One value instead of a tuple of equal ones; anything else unchanged."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def up_blocks(down_blocks: list[str]) -> list[str]:
    """The types of the blocks on the way up, which mirror those on the way down."""
    return [name.replace("Down", "Up") for name in reversed(down_blocks)]


def read_unet_config(file: Path) -> UNetConfig:
    """Read ``unet/config.json``."""
    contents = read_json(file)
    with reading(file):
        check_fixed(contents, UNET_FIXED, file)
        values = pick(contents, UNET_KEYS)
        values |= {name: one_for_all(values[name]) for name in ("layers", "context_width", "sample_size")}
        levels = len(values["widths"])
        blocks = contents.get("down_block_types", ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"])
        up = contents.get("up_block_types", up_blocks(blocks))
        if not set(blocks) <= {"CrossAttnDownBlock2D", "DownBlock2D"} or up != up_blocks(blocks):
            raise CheckpointError(f"{file} asks for blocks that SD 1.x, 2.x and XL do not have: {blocks}, {up}.")
        depths = per_level(contents.get("transformer_layers_per_block", 1), levels)
        is_cross = [name.startswith("CrossAttn") for name in per_level(blocks, levels)]
        values["depth"] = tuple(depth if cross else 0 for depth, cross in zip(depths, is_cross))
        values["mid_depth"] = depths[-1]
        values["heads"] = per_level(contents.get("num_attention_heads") or values["heads"], levels)
        if contents.get("addition_embed_type"):  # SDXL's
            check_fixed(contents, {"addition_embed_type": "text_time"}, file)
            values["size_width"] = contents["addition_time_embed_dim"]
            values["pooled_width"] = contents["projection_class_embeddings_input_dim"] - 6 * values["size_width"]
        version = str(contents.get("_diffusers_version", "1.0")).split(".")[:2]
        if values["sample_size"] == 32 and [int(number) for number in version] < [0, 9]:
            values["sample_size"] = 64  # early converters wrote 32 for every SD 1.x; diffusers replaces it with 64 too
        return check_config(UNetConfig(**values), file)


def published_unet(config: UNetConfig) -> dict:
    """The inverse of ``read_unet_config``; SD 1.x and 2.x have one transformer layer per block."""
    xl = dict(
        addition_embed_type="text_time",
        addition_time_embed_dim=config.size_width,
        projection_class_embeddings_input_dim=config.pooled_width + 6 * config.size_width,
        transformer_layers_per_block=[max(depth, 1) for depth in config.depth],
    )
    blocks = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depth]
    return publish(
        config,
        UNET_KEYS,
        _class_name="UNet2DConditionModel",
        down_block_types=blocks,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        up_block_types=up_blocks(blocks),
        **(xl if config.pooled_width else {}),
    )


def read_vae_config(file: Path) -> VAEConfig:
    """Read ``vae/config.json``."""
    contents = read_json(file)
    with reading(file):
        check_fixed(contents, VAE_FIXED, file)
        return check_config(VAEConfig(**pick(contents, VAE_KEYS)), file)


def published_vae(config: VAEConfig, side: int) -> dict:
    """The inverse of ``read_vae_config``; ``side`` is the size in pixels of the images it was trained on."""
    return publish(
        config,
        VAE_KEYS,
        _class_name="AutoencoderKL",
        down_block_types=["DownEncoderBlock2D"] * len(config.widths),
        in_channels=config.image_channels,
        out_channels=config.image_channels,
        sample_size=side,
        up_block_types=["UpDecoderBlock2D"] * len(config.widths),
    )


# All that we take from a text encoder's configuration. Transformers would obey anything else in the file too, even the
# name of code to download and run.
TEXT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def read_text_config(file: Path) -> CLIPTextConfig:
    contents = read_json(file)
    with reading(file):
        if contents.get("model_type", "clip_text_model") != "clip_text_model":
            raise CheckpointError(f"{file} does not describe a CLIP text encoder of Stable Diffusion.")
        check_fixed(contents, {"use_attention_mask": False}, file)  # of padding, which Stable Diffusion attends to
        known = {name: contents[name] for name in TEXT_KEYS if contents.get(name) is not None}
        check_values(known, CLIPTextConfig(), file)
        return CLIPTextConfig(**known, attn_implementation="sdpa")


PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}  # published name: ours
PUBLISHED = {ours: published for published, ours in PREDICTIONS.items()}


def read_schedule_config(file: Path, prediction: str | None, xl: bool = False) -> ScheduleConfig:
    """Betas and prediction type, whichever sampler the file names. An absent key has that sampler's default."""
    contents = read_json(file)
    with reading(file):
        check_fixed(contents, {"trained_betas": None, "thresholding": False}, file)
        kind, spacing = contents.get("_class_name"), contents.get("timestep_spacing")
        if xl and kind in ("DDIMScheduler", "DDPMScheduler"):  # diffusers' pipeline of SD 1.x and 2.x ignores it
            check_fixed({"clip_sample": True} | contents, {"clip_sample": False}, file)  # True is their default
        if kind in ("DDIMScheduler", "PNDMScheduler") and spacing != "trailing":  # others have spacings of their own
            check_fixed(contents, {"timestep_spacing": "leading"}, file)
        published = contents.get("prediction_type", "epsilon")
        if published not in list(PREDICTIONS):  # a list, because the value may be unhashable
            raise CheckpointError(f'{file}: prediction_type is "{published}"; known are {", ".join(PREDICTIONS)}.')
        config = ScheduleConfig(
            **pick(contents, SCHEDULE_KEYS),
            prediction=prediction or PREDICTIONS[published],
            steps_offset=contents.get("steps_offset", 0) if xl else 1,  # diffusers' pipeline of SD 1.x and 2.x insists
            # If absent, False for PNDM; True for all others, as in diffusers' DDIM when it is made from their files.
            set_alpha_to_one=contents.get("set_alpha_to_one", kind != "PNDMScheduler"),
            spacing="trailing" if spacing == "trailing" else "leading",
        )
        if config.beta_schedule not in ("scaled_linear", "linear"):
            raise CheckpointError(
                f'{file}: beta_schedule is "{config.beta_schedule}"; known are scaled_linear, linear.'
            )
        config = check_config(config, file)
        if max(config.beta_start, config.beta_end) >= 1:
            raise CheckpointError(f"{file} is damaged: its betas must lie between 0 and 1. Fetch it again.")
        return config


def published_schedule(config: ScheduleConfig) -> dict:
    """The inverse of ``read_schedule_config``."""
    return publish(
        config,
        SCHEDULE_KEYS,
        _class_name="DDIMScheduler",
        clip_sample=False,
        prediction_type=PUBLISHED[config.prediction],
        set_alpha_to_one=config.set_alpha_to_one,
        steps_offset=config.steps_offset,
        timestep_spacing=config.spacing,
    )
