"""A whole Stable Diffusion in one file, .safetensors or .ckpt: what it is, and its networks under our names.

There is no configuration in such a file. The version shows in how the text encoder's tensors are called, widths and
depths in their shapes, and what does not show is one of the version's constants.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextConfig

from minidistill.config import ScheduleConfig, UNetConfig, VAEConfig
from minidistill.formats.files import CheckpointError, blamed
from minidistill.formats.model_configs import PREDICTIONS, checked
from minidistill.formats.original_names import (
    FUSED,
    Table,
    backwards,
    clip_names,
    openclip_names,
    translate,
    unet_names,
    vae_names,
)
from minidistill.formats.stored import StoredTensor
from minidistill.formats.tensor_files import read_tensors

UNET, VAE = "model.diffusion_model.", "first_stage_model."
EMA = "model_ema."
MODELSPEC = {"eps": "epsilon", "v": "v"}  # what the UNet predicts, as a header's modelspec.prediction_type says it
Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Version:
    """What a family of checkpoints has in common, and its shapes do not show."""

    name: str
    text: str  # how the text encoder's names begin
    text_names: Callable[[int], Table]
    activation: str
    linear_projection: bool  # of the UNet's attention, where the others have 1x1 convolutions
    head_width: int | None  # of the UNet; None: 8 heads everywhere
    prediction: str  # unless somebody says otherwise
    pad_token: str


VERSIONS = (
    Version(
        name="Stable Diffusion 1.x",
        text="cond_stage_model.transformer.",
        text_names=clip_names,
        activation="quick_gelu",
        linear_projection=False,
        head_width=None,
        prediction="eps",
        pad_token="<|endoftext|>",
    ),
    Version(
        name="Stable Diffusion 2.x",
        text="cond_stage_model.model.",
        text_names=openclip_names,
        activation="gelu",
        linear_projection=True,
        head_width=64,
        prediction="v",
        pad_token="!",
    ),
)
TEXT_HEAD_WIDTH = 64

# What else comes as one file, by a part of a name in it.
OTHERS = {
    "conditioner.embedders.0.transformer.": "SDXL",
    "conditioner.embedders.1.": "SDXL",
    "conditioner.embedders.": "the SDXL refiner, or SD 2.x in a newer layout",
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "Flux",
    "control_model.": "a ControlNet",
    "depth_model.": "a depth-to-image model",
    "label_emb.": "an unCLIP or upscaling model",
}
PIECES = {  # of files without a UNet in the names above
    "lora_": "a LoRA, which goes on top of a model",
    "down_blocks.": "one network out of a folder: name the whole folder",
}
INPUTS = {9: "an inpainting model", 8: "InstructPix2Pix", 7: "an upscaling model", 5: "a depth-to-image model"}

# In these files for training or for other tools; nothing that draws a picture.
NOT_NEEDED = re.compile(
    r"cond_stage_model\..*position_ids"
    r"|cond_stage_model\.((model|transformer)\.)?(text_projection|logit_scale)(\.weight)?"
    r"|cond_stage_model\.model\.(attn_mask|visual\..*)"
    r"|cond_stage_model\.transformer\.(vision_model|visual_projection)\..*"
    r"|first_stage_model\.(loss|model_ema)\..*"
)


@dataclass(frozen=True)
class Part:
    """One network: its tensors under our names, and what the file calls them."""

    tensors: dict[str, StoredTensor]
    prefix: str
    names: Table

    def called(self, name: str) -> str:
        return self.prefix + translate(name, self.names)


@dataclass(frozen=True)
class SingleFile:
    version: Version
    unet_config: UNetConfig
    vae_config: VAEConfig
    text_config: CLIPTextConfig
    schedule: ScheduleConfig
    unet: Part
    vae: Part
    text: Part


def read_single_file(path: Path, prediction: str | None = None, ema: bool = False) -> SingleFile:
    """Describe the file; nothing is read but its list of tensors. ``ema`` takes the UNet's averaged copy.

    What the UNet predicts: ``prediction`` ("eps" or "v") if given; else what the file's metadata say
    (``modelspec.prediction_type``); else eps for 1.x and v for 2.x, where the files of 2.0-base and 2.1-base look the
    same and do need ``prediction="eps"``.

    Raises CheckpointError; for another model than SD 1.x and 2.x, it says which.
    """
    tensors, metadata = read_tensors(path)
    version = recognise(tensors, path)
    stated = (PREDICTIONS | {"v": "v"}).get(metadata.get("modelspec.prediction_type"))  # people write either name of v
    if version.prediction == "v" and not (prediction or stated):
        warnings.warn(
            f"{path} does not say what it predicts: taken for v, as SD 2.0 and 2.1 at 768 pixels do. "
            'If it is one of the base models, of 512 pixels, say prediction="eps" (--prediction eps).',
            stacklevel=2,
        )
    prediction = prediction or stated or version.prediction
    with blamed(path):
        try:
            unet_config = checked(read_unet_shapes(tensors, version, prediction), path)
            vae_config = checked(read_vae_shapes(tensors), path)
            text = read_text(tensors, version)
            text_config = read_text_shapes(text.tensors, version)
        except KeyError as error:
            raise CheckpointError(f"{path} lacks {error}: it is incomplete; fetch it again.") from error
    unet = part(averaged(tensors, path) if ema else tensors, UNET, unet_names(unet_config))
    vae = part(tensors, VAE, vae_names(vae_config))
    vae.tensors.update({n: t.without_kernel() for n, t in vae.tensors.items() if ".attentions.0." in n})
    schedule = ScheduleConfig(prediction=prediction)
    return SingleFile(version, unet_config, vae_config, text_config, schedule, unet, vae, text)


def recognise(tensors: Tensors, path: Path) -> Version:
    """Raises CheckpointError for what is neither 1.x nor 2.x."""
    first = tensors.get(f"{UNET}input_blocks.0.0.weight")
    inputs = INPUTS.get(first.shape[1]) if first and len(first.shape) == 4 else None
    markers = OTHERS if any(name.startswith(UNET) for name in tensors) else OTHERS | PIECES
    other = next((kind for marker, kind in markers.items() if any(marker in name for name in tensors)), inputs)
    if other:
        raise CheckpointError(f"{path} is {other}; what is read here is Stable Diffusion 1.x and 2.x, text to image.")
    found = [version for version in VERSIONS if any(name.startswith(version.text) for name in tensors)]
    if not found:
        raise CheckpointError(
            f"{path} is not a whole Stable Diffusion 1.x or 2.x (UNet, VAE and text encoder): name one that is."
        )
    version, projection = found[0], tensors.get(f"{UNET}middle_block.1.proj_in.weight")
    if len(found) > 1 or (projection and (len(projection.shape) == 2) != version.linear_projection):
        raise CheckpointError(
            f"{path} is neither Stable Diffusion 1.x nor 2.x but has parts of both (text encoder of "
            f"{' and '.join(version.name for version in found)}; the UNet's projections): fetch another file."
        )
    return version


def part(tensors: Tensors, prefix: str, names: Table) -> Part:
    inverse = backwards(names)
    own = {
        translate(name.removeprefix(prefix), inverse): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not NOT_NEEDED.fullmatch(name)
    }
    return Part(own, prefix, names)


def averaged(tensors: Tensors, path: Path) -> dict[str, StoredTensor]:
    """The UNet's EMA copies under the names of what they are copies of. There, names have lost their dots."""
    names = {f"{EMA}{name.removeprefix('model.').replace('.', '')}": name for name in tensors if name.startswith(UNET)}
    found = {name: tensors[copy] for copy, name in names.items() if copy in tensors}
    if not found:
        raise CheckpointError(f"{path} has no EMA copy of the UNet: leave --ema out.")
    return found


