"""A Stable Diffusion in one .safetensors or .ckpt file: which version it is, and its networks under our names.

Such a file holds no configuration. The text encoder's names tell the version, tensor shapes tell widths and depths, and
everything else is a constant of the version.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextConfig

from minidistill.config import SDXL_UNET, ScheduleConfig, UNetConfig, VAEConfig
from minidistill.formats.files import CheckpointError, reading
from minidistill.formats.model_configs import OTHER_INPUTS, Description, Network, check_config
from minidistill.formats.model_folder import PROJECTION, match_text_names, rename_old_attention
from minidistill.formats.original_names import (
    CLIP_NAMES,
    FUSED,
    Table,
    openclip_names,
    translate,
    unet_names,
    vae_names,
)
from minidistill.formats.tensor_files import read_tensors

UNET, VAE = "model.diffusion_model.", "first_stage_model."
EMA = "model_ema."
MODELSPEC = {"eps": "epsilon", "v": "v"}  # our prediction -> modelspec.prediction_type in a .safetensors header
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"  # tensors, empty, by which ComfyUI and others mark v and zero terminal SNR
# What the UNet predicts is in the header, under ModelSpec's key or ComfyUI's; otherwise the architecture says it.
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
PREDICTION_VALUES = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v"}
ARCHITECTURES = {"stable-diffusion-v2-512": "eps", "stable-diffusion-v2-768-v": "v"}
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Version:
    """The constants of SD 1.x, 2.x or XL that no tensor shape tells. The defaults are those of 1.x."""

    name: str
    text: str  # prefix of the text encoder
    openclip: bool = False  # True: OpenCLIP's text encoder, with its names and gelu; False: CLIP's, with quick_gelu
    linear_projection: bool = False  # True: the UNet's heads have width 64; False: 8 heads at every width
    pad_token: str = "<|endoftext|>"
    sample_size: int = 64
    scaling_factor: float = 0.18215

    @property
    def activation(self) -> str:
        return "gelu" if self.openclip else "quick_gelu"

    def text_names(self, layers: int) -> Table:
        return openclip_names(layers) if self.openclip else CLIP_NAMES


SD1 = Version("Stable Diffusion 1.x", "cond_stage_model.transformer.")
SD2 = Version(
    "Stable Diffusion 2.x",
    "cond_stage_model.model.",
    openclip=True,
    linear_projection=True,
    pad_token="!",
)
XL = Version(
    "Stable Diffusion XL",
    "conditioner.embedders.0.transformer.",
    linear_projection=True,
    sample_size=128,
    scaling_factor=0.13025,
)
VERSIONS = (SD1, SD2, XL)
XL_SECOND = replace(XL, text="conditioner.embedders.1.model.", openclip=True)
HEAD_WIDTH = 64  # of text encoders, and of the UNets with linear projections
VOCABULARY = 49408  # of CLIP and OpenCLIP
TEXT_LAYERS = {768: 12, 1024: 23, 1280: 32}  # by width, of SD 1.x, 2.x (without its last one) and XL's second encoder

# Other models that come as one file, by a part of some tensor's name.
OTHER_MODELS = {
    "edm_mean": "Playground 2.5",
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "Flux",
    "control_model.": "a ControlNet",
    "depth_model.": "a depth-to-image model",
    "edm_vpred.": "a model with EDM's noise levels",
}
NOT_XL = {  # SDXL has these too
    "conditioner.embedders.": "the SDXL refiner, or SD 2.x in a newer layout",
    "label_emb.": "an unCLIP or upscaling model",
}
LABELS, XL_LABELS = "label_emb.0.0.weight", SDXL_UNET.pooled_width + 6 * SDXL_UNET.size_width  # the refiner has fewer
PARTS = {"UNet": UNET, "VAE": VAE, "text encoder": tuple(version.text for version in VERSIONS)}
PIECES = {  # the same, for files without an original UNet
    "lora": "a LoRA, which goes on top of a model",
    "down_blocks.": "one network of a folder: name the whole folder",
    "emb_params": "a textual inversion, words for a text encoder",
}

# Tensors in these files that serve training or other tools, not sampling. See also ``match_text_names``.
NOT_NEEDED = re.compile(
    r"(cond_stage_model|conditioner)\..*position_ids"
    r"|cond_stage_model\.model\.text_projection(\.weight)?"  # XL's second encoder uses its own
    r"|(cond_stage_model|conditioner\.embedders\.1)\.model\.(logit_scale|attn_mask|visual\..*)"
    r"|first_stage_model\.(loss|model_ema)\..*"
)


def read_single_file(path: Path, prediction: str | None = None, ema: bool = False) -> Description:
    """Describe the model in ``path``. ``ema`` selects the UNet's EMA weights.

    The UNet predicts ``prediction`` ("eps" or "v") if given, else what the file says, else eps for 1.x and XL. Most
    files of 2.x say nothing; for them it is guessed, with a warning.

    Raises CheckpointError, which names the kind of model if it is not SD 1.x, 2.x or XL.
    """
    tensors, metadata = read_tensors(path)
    version = detect_version(tensors, path)
    prediction = prediction or stated_prediction(tensors, metadata, path)
    if version is SD2 and not prediction:
        prediction = likely_prediction(tensors)
        sizes = {"v": "SD 2.0 and 2.1 at 768 pixels", "eps": "the base models of SD 2, at 512 pixels"}
        other = "eps" if prediction == "v" else "v"
        warnings.warn(
            f"{path} does not say what the UNet predicts: assuming {prediction}, as in {sizes[prediction]}. "
            f'If it is one of {sizes[other]}, set prediction="{other}" (--prediction {other}).',
            stacklevel=2,
        )
    prediction = prediction or "eps"
    with reading(path):
        try:
            unet_config = check_config(unet_shapes(tensors, version, prediction), path)
            vae_config = check_config(vae_shapes(tensors, version), path)
            encoders = [version, XL_SECOND] if version is XL else [version]
            texts = [text_network(tensors, encoder, path) for encoder in encoders]
            text_configs = [text_shapes(text.tensors, encoder) for text, encoder in zip(texts, encoders)]
            if version is XL and not text_configs[1].projection_dim:
                raise KeyError(f"{XL_SECOND.text}text_projection")
        except KeyError as error:
            raise CheckpointError(f"{path} lacks {error}: it is incomplete; fetch it again.") from error
    unet = network(ema_weights(tensors, path) if ema else tensors, UNET, unet_names(unet_config), path)
    unet = unet._replace(metadata=metadata)
    vae = network(tensors, VAE, vae_names(vae_config), path)
    vae = vae._replace(tensors=rename_old_attention(vae.tensors))
    schedule = file_schedule(prediction, zero_snr=ZERO_SNR in tensors)
    texts[1:] = [text._replace(tensors=match_text_names(text.tensors, projects=True)) for text in texts[1:]]
    pad_token, force_zeros = version.pad_token, version is XL
    return Description(unet_config, vae_config, text_configs, schedule, unet, vae, texts, pad_token, force_zeros)


def file_schedule(prediction: str, zero_snr: bool) -> ScheduleConfig:
    """The noise schedule of a single file: with zero terminal SNR, sampling has to start at the last t."""
    spacing = "trailing" if zero_snr else "leading"
    return ScheduleConfig(prediction=prediction, zero_terminal_snr=zero_snr, spacing=spacing)


def stated_prediction(tensors: Tensors, metadata: Mapping[str, str], path: Path) -> str | None:
    """What the file says the UNet predicts, "eps" or "v": by an empty tensor, or in its header."""
    if V_PREDICTION in tensors:
        return "v"
    said = next((metadata[key] for key in PREDICTION_KEYS if metadata.get(key)), None)
    if said is None:
        return ARCHITECTURES.get(metadata.get("modelspec.architecture"))
    if said not in PREDICTION_VALUES:
        raise CheckpointError(f'{path} says that it predicts "{said}"; known are epsilon and v (--prediction).')
    return PREDICTION_VALUES[said]


def likely_prediction(tensors: Tensors) -> str:
    """What an SD 2.x predicts that says nothing. ComfyUI tells them apart by this bias; v if it is not there."""
    bias = tensors.get(f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias")
    return "v" if bias is None or bias.float().std(correction=0) > 0.09 else "eps"


def detect_version(tensors: Tensors, path: Path) -> Version:
    """SD 1.x, 2.x or XL. Raises CheckpointError for anything else."""

    def has(prefix: str | tuple[str, ...]) -> bool:
        return any(name.startswith(prefix) for name in tensors)

    conv_in = tensors.get(f"{UNET}input_blocks.0.0.weight")
    projection = tensors.get(f"{UNET}middle_block.1.proj_in.weight")
    labels = tensors.get(UNET + LABELS, tensors.get(LABELS))
    is_xl = labels is not None and labels.shape[-1] == XL_LABELS or (has(XL.text) and has(XL_SECOND.text))
    markers = OTHER_MODELS | ({} if is_xl else NOT_XL) | ({} if has(UNET) else PIECES)
    other = next((kind for marker, kind in markers.items() if any(marker in name for name in tensors)), None)
    if other is None and conv_in is not None and conv_in.ndim == 4:
        other = OTHER_INPUTS.get(conv_in.shape[1])
    if other:
        raise CheckpointError(f"{path} is {other}; minidistill reads Stable Diffusion 1.x, 2.x and XL, text to image.")
    missing = [part for part, prefix in PARTS.items() if not has(prefix)]
    if missing:
        raise CheckpointError(
            f"{path} is not a whole Stable Diffusion 1.x, 2.x or XL: it has no {' and no '.join(missing)}. Use a "
            "version of the model that has all parts in one file, or a folder."
        )
    versions = [version for version in VERSIONS if has(version.text)]
    mixed = projection is not None and (projection.ndim == 2) != versions[0].linear_projection
    if len(versions) > 1 or mixed:
        raise CheckpointError(
            f"{path} is neither Stable Diffusion 1.x, 2.x nor XL but has parts of several (the text encoder of "
            f"{' and '.join(version.name for version in versions)}; the UNet's projections): fetch another file."
        )
    return versions[0]


def network(tensors: Tensors, prefix: str, names: Table, path: Path) -> Network:
    """The tensors under ``prefix``, by our names."""
    inverse = {theirs: ours for ours, theirs in names.items()}
    needed = [name for name in tensors if name.startswith(prefix) and not NOT_NEEDED.fullmatch(name)]
    selected = {translate(name.removeprefix(prefix), inverse): tensors[name] for name in needed}
    if len(selected) < len(needed):
        raise CheckpointError(
            f"{path} has the same tensors of {prefix}* under old and new names, as a merge of two models may leave "
            "them: use one of those models, or merge them again."
        )
    return Network(selected, path, lambda name: prefix + translate(name.removeprefix("text_model."), names))


def ema_weights(tensors: Tensors, path: Path) -> dict[str, Tensor]:
    """The UNet's EMA weights, by the names of the weights they average. Their own names have lost the dots."""
    names = {f"{EMA}{name.removeprefix('model.').replace('.', '')}": name for name in tensors if name.startswith(UNET)}
    frozen = [name for copy, name in names.items() if copy not in tensors]  # the average has only what was trained
    if len(frozen) == len(names):
        raise CheckpointError(f"{path} has no EMA copy of the UNet: leave --ema out.")
    if frozen:
        few = f"{len(frozen)} of the UNet's {len(names)} weights"
        warnings.warn(f"{path} has no EMA copy of {few}: they are used as they are.", stacklevel=3)
    return {name: tensors.get(copy, tensors[name]) for copy, name in names.items()}


