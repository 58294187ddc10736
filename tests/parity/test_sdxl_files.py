"""Files of SDXL compared with diffusers: folders it wrote, and single files that it converts."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TOKENS, edit_json, error
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from minidistill import CheckpointError, StableDiffusion, load
from minidistill.bench.workloads import SIZES
from minidistill.formats.files import read_json, write_json
from minidistill.formats.single_file import UNET, to_single_file
from minidistill.unet import UNet
from minidistill.vae import VAE

from .helpers import POCKET, PROMPTS, assert_same, randn, single, small_xl

TEXT, TEXT_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


@pytest.fixture(scope="module")
def pipe():
    return small_xl()


@pytest.fixture(scope="module")
def tensors(pipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The pipeline's tensors under the names of a single file."""
    return single(pipe, tmp_path_factory.mktemp("configs"))


def check(sd: StableDiffusion, pipe, tolerance: float = 1e-9) -> None:
    """Embeddings, one call of the UNet, and the VAE both ways."""
    tokens, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    cond, z = sd.encode_prompt(PROMPTS), randn(2, 4, 8, 8).to(sd.dtype)
    assert error(cond.tokens.double(), tokens) <= tolerance and error(cond.pooled.double(), pooled) <= tolerance
    t, added = torch.tensor([981, 21]), dict(text_embeds=pooled, time_ids=cond.sizes)
    x = randn(2, 3, 16, 16, seed=1).clamp(-1, 1)
    with torch.no_grad():
        theirs = pipe.unet(z.double(), t, tokens, added_cond_kwargs=added).sample
        assert error(sd.unet(z, t, cond).double(), theirs) <= tolerance
        assert error(sd.vae.decode(z).double(), pipe.vae.decode(z.double() / 0.13025).sample) <= tolerance
        mean = pipe.vae.encode(x).latent_dist.mean * 0.13025
        assert error(sd.vae.encode(x.to(sd.dtype)).double(), mean) <= tolerance