def read_text(tensors: Tensors, version: Version) -> Part:
    """The text encoder: OpenCLIP's without the last block, and its queries, keys and values apart."""
    needed = (name for name in tensors if not NOT_NEEDED.fullmatch(name))
    numbered = (re.match(rf"{version.text}.*?(?:layers|resblocks)\.(\d+)\.", name) for name in needed)
    blocks = len({match[1] for match in numbered if match})
    text = part(tensors, version.text, version.text_names(blocks))
    if version.text_names is not openclip_names:
        return text
    if blocks == 24 or (blocks != 23 and f"{version.text}text_projection" in tensors):
        # A whole OpenCLIP, not one cut already, to 23: SD 2.x takes what goes into the last block.
        own = {name: t for name, t in text.tensors.items() if not name.startswith(f"encoder.layers.{blocks - 1}.")}
        text = replace(text, tensors=own)
    for name in [name for name in text.tensors if FUSED[-1] in name]:  # where the table's inverse puts all three
        fused = text.tensors.pop(name)
        text.tensors.update({name.replace(FUSED[-1], third): fused.part(i, 3) for i, third in enumerate(FUSED)})
    return text


def number(tensors: Mapping, name: str, first: int = 0) -> int:
    """How many there are of what is counted in its name."""
    return len(list(takewhile(lambda i: name.format(i) in tensors, count(first))))