def text_network(tensors: Tensors, version: Version, path: Path) -> Network:
    """A text encoder. OpenCLIP's stacked q, k and v come apart, and that of SD 2.x loses its last block."""
    needed = (name for name in tensors if not NOT_NEEDED.fullmatch(name))
    numbered = (re.match(rf"{version.text}.*?(?:layers|resblocks)\.(\d+)\.", name) for name in needed)
    blocks = len({match[1] for match in numbered if match})
    text = network(tensors, version.text, version.text_names(blocks), path)
    if not version.openclip:
        return text._replace(tensors=match_text_names(text.tensors))
    if PROJECTION in text.tensors:  # XL
        text.tensors[PROJECTION] = text.tensors[PROJECTION].T
    elif blocks == 24 or (blocks != 23 and f"{version.text}text_projection" in tensors):
        # A complete OpenCLIP: SD 2.x uses the input of its last block. With 23 blocks, that one is cut off already.
        last = f"encoder.layers.{blocks - 1}."
        text = text._replace(tensors={name: t for name, t in text.tensors.items() if not name.startswith(last)})
    for name in [name for name in text.tensors if FUSED[-1] in name]:  # the inverse table calls all three v_proj
        stacked = text.tensors.pop(name)
        if len(stacked) % 3:
            raise ValueError(f"{text.name_in_file(name)} has {len(stacked)} rows, not three equal blocks")
        text.tensors.update({name.replace(FUSED[-1], part): t for part, t in zip(FUSED, stacked.chunk(3))})
    return text