def same(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


def with_extras(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What published files also hold."""
    extras = {TEXT + "text_model.embeddings.position_ids": torch.arange(TOKENS)[None]}
    extras |= {TEXT_2 + "transformer.text_model.embeddings.position_ids": torch.arange(TOKENS)[None]}
    extras |= {TEXT + "text_projection.weight": torch.zeros(2, 2), TEXT_2 + "logit_scale": torch.tensor(4.6)}
    return tensors | extras | {"denoiser.sigmas": torch.zeros(1000)}


@pytest.mark.parametrize("change", [same, with_extras])
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_single_file(change: Callable, suffix: str, pipe, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / f"model.{suffix}"
    write = save_file if suffix == "safetensors" else torch.save
    write(change(tensors), file)
    sd = load(file, dtype=torch.float64, tokenizer=POCKET / "tokenizer")
    assert sd.schedule.prediction == "eps" and sd.force_zeros
    check(sd, pipe)


def test_names_are_those_that_diffusers_converts(pipe, tensors: dict[str, Tensor]) -> None:
    """diffusers converts what we write back to its own tensors, bit for bit, and nothing is left over."""
    from diffusers.loaders import single_file_utils as theirs

    left = dict(tensors)
    assert_same(theirs.convert_ldm_unet_checkpoint(left, dict(pipe.unet.config)), pipe.unet.state_dict())
    assert_same(theirs.convert_ldm_vae_checkpoint(left, dict(pipe.vae.config)), pipe.vae.state_dict())
    assert_same(theirs.convert_ldm_clip_checkpoint(left, remove_prefix=TEXT), pipe.text_encoder.state_dict())
    found = theirs.convert_open_clip_checkpoint(pipe.text_encoder_2, dict(tensors), prefix=TEXT_2)
    assert_same(found, pipe.text_encoder_2.state_dict())
    prefixes = (UNET, "first_stage_model.", TEXT + "text_model.", TEXT_2)
    assert all(name.startswith(prefixes) for name in tensors)


def test_every_name_and_shape_at_full_size() -> None:
    """On tensors without memory. The published file also has position_ids and logit_scale: 2,515 tensors."""
    from diffusers.loaders import single_file_utils as theirs

    def shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
        return {name.removeprefix("text_model."): tensor.shape for name, tensor in tensors.items()}

    xl = SIZES["sdxl"]
    with torch.device("meta"):
        networks = UNet(xl.unet), VAE(xl.vae), CLIPTextModel(xl.text), CLIPTextModelWithProjection(xl.text_2)
    unet, vae, text, text_2 = (network.state_dict() for network in networks)
    tensors = to_single_file(unet, xl.unet, vae, xl.vae, (text, xl.text), (text_2, xl.text_2))
    assert len(tensors) == 2515 - 2
    config = dict(layers_per_block=2, addition_embed_type="text_time")
    assert shapes(theirs.convert_ldm_unet_checkpoint(dict(tensors), config)) == shapes(unet)
    layers = dict(down_block_types=[0] * 4, up_block_types=[0] * 4)
    assert shapes(theirs.convert_ldm_vae_checkpoint(dict(tensors), layers)) == shapes(vae)
    assert shapes(theirs.convert_ldm_clip_checkpoint(dict(tensors), remove_prefix=TEXT)) == shapes(text)
    assert shapes(theirs.convert_open_clip_checkpoint(networks[3], dict(tensors), prefix=TEXT_2)) == shapes(text_2)


def test_v_prediction_is_marked_by_an_empty_tensor(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(tensors | {"v_pred": torch.zeros(0)}, file)
    sd = load(file)
    assert sd.schedule.prediction == "v" and sd.unet_config.sample_size == 128
    assert load(file, prediction="eps").schedule.prediction == "eps"


@pytest.mark.parametrize(
    "extra, kind",
    [
        ({"edm_mean": torch.zeros(4), "edm_std": torch.zeros(4)}, "Playground 2.5"),
        ({UNET + "input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}, "inpainting"),
    ],
)
def test_other_single_files_are_named(extra: dict, kind: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors | extra, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"model.safetensors .*{kind}"):
        load(tmp_path / "model.safetensors")


def test_the_refiner_in_a_single_file(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    refiner = {n.replace(TEXT_2, "conditioner.embedders.0.model."): t for n, t in tensors.items() if TEXT not in n}
    save_file(refiner, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors is the SDXL refiner"):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("prefix", ["", UNET])
def test_an_unet_alone(prefix: str, tmp_path: Path) -> None:
    """The width of what it adds to the embedding of t tells SDXL's from the refiner's and from unCLIP's."""
    shapes = {"label_emb.0.0.weight": (4, 2816), "input_blocks.0.0.weight": (320, 4, 3, 3)}
    save_file({prefix + name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not a whole Stable Diffusion.*no VAE and no text encoder"):
        load(tmp_path / "model.safetensors")


def test_a_missing_projection_is_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    left = {name: tensor for name, tensor in tensors.items() if not name.endswith("text_projection")}
    save_file(left, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="lacks 'conditioner.embedders.1.model.text_projection'"):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("variant, shards", [(None, "1GB"), ("fp16", "1GB"), (None, "2MB"), ("fp16", "500KB")])
def test_folder(variant: str | None, shards: str, tmp_path: Path) -> None:
    pipe = small_xl().to(torch.float16 if variant else torch.float64)
    pipe.save_pretrained(tmp_path, variant=variant, max_shard_size=shards)
    assert (len(list((tmp_path / "unet").glob("*.safetensors"))) == 1) == (shards == "1GB")
    sd = load(tmp_path, dtype=torch.float64, variant=variant)
    check(sd, pipe.to(torch.float64))


def test_in_float16_the_vae_is_in_float32(pipe, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    for dtype, vae in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        sd = load(tmp_path, dtype=dtype)
        networks = (sd.unet, sd.text_encoder.first, sd.text_encoder.second, sd.vae)
        assert [next(network.parameters()).dtype for network in networks] == [dtype, dtype, dtype, vae]


CHANGES = {
    "refiner": ("model_index.json", dict(requires_aesthetics_score=True)),
    "inpainting": ("unet/config.json", dict(in_channels=9)),
    "Turbo": ("scheduler/scheduler_config.json", dict(timestep_spacing="trailing")),
    "Lightning": ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}),
    "Playground": ("scheduler/scheduler_config.json", {"_class_name": "EDMDPMSolverMultistepScheduler"}),
    "pads with": ("tokenizer_2/tokenizer_config.json", dict(pad_token="<|endoftext|>")),
    "different models": ("unet/config.json", dict(cross_attention_dim=128)),
}


def test_padding_in_an_older_folder(tiny_xl: Path, tmp_path: Path) -> None:
    """special_tokens_map.json counts more than tokenizer_config.json, as transformers reads them."""
    folder = shutil.copytree(tiny_xl, tmp_path / "xl")
    tokenizer = folder / "tokenizer_2"
    assert CLIPTokenizer.from_pretrained(tokenizer).pad_token == "!"
    edit_json(tokenizer / "special_tokens_map.json", {"pad_token": "<|endoftext|>"})
    assert CLIPTokenizer.from_pretrained(tokenizer).pad_token == "<|endoftext|>"
    with pytest.raises(CheckpointError, match=r"special_tokens_map.json pads with <\|endoftext\|>"):
        load(folder)


@pytest.mark.parametrize("kind", CHANGES)
def test_other_folders_are_named(kind: str, pipe, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    file, changes = tmp_path / CHANGES[kind][0], CHANGES[kind][1]
    write_json(file, read_json(file) | changes)
    with pytest.raises(CheckpointError, match=kind):
        load(tmp_path)


def test_a_missing_tensor_of_the_second_text_encoder(pipe, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "text_encoder_2/model.safetensors"
    tensors = load_file(file)
    del tensors["text_projection.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: text_projection.weight \[48, 128\]"):
        load(tmp_path)