def read_unet_shapes(tensors: Tensors, version: Version, prediction: str) -> UNetConfig:
    """Read off the tensors' shapes, by the file's names. Raises KeyError for one that is not there."""

    def shape(name: str) -> tuple[int, ...]:
        return tensors[UNET + name].shape

    layers = number(tensors, UNET + "input_blocks.{}.0.in_layers.0.weight", first=1)
    firsts = [1]  # the first block of each level
    while f"{UNET}input_blocks.{firsts[-1] + layers}.0.op.weight" in tensors:
        firsts.append(firsts[-1] + layers + 1)
    widths = tuple(shape(f"input_blocks.{first}.0.out_layers.3.weight")[0] for first in firsts)
    return UNetConfig(
        in_channels=shape("input_blocks.0.0.weight")[1],
        out_channels=shape("out.2.weight")[0],
        widths=widths,
        layers=layers,
        depth=tuple(
            number(tensors, f"{UNET}input_blocks.{first}.1.transformer_blocks.{{}}.norm1.weight") for first in firsts
        ),
        mid_depth=number(tensors, UNET + "middle_block.1.transformer_blocks.{}.norm1.weight"),
        heads=tuple(width // version.head_width if version.head_width else 8 for width in widths),
        context_width=shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        linear_projection=len(shape("middle_block.1.proj_in.weight")) == 2,
        upcast_attention=prediction == "v",  # SD 2.1 at 768 pixels overflows in float16 otherwise
        sample_size=96 if prediction == "v" else 64,
    )


def read_vae_shapes(tensors: Tensors) -> VAEConfig:
    """The same of the VAE."""
    levels = number(tensors, VAE + "encoder.down.{}.block.0.conv1.weight")
    return VAEConfig(
        image_channels=tensors[f"{VAE}encoder.conv_in.weight"].shape[1],
        latent_channels=tensors[f"{VAE}post_quant_conv.weight"].shape[0],
        widths=tuple(tensors[f"{VAE}encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)),
        layers=number(tensors, VAE + "encoder.down.0.block.{}.conv1.weight"),
    )


def read_text_shapes(tensors: Tensors, version: Version) -> CLIPTextConfig:
    """The same of the text encoder, by our names."""
    vocabulary, width = tensors["embeddings.token_embedding.weight"].shape
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=number(tensors, "encoder.layers.{}.layer_norm1.weight"),
        num_attention_heads=max(width // TEXT_HEAD_WIDTH, 1),
        max_position_embeddings=tensors["embeddings.position_embedding.weight"].shape[0],
        hidden_act=version.activation,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )


def to_single_file(
    unet: Mapping[str, Tensor],
    unet_config: UNetConfig,
    vae: Mapping[str, Tensor],
    vae_config: VAEConfig,
    text: Mapping[str, Tensor],
    text_config: CLIPTextConfig,
) -> dict[str, Tensor]:
    """The inverse: three state dicts under our names -> all tensors of a single file.

    SD 2.x comes out with the text encoder cut as SD uses it. Raises ValueError for a model that could not be read
    again, because it differs from SD 1.x and 2.x in what no shape tells.
    """
    kind = text_config.hidden_act, unet_config.linear_projection
    version = next((v for v in VERSIONS if (v.activation, v.linear_projection) == kind), None)
    if version is None:
        raise ValueError(
            f"No single file's text encoder has the activation {kind[0]} beside "
            f"{'linear' if kind[1] else 'convolutional'} projections in the UNet. Write a folder."
        )
    names = unet_names(unet_config)
    tensors = {UNET + translate(name, names): tensor for name, tensor in unet.items()}
    names = vae_names(vae_config)
    for name, tensor in vae.items():
        tensor = tensor[:, :, None, None] if ".attentions.0." in name and tensor.ndim == 2 else tensor
        tensors[VAE + translate(name, names)] = tensor
    names = version.text_names(text_config.num_hidden_layers)
    text = {name.removeprefix("text_model."): tensor for name, tensor in text.items()}
    for name, tensor in text.items():
        if version.text_names is openclip_names and any(third in name for third in FUSED):
            if FUSED[0] not in name:
                continue
            tensor = torch.cat([text[name.replace(FUSED[0], third)] for third in FUSED])
        tensors[version.text + translate(name, names)] = tensor

    found = read_unet_shapes(tensors, version, "eps"), read_vae_shapes(tensors), read_text_shapes(text, version)
    same = replace(unet_config, upcast_attention=False, sample_size=64), vae_config
    heads = text_config.num_attention_heads, found[2].num_attention_heads
    if found[:2] != same or heads[0] != heads[1]:
        raise ValueError(
            "A single file holds no configuration, and this model would be read as another: "
            f"{found[0]}, {found[1]} and {heads[1]} heads in place of {same[0]}, {same[1]} and {heads[0]}. "
            "Write a folder."
        )
    return tensors