def number(tensors: Mapping, name: str, first: int = 0) -> int:
    """How many names ``name.format(first)``, ``name.format(first + 1)``, ... there are."""
    return len(list(takewhile(lambda i: name.format(i) in tensors, count(first))))


def unet_shapes(tensors: Tensors, version: Version, prediction: str) -> UNetConfig:
    """The UNet's configuration, from tensor shapes. Raises KeyError for a tensor that is missing."""

    def shape(name: str) -> tuple[int, ...]:
        return tensors[UNET + name].shape

    large = version is SD2 and prediction == "v"  # SD 2.1 at 768 pixels, which overflows in float16
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
        heads=tuple(max(width // HEAD_WIDTH, 1) if version.linear_projection else 8 for width in widths),
        context_width=shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        linear_projection=len(shape("middle_block.1.proj_in.weight")) == 2,
        upcast_attention=large,
        sample_size=96 if large else version.sample_size,
        pooled_width=shape("label_emb.0.0.weight")[1] - 6 * UNetConfig.size_width if version is XL else 0,
    )


def vae_shapes(tensors: Tensors, version: Version) -> VAEConfig:
    """The VAE's configuration, from tensor shapes."""
    levels = number(tensors, VAE + "encoder.down.{}.block.0.conv1.weight")
    return VAEConfig(
        image_channels=tensors[f"{VAE}encoder.conv_in.weight"].shape[1],
        latent_channels=tensors[f"{VAE}post_quant_conv.weight"].shape[0],
        widths=tuple(tensors[f"{VAE}encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)),
        layers=number(tensors, VAE + "encoder.down.0.block.{}.conv1.weight"),
        scaling_factor=version.scaling_factor,
    )


def text_shapes(tensors: Tensors, version: Version) -> CLIPTextConfig:
    """The text encoder's configuration, from the shapes of tensors under our names."""
    vocabulary, width = tensors["embeddings.token_embedding.weight"].shape
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=number(tensors, "encoder.layers.{}.layer_norm1.weight"),
        num_attention_heads=max(width // HEAD_WIDTH, 1),
        max_position_embeddings=tensors["embeddings.position_embedding.weight"].shape[0],
        hidden_act=version.activation,
        projection_dim=len(tensors[PROJECTION]) if PROJECTION in tensors else None,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )


def original_text(text: Tensors, config: CLIPTextConfig, version: Version) -> dict[str, Tensor]:
    """The inverse of ``text_network``."""
    names, tensors = version.text_names(config.num_hidden_layers), {}
    text = {name.removeprefix("text_model."): tensor for name, tensor in text.items()}
    for name, tensor in text.items():
        if version.openclip and any(part in name for part in FUSED):
            if FUSED[0] not in name:
                continue
            tensor = torch.cat([text[name.replace(FUSED[0], part)] for part in FUSED])
        tensors[version.text + translate(name, names)] = tensor.T if name == PROJECTION else tensor
    return tensors


def to_single_file(
    unet: Tensors, unet_config: UNetConfig, vae: Tensors, vae_config: VAEConfig, *texts: tuple[Tensors, CLIPTextConfig]
) -> dict[str, Tensor]:
    """The inverse of ``read_single_file``: state dicts -> all tensors of a single file. SDXL has two ``texts``.

    The text encoder of SD 2.x is written as SD uses it, without its last block. Raises ValueError for a model that
    would be read back differently, because it differs from Stable Diffusion in something that no shape tells.
    """
    text, text_config = texts[0]
    kind = text_config.hidden_act, unet_config.linear_projection
    version = next((v for v in VERSIONS if (v.activation, v.linear_projection) == kind), None)
    if version is None or (version is XL) != (len(texts) == 2):
        raise ValueError(
            f"No single file has a text encoder with activation {kind[0]} and a UNet with "
            f"{'linear' if kind[1] else 'convolutional'} projections. Write a folder."
        )
    for _, config in texts:
        usual = TEXT_LAYERS.get(config.hidden_size, config.num_hidden_layers)
        if config.num_hidden_layers != usual:
            raise ValueError(
                f"Programs that read single files expect {usual} layers of this text encoder, which has "
                f"{config.num_hidden_layers}. Write a folder."
            )
        if config.vocab_size > VOCABULARY:
            raise ValueError(
                f"Programs that read single files expect {VOCABULARY} tokens of this text encoder, which has learned "
                f"{config.vocab_size - VOCABULARY} more. Write a folder."
            )
    names = unet_names(unet_config)
    tensors = {UNET + translate(name, names): tensor for name, tensor in unet.items()}
    names = vae_names(vae_config)
    for name, tensor in vae.items():
        tensor = tensor[:, :, None, None] if ".attentions.0." in name and tensor.ndim == 2 else tensor
        tensors[VAE + translate(name, names)] = tensor
    for (tensors_of_text, config), encoder in zip(texts, (version, XL_SECOND)):
        tensors |= original_text(tensors_of_text, config, encoder)

    unet_config = replace(unet_config, upcast_attention=False, sample_size=version.sample_size)
    expected = unet_config, vae_config, text_config.num_attention_heads
    heads = text_shapes(text, version).num_attention_heads
    read_back = unet_shapes(tensors, version, "eps"), vae_shapes(tensors, version), heads
    if read_back != expected:
        raise ValueError(
            "A single file holds no configuration, and this model would be read back as another: "
            "{}, {} and {} heads instead of {}, {} and {}. Write a folder.".format(*read_back, *expected)
        )
    return tensors
