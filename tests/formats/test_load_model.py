"""load_model.py: which models load, in every form, and what is refused. tests/parity compares with diffusers."""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from tiny import END, ROOT, TOKENS, VOCABULARY, edit_json, randn, tiny_tensors
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from minidistill import CheckpointError, StableDiffusion, load
from minidistill.formats.load_model import read_tokenizer
from minidistill.formats.model_configs import read_schedule_config, read_vae_config
from minidistill.formats.single_file import SD1, UNET, read_single_file, to_single_file
from minidistill.formats.tensor_files import convert, is_finite, read_tensors
from minidistill.vae import VAE

TOKENIZER = ROOT / "weights/pocket-emoji/tokenizer"
CONV, LINEAR = UNET + "input_blocks.1.0.in_layers.2.weight", UNET + "time_embed.0.weight"


def write(file: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, file) if file.suffix == ".safetensors" else torch.save({"state_dict": tensors}, file)
    return file


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return tiny_tensors()


@pytest.fixture
def single(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    return write(tmp_path / "model.safetensors", tensors)


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A private copy, to change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "tiny"))


def written_again(sd: StableDiffusion) -> dict[str, Tensor]:
    return to_single_file(
        sd.unet.state_dict(),
        sd.unet.config,
        sd.vae.state_dict(),
        sd.vae.config,
        (sd.text_encoder.state_dict(), sd.text_encoder.config),
    )


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("version", [1, 2])
def test_a_single_file_and_back(version: int, suffix: str, tmp_path: Path) -> None:
    tensors = tiny_tensors(version)
    sd = load(write(tmp_path / f"model{suffix}", tensors), prediction="eps")
    assert equal(written_again(sd), tensors)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("held", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
def test_dtypes(held: torch.dtype, asked: torch.dtype, suffix: str, tmp_path: Path) -> None:
    tensors = tiny_tensors(dtype=held)
    sd = load(write(tmp_path / f"model{suffix}", tensors), dtype=asked)
    assert equal(written_again(sd), {name: tensor.to(asked) for name, tensor in tensors.items()})


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_weights_stay_mapped(suffix: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    single = write(tmp_path / f"model{suffix}", tensors)
    unet = load(single).unet
    weight = unet.time_embedding.linear_1.weight
    assert is_mapped(weight, single)
    conv = load(single, dtype=torch.bfloat16).unet.down_blocks[0].resnets[0].conv1.weight
    assert not is_mapped(conv, single)
    assert conv.is_contiguous(memory_format=torch.channels_last)  # copies get the fastest layout
    before = single.read_bytes()
    with torch.no_grad():
        weight.zero_()
    assert single.read_bytes() == before  # weights can be written to without changing the file


def is_mapped(tensor: Tensor, file: Path) -> bool:
    """True if the tensor lies in a mapping of the file."""
    mappings = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    ranges = [[int(end, 16) for end in mapping[0].split("-")] for mapping in mappings]
    return any(start <= tensor.data_ptr() < stop for start, stop in ranges)


def test_a_header_of_any_length(single: Path) -> None:
    """Old files do not pad it, so their tensors are not aligned."""
    data = single.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" "
    header += b" " * (1 - len(header) % 2)
    expected = {name: tensor.clone() for name, tensor in written_again(load(single)).items()}  # a copy, not mapped
    single.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert equal(written_again(load(single)), expected)


def test_views_in_a_ckpt(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """A transposed tensor in the middle of another tensor's storage."""
    weight = tensors[LINEAR]
    around = torch.zeros(3, *weight.T.shape)
    around[1] = weight.T
    sd = load(write(tmp_path / "model.ckpt", tensors | {LINEAR: around[1].T, "around": around}))
    assert equal(written_again(sd), tensors)


@pytest.mark.parametrize("blocks, used", [(2, 1), (23, 23)])
def test_a_cut_and_an_uncut_openclip(blocks: int, used: int, tmp_path: Path) -> None:
    """A text_projection means that the file holds one block more than SD uses.

    But SD 2.x in folders has 23 blocks, and some files converted from them keep the projection.
    """
    tensors, text = tiny_tensors(version=2), "cond_stage_model.model."
    first = {name: t for name, t in tensors.items() if name.startswith(f"{text}transformer.resblocks.0.")}
    for i in range(1, blocks):
        tensors |= {name.replace("blocks.0", f"blocks.{i}"): t + i for name, t in first.items()}
    file = write(tmp_path / "model.safetensors", tensors | {f"{text}text_projection": torch.zeros(64, 64)})
    expected = {name: t for name, t in tensors.items() if f"resblocks.{used}." not in name}
    assert equal(written_again(load(file, prediction="eps")), expected)


@pytest.mark.parametrize(
    "version, extra",
    [
        (1, ["transformer.vision_model.encoder.layers.5.x", "transformer.visual_projection.weight"]),
        (2, ["model.attn_mask", "model.visual.transformer.resblocks.5.x"]),
    ],
)
def test_tensors_that_are_not_needed_are_ignored(version: int, extra: list[str], tmp_path: Path) -> None:
    """CLIP's vision half, a mask, and a stray tensor of a LoRA are ignored."""
    tensors = tiny_tensors(version)
    strays = {f"cond_stage_model.{name}": torch.zeros(1) for name in extra} | {"lora_te_x.alpha": torch.zeros(1)}
    sd = load(write(tmp_path / "model.safetensors", tensors | strays), prediction="eps")
    assert equal(written_again(sd), tensors)


def test_a_merge_of_two_text_encoders_is_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """One has the names of older transformers, without ``text_model.``. Nothing says which one to use."""
    text = SD1.text + "text_model."
    old = {name.replace(text, SD1.text): tensor + 1 for name, tensor in tensors.items() if name.startswith(text)}
    with pytest.raises(CheckpointError, match=f"{SD1.text}.* under old and new names"):
        load(write(tmp_path / "model.safetensors", tensors | old))


def test_neither_version(tmp_path: Path) -> None:
    one, two = tiny_tensors(1), tiny_tensors(2)  # only their text encoders have different names
    for mixed in (
        two | one,
        {name: t for name, t in (two | one).items() if not name.startswith("cond_stage_model.transformer.")},
        {name: t for name, t in (one | two).items() if not name.startswith("cond_stage_model.model.")},
    ):
        with pytest.raises(CheckpointError, match="model.safetensors is neither"):
            load(write(tmp_path / "model.safetensors", mixed), prediction="eps")


def test_fused_rows_that_do_not_divide(tmp_path: Path) -> None:
    tensors = tiny_tensors(version=2)
    name = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    tensors[name] = torch.cat([tensors[name], torch.zeros(2, 64)])
    with pytest.raises(CheckpointError, match="194 rows"):
        load(write(tmp_path / "model.safetensors", tensors), prediction="eps")


@pytest.mark.parametrize("version, padding", [(1, END), (2, 0)])
def test_padding_is_the_versions(version: int, padding: int, tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", tiny_tensors(version))
    sd = load(file, prediction="eps", tokenizer=TOKENIZER)
    assert sd.tokenizer("a", padding="max_length").input_ids[-1] == padding
    assert sd.encode_prompt(["a red apple"]).tokens.shape == (1, TOKENS, 64)


def test_a_model_that_no_single_file_can_hold(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"heads=\(8, 8\).*heads=\(2, 2\).*Write a folder"):
        written_again(load(tiny_model))


@pytest.mark.parametrize("change", [dict(scaling_factor=0.3), dict(groups=8)], ids=str)
def test_a_vae_that_no_single_file_can_hold(change: dict, single: Path) -> None:
    sd = load(single)
    vae = replace(sd.vae.config, **change)
    text = sd.text_encoder.state_dict(), sd.text_encoder.config
    with pytest.raises(ValueError, match="Write a folder"):
        to_single_file(sd.unet.state_dict(), sd.unet.config, sd.vae.state_dict(), vae, text)


def test_a_misspelt_path_is_not_looked_up_online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two words and a slash are a hub id, unless the first is an existing folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minidistill.formats.hub.snapshot_download", lambda *_, **__: pytest.fail("looked up online"))
    (tmp_path / "models").mkdir()
    with pytest.raises(CheckpointError, match="There is no models/mine"):
        load("models/mine")


# Folders


def as_bin(folder: Path) -> None:
    for file in list(folder.glob("*/*.safetensors")):
        stem = "pytorch_model" if file.stem == "model" else file.stem
        torch.save(load_file(file), file.with_name(f"{stem}.bin"))
        file.unlink()


def as_shards(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = sorted(load_file(file).items())
    places = {}
    for i, half in enumerate((tensors[::2], tensors[1::2])):
        name = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file(dict(half), file.with_name(name))
        places |= dict.fromkeys(dict(half), name)
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"weight_map": places}))
    file.unlink()


@pytest.mark.parametrize("change", [as_bin, as_shards])
def test_folders_of_other_files(change: Callable, folder: Path, sd: StableDiffusion) -> None:
    change(folder)
    assert equal(load(folder).unet.state_dict(), sd.unet.state_dict())
    assert equal(load(folder).text_encoder.state_dict(), sd.text_encoder.state_dict())


def test_variants(folder: Path, sd: StableDiffusion) -> None:
    for file in folder.rglob("*.safetensors"):
        half = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(half, file.with_name(f"{file.stem}.fp16.safetensors"))
    half = {name: tensor.half().float() for name, tensor in sd.unet.state_dict().items()}
    assert equal(load(folder, variant="fp16").unet.state_dict(), half)
    assert equal(load(folder).unet.state_dict(), sd.unet.state_dict())
    for file in folder.rglob("*model.safetensors"):
        file.unlink()
    assert equal(load(folder).unet.state_dict(), half)  # the last resort
    with pytest.raises(CheckpointError, match=r"no diffusion_pytorch_model\.bf16\.safetensors.*--variant"):
        load(folder, variant="bf16")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a\\b.safetensors"])
def test_an_index_names_no_file_elsewhere(name: str, folder: Path) -> None:
    as_shards(folder)
    save_file({"conv_in.weight": torch.zeros(32, 4, 3, 3)}, folder / "secret.safetensors")
    index = next(folder.rglob("*.index.json"))
    places = json.loads(index.read_text())["weight_map"] | {"conv_in.weight": name}
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match="not a file beside it"):
        load(folder)


@pytest.mark.parametrize(
    "changes",
    [dict(attn_implementation="someone/kernel@main"), dict(return_dict=False), dict(output_hidden_states="yes")],
    ids=str,
)
def test_unknown_text_encoder_settings_are_ignored(changes: dict, folder: Path, sd: StableDiffusion) -> None:
    """Transformers would obey these: download and run that kernel, or return a tuple."""
    edit_json(folder / "text_encoder/config.json", changes)
    found = load(folder)
    assert found.text_encoder.config._attn_implementation == "sdpa"
    assert torch.equal(found.encode_prompt(["an apple"]).tokens, sd.encode_prompt(["an apple"]).tokens)


@pytest.mark.parametrize(
    "changes",
    [
        dict(sample_size=[8, 8]),
        dict(only_cross_attention=[False, False]),
        dict(upcast_attention=None),
        dict(layers_per_block=[1, 1], cross_attention_dim=[32, 32]),
        dict(act_fn="swish"),
    ],
    ids=str,
)
def test_equivalent_settings(changes: dict, folder: Path, sd: StableDiffusion) -> None:
    config = folder / "unet/config.json"
    edit_json(config, changes)
    assert load(folder).unet.config == sd.unet.config
    edit_json(config, {"sample_size": None})
    assert load(folder).unet.config.sample_size == 64


@pytest.mark.parametrize("version, side", [("0.4.0.dev0", 64), ("0.8.1", 64), ("0.9.0", 32), ("0.42.1", 32)])
def test_the_size_that_early_converters_wrote(version: str, side: int, folder: Path) -> None:
    """diffusers' pipeline replaces it with 64 in files written before 0.9."""
    edit_json(folder / "unet/config.json", {"sample_size": 32, "_diffusers_version": version})
    assert load(folder).unet.config.sample_size == side


def test_a_configuration_of_any_length(folder: Path) -> None:
    (folder / "unet/config.json").write_text('{"a": [' + "[]," * 500_000 + "1]}")
    with pytest.raises(CheckpointError, match="unet/config.json is far too long"):
        load(folder)


def test_a_folder_of_another_kind_is_named(folder: Path) -> None:
    """SD 3 and Flux have no UNet, as their index says."""
    shutil.rmtree(folder / "unet")
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="StableDiffusion3Pipeline"):
        load(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_every_tensor_that_does_not_fit_is_listed(part: str, folder: Path) -> None:
    (file,) = (folder / part).glob("*.safetensors")
    wanted, strange = load_file(file), {f"x.{i}": torch.zeros(1) for i in range(200)}
    save_file(strange, file)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert all(name in str(caught.value) for name in [*wanted, *strange])


@pytest.mark.parametrize(
    "config, alpha_to_one, beta_end",
    [
        (dict(_class_name="PNDMScheduler", skip_prk_steps=True), False, 0.02),
        (dict(_class_name="DDIMScheduler", steps_offset=0, beta_end=0.012), True, 0.012),
        (dict(_class_name="DDIMScheduler", set_alpha_to_one=False), False, 0.02),
        (dict(_class_name="EulerDiscreteScheduler"), True, 0.02),  # ends at sigma 0
    ],
)
def test_defaults_of_samplers(config: dict, alpha_to_one: bool, beta_end: float, folder: Path) -> None:
    """It has the default of the sampler's class, except the offset, which is always Stable Diffusion's."""
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(config))
    found = read_schedule_config(file, None)
    assert (found.set_alpha_to_one, found.beta_end, found.steps_offset) == (alpha_to_one, beta_end, 1)


@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_with_zero_terminal_snr_the_spacing_is_the_files(kind: str, folder: Path) -> None:
    changes = dict(timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type="v_prediction")
    edit_json(folder / "scheduler/scheduler_config.json", {"_class_name": kind} | changes)
    sd = load(folder)
    assert sd.schedule.timesteps(4) == [999, 749, 499, 249] and sd.schedule.timesteps(4, "leading")[0] == 751
    for guidance in (1, 3):
        images = [
            sd.sample("an apple", steps=3, guidance=guidance, spacing=s)[0] for s in (None, "trailing", "leading")
        ]
        assert images[0].tobytes() == images[1].tobytes() != images[2].tobytes()


def test_a_text_encoder_that_is_a_whole_clip(folder: Path) -> None:
    file, expected = folder / "text_encoder/model.safetensors", load(folder).encode_prompt(["an apple"]).tokens
    extras = {"text_projection": torch.zeros(2, 2), "logit_scale": torch.ones(())}
    extras |= {"text_projection.weight": torch.zeros(2, 2)}
    extras |= {"vision_model.post_layernorm.bias": torch.zeros(2), "visual_projection.weight": torch.zeros(2, 2)}
    save_file(load_file(file) | extras, file, {"format": "pt"})
    assert torch.equal(load(folder).encode_prompt(["an apple"]).tokens, expected)


@pytest.mark.parametrize("length", [-5, "x", 30_000_000])
def test_a_prompt_is_as_long_as_the_encoder_reads(length: object, folder: Path) -> None:
    edit_json(folder / "tokenizer/tokenizer_config.json", {"model_max_length": length})
    assert load(folder).encode_prompt(["an apple"]).tokens.shape == (1, TOKENS, 32)


UNET_CONFIG, VAE_CONFIG, TEXT_CONFIG = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULE = "scheduler/scheduler_config.json"
LENGTHS = "unet/config.json .*should have 2 values, .*block_out_channels"
NARROW = dict(transformer_layers_per_block=[1, [1, 1]], reverse_transformer_layers_per_block=[[2, 2], 1])
FEW_STEPS = "few steps without guidance"  # SD Turbo, for example: guidance would burn its images
REFUSED = [
    (UNET_CONFIG, dict(layers_per_block=10**9), UNET_CONFIG),
    (UNET_CONFIG, dict(block_out_channels=["32", 64]), UNET_CONFIG),
    (UNET_CONFIG, dict(block_out_channels=[]), UNET_CONFIG),
    (UNET_CONFIG, dict(attention_head_dim=7), "unet"),  # which is found when the network is made
    (UNET_CONFIG, dict(norm_num_groups=0), UNET_CONFIG),
    (UNET_CONFIG, dict(down_block_types=5), UNET_CONFIG),
    (UNET_CONFIG, dict(center_input_sample=True), UNET_CONFIG),
    (UNET_CONFIG, dict(time_embedding_act_fn="silu"), UNET_CONFIG),
    (UNET_CONFIG, dict(mid_block_only_cross_attention=True), UNET_CONFIG),
    (UNET_CONFIG, dict(only_cross_attention=[False, True]), UNET_CONFIG),
    (UNET_CONFIG, dict(sample_size=[8, 16]), UNET_CONFIG),
    (UNET_CONFIG, dict(layers_per_block=[1, 2]), UNET_CONFIG),
    (VAE_CONFIG, dict(scaling_factor=float("nan")), VAE_CONFIG),
    (TEXT_CONFIG, dict(num_hidden_layers=10**9), TEXT_CONFIG),
    (TEXT_CONFIG, dict(hidden_act="unheard of"), "text_encoder"),
    (TEXT_CONFIG, dict(hidden_size="wide"), TEXT_CONFIG),
    (TEXT_CONFIG, dict(model_type="t5"), TEXT_CONFIG),
    (TEXT_CONFIG, dict(layer_norm_eps=float("nan")), TEXT_CONFIG),
    (UNET_CONFIG, dict(attention_head_dim=[2]), LENGTHS),
    (UNET_CONFIG, dict(attention_head_dim=[2, 2, 2]), LENGTHS),
    (UNET_CONFIG, dict(transformer_layers_per_block=[1]), LENGTHS),
    (UNET_CONFIG, dict(down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"]), LENGTHS),
    (UNET_CONFIG, dict(in_channels=9), "inpainting"),
    (UNET_CONFIG, dict(addition_embed_type="image"), "another model"),
    (UNET_CONFIG, NARROW, "another"),  # Segmind's smaller SDXL
    (VAE_CONFIG, dict(mid_block_add_attention=False), "another model"),
    (TEXT_CONFIG, dict(use_attention_mask=True), "use_attention_mask"),  # diffusers would mask padding
    (SCHEDULE, dict(_class_name="FlowMatchEulerDiscreteScheduler"), "flow matching"),
    (SCHEDULE, dict(use_flow_sigmas=True), "flow matching"),
    (SCHEDULE, dict(thresholding=True), "thresholding"),  # clips z_0 at every step
    (SCHEDULE, dict(_class_name="LCMScheduler"), FEW_STEPS),
    (SCHEDULE, dict(_class_name="EulerDiscreteScheduler", timestep_spacing="trailing"), FEW_STEPS),
    *((SCHEDULE, dict(_class_name="DDIMScheduler", timestep_spacing=x), SCHEDULE) for x in ("trailing", "linspace")),
    *((SCHEDULE, dict(_class_name="DDIMScheduler") | x, SCHEDULE) for x in (dict(beta_end=5), dict(beta_start=1))),
]


@pytest.mark.parametrize("file, changes, message", REFUSED, ids=str)
def test_configurations_that_are_refused(file: str, changes: dict, message: str, folder: Path) -> None:
    edit_json(folder / file, changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


# Refusals


@pytest.mark.parametrize(
    "extra, kind",
    [
        ({"conditioner.embedders.0.transformer.x": torch.zeros(1)}, "SDXL"),
        ({UNET + "input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}, "inpainting"),
        ({UNET + "label_emb.0.0.weight": torch.zeros(1)}, "unCLIP"),
        ({"conditioner.embedders.0.model.x": torch.zeros(1)}, "SD 2.x in a newer layout"),
        ({"control_model.time_embed.0.weight": torch.zeros(1)}, "ControlNet"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_other_models_are_named(extra: dict, kind: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"model.safetensors is .*{kind}"):
        load(write(tmp_path / "model.safetensors", tensors | extra))


def test_a_part_or_a_lora_is_no_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="name the whole folder"):
        load(folder / "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="LoRA"):
        load(write(tmp_path / "lora.safetensors", {"lora_unet_x.lora_down.weight": torch.zeros(1)}))


def test_all_wrong_tensors_are_listed_by_the_files_names(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    changed = dict(tensors)
    del changed[CONV]
    changed[LINEAR] = torch.zeros(3, 5)
    changed[LINEAR.replace("weight", "bias")] = torch.zeros(128, dtype=torch.int32)
    changed[UNET + "input_blocks.7.0.op.weight"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as caught:
        load(write(tmp_path / "model.safetensors", changed))
    message = str(caught.value)
    assert str(tmp_path / "model.safetensors") in message and "(4 tensors)" in message
    assert f"missing: {CONV} [32, 32, 3, 3]" in message
    assert f"misshapen: {LINEAR} is [3, 5], should be [128, 32]" in message
    assert "not floating point: model.diffusion_model.time_embed.0.bias holds int32" in message
    assert "unexpected: model.diffusion_model.input_blocks.7.0.op.weight [7]" in message


def test_incomplete(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    name = UNET + "middle_block.1.proj_in.weight"
    changed = {key: tensor for key, tensor in tensors.items() if key != name}
    with pytest.raises(CheckpointError, match=f"lacks '{name}'"):
        load(write(tmp_path / "model.safetensors", changed))


def test_flags_that_do_not_fit(single: Path, tiny_model: Path) -> None:
    with pytest.raises(CheckpointError, match="no EMA copy"):
        load(single, ema=True)
    with pytest.raises(CheckpointError, match="folder: leave --ema out"):
        load(tiny_model, ema=True)
    with pytest.raises(CheckpointError, match="single file: leave --variant out"):
        load(single, variant="fp16")


def header(**entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def entry(start: int, stop: int, dtype: str = "F32", shape: object = (1,)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


NOT_CHECKPOINTS = {
    "empty": (b"", "is empty"),
    "a web page": (b"<!DOCTYPE html><html>404</html>", "web page"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "git lfs pull"),
    "noise": (bytes(range(200, 256)), "not a readable checkpoint"),
    "short": (b"\x01\x02", "not a readable checkpoint"),
    "long header": ((2**40).to_bytes(8, "little") + b"{}", "header too large"),
    "no JSON": ((9).to_bytes(8, "little") + b"{'a': 1}}", "invalid JSON"),
    "deep JSON": ((50_006).to_bytes(8, "little") + b'{"a":' + b"[" * 50_000 + b"}", "recursion limit"),
    "past the end": (header(a=entry(0, 4)), "not fully covered"),
    "overlap": (header(a=entry(0, 4), b=entry(2, 6)) + bytes(6), "invalid offset for tensor `b`"),
    "gap": (header(a=entry(0, 4), b=entry(8, 12)) + bytes(12), "invalid offset for tensor `b`"),
    "left over": (header(a=entry(0, 4)) + bytes(9), "not fully covered"),
    "metadata": (header(__metadata__={"modelspec.prediction_type": []}), "expected a string"),
    "unknown dtype": (header(a=entry(0, 4, dtype="X4")) + bytes(4), "unknown variant `X4`"),
    "negative": (header(a=entry(-4, 0)) + bytes(4), "integer `-4`"),
    "no numbers": (header(a=entry(0, 4, shape=("1",))) + bytes(4), 'string "1", expected usize'),
    "wrong size": (header(a=entry(0, 4, shape=(7,))) + bytes(4), "invalid shape"),
    "enormous": (header(a=entry(0, 4, shape=(2**40, 2**40))) + bytes(4), "overflow"),
}


@pytest.mark.parametrize("contents, message", NOT_CHECKPOINTS.values(), ids=NOT_CHECKPOINTS)
@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_files_that_are_not_checkpoints(name: str, contents: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(contents)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(file)
    assert str(file) in str(caught.value)


def test_a_folder_for_a_file(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.unlink()
    file.mkdir()
    with pytest.raises(CheckpointError, match="a folder, where a file should be"):
        load(folder)


def test_every_dtype_of_safetensors(tmp_path: Path) -> None:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    tensors = {str(dtype): torch.ones(2, 3, dtype=dtype) for dtype in dtypes} | {"scalar": torch.tensor(3.0)}
    tensors |= {"none": torch.zeros(0, 4), "float8": torch.ones(5).to(torch.float8_e4m3fn)}
    (tmp_path / "all").write_bytes(save(tensors, {"a": "b"}))
    found, metadata = read_tensors(tmp_path / "all")
    assert metadata["a"] == "b" and set(found) == set(tensors)
    assert all(torch.equal(found[name].view(torch.uint8), t.view(torch.uint8)) for name, t in tensors.items() if t.ndim)


# The hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, without a network connection."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(cache: Path, repo: str, folder: Path) -> Path:
    """A repository in the layout of the hub client's cache."""
    place = cache / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("0" * 40)
    return Path(shutil.copytree(folder, place / "snapshots" / ("0" * 40)))


def test_a_cached_model_loads_offline(cache: Path, tiny_model: Path, sd: StableDiffusion) -> None:
    put(cache, "someone/tiny", tiny_model)
    found = load("someone/tiny")
    assert equal(found.unet.state_dict(), sd.unet.state_dict())
    assert torch.equal(found.encode_prompt(["an apple"]).tokens, sd.encode_prompt(["an apple"]).tokens)


def test_offline_and_not_cached(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="someone/nothing is neither") as caught:
        load("someone/nothing")
    assert len(str(caught.value).splitlines()) == 1


def test_the_tokenizer_of_a_single_file_is_the_hubs(cache: Path, single: Path, capsys) -> None:
    sd = load(single)
    ids = torch.arange(TOKENS)[None]
    assert sd.encode_tokens(ids).tokens.shape == (1, TOKENS, 64)  # needs none
    assert not capsys.readouterr().err
    with pytest.raises(CheckpointError, match="openai/clip-vit-large-patch14"):
        sd.encode_prompt(["an apple"])
    put(cache, "openai/clip-vit-large-patch14", TOKENIZER)
    capsys.readouterr()
    assert sd.encode_prompt(["an apple"]).tokens.shape == (1, TOKENS, 64)
    assert len([line for line in capsys.readouterr().err.splitlines() if "tokenizer" in line]) == 1


@pytest.fixture
def snapshot(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where downloaded files go, while ``folder`` is served in place of the hub."""
    return served(folder, tmp_path / "snapshot", monkeypatch)


def served(folder: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def download(repo: str, allow_patterns: list[str]) -> Path:
        for file in (file for file in folder.rglob("*") if file.is_file()):
            name = str(file.relative_to(folder))
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, snapshot / name)
        return snapshot

    monkeypatch.setattr("minidistill.formats.hub.snapshot_download", download)
    return snapshot


def test_another_model_is_refused_before_its_weights(folder: Path, snapshot: Path) -> None:
    edit_json(folder / "unet/config.json", {"in_channels": 9})
    with pytest.raises(CheckpointError, match="inpainting"):
        load("someone/large")
    assert not list(snapshot.rglob("*.safetensors"))


@pytest.mark.usefixtures("snapshot")
def test_fp16_as_the_last_resort(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    load("someone/tiny")


def test_interrupted_shards_are_fetched_again(folder: Path, snapshot: Path) -> None:
    as_shards(folder)
    load("someone/tiny")
    next(snapshot.rglob("*-of-*")).unlink()
    load("someone/tiny")


@pytest.mark.parametrize("published", ["everything", "bin", "fp16"])
def test_only_what_is_needed_is_fetched(published: str, folder: Path, snapshot: Path) -> None:
    if published == "bin":
        as_bin(folder)
    suffix = {"everything": ".safetensors", "bin": ".bin", "fp16": ".fp16.safetensors"}[published]
    for file in [*folder.rglob("*.safetensors"), *folder.rglob("*.bin")]:
        for other in (".bin", ".fp16.safetensors", ".fp16.bin", ".non_ema.safetensors"):
            if published != "bin":
                shutil.copy(file, file.with_name(file.name.split(".")[0] + other))
    for extra in ("safety_checker/model.safetensors", "v1-5-pruned.ckpt", "README.md"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_text("not needed")
    load("someone/tiny", variant="fp16" if published == "fp16" else None)
    weights = [file for file in snapshot.rglob("*") if file.is_file() and file.suffix not in (".json", ".txt")]
    assert len(weights) == 3 and all("".join(file.suffixes) == suffix for file in weights)
    assert (snapshot / "tokenizer/vocab.json").exists()


def test_a_variant_of_one_part_is_fetched(folder: Path, snapshot: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(file, file.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    with pytest.raises(CheckpointError, match="no diffusion_pytorch_model.int8.safetensors or other"):
        load("someone/tiny", variant="int8")
    assert not list(snapshot.rglob("*.safetensors"))
    with pytest.warns(UserWarning, match="no weights of variant non_ema"):
        load("someone/tiny", variant="non_ema")
    names = {str(file.relative_to(snapshot)) for file in snapshot.rglob("*.safetensors")}
    plain = {"vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    assert names == plain | {"unet/diffusion_pytorch_model.non_ema.safetensors"}


def test_a_variant_in_the_cache_does_not_stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in [*folder.rglob("*.safetensors")]:
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    asked = []
    monkeypatch.setattr(
        "minidistill.formats.hub.snapshot_download", lambda _, allow_patterns: asked.extend(allow_patterns) or folder
    )
    load("someone/tiny")
    assert "unet/diffusion_pytorch_model.safetensors" in asked


def test_sdxl_from_the_hub(tiny_xl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(tiny_xl, tmp_path / "published")
    (folder / "sd_xl_base_1.0.safetensors").write_text("not needed")
    snapshot = served(folder, tmp_path / "snapshot", monkeypatch)
    sd = load("someone/xl")
    assert equal(sd.text_encoder.state_dict(), load(tiny_xl).text_encoder.state_dict())
    assert len(list(snapshot.rglob("*.safetensors"))) == 4 and (snapshot / "tokenizer_2/vocab.json").exists()
    snapshot = served(folder, tmp_path / "other", monkeypatch)
    edit_json(folder / "model_index.json", {"requires_aesthetics_score": True})
    with pytest.raises(CheckpointError, match="refiner"):
        load("someone/refiner")
    assert not list(snapshot.rglob("*.safetensors"))


# What people have on disk


def test_nulls_in_the_metadata(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write(tmp_path / "plain.safetensors", tensors)
    data = (tmp_path / "plain.safetensors").read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:length]) | {
        "__metadata__": {"modelspec.prediction_type": "v", "hash": None, "epoch": 3}
    }
    (tmp_path / "null.safetensors").write_bytes(header(**entries) + data[length:])
    sd = load(tmp_path / "null.safetensors")
    assert sd.schedule.prediction == "v"
    assert equal(sd.unet.state_dict(), load(tmp_path / "plain.safetensors").unet.state_dict())


MARKS = {
    "kohya": (2, {"modelspec.prediction_type": "epsilon"}, [], "eps"),
    "kohya, v": (1, {"modelspec.prediction_type": "v"}, [], "v"),
    "ComfyUI": (2, {"modelspec.predict_key": "epsilon"}, [], "eps"),
    "ComfyUI, v": (1, {"modelspec.predict_key": "v"}, [], "v"),
    "architecture": (2, {"modelspec.architecture": "stable-diffusion-v2-512"}, [], "eps"),
    "architecture, v": (2, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, [], "v"),
    "a tensor": (1, {}, ["v_pred"], "v"),
    "a tensor counts more": (1, {"modelspec.prediction_type": "epsilon"}, ["v_pred", "ztsnr"], "v"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", MARKS)
def test_what_a_file_says_of_its_prediction(kind: str, tmp_path: Path) -> None:
    version, metadata, marks, prediction = MARKS[kind]
    tensors = tiny_tensors(version) | {name: torch.zeros(0) for name in marks}
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    sd = load(tmp_path / "model.safetensors")
    assert sd.schedule.prediction == prediction
    assert (sd.schedule.alphas_cumprod[-1] < 1e-6) == (sd.schedule.timesteps(2)[0] == 999) == ("ztsnr" in marks)
    large = (version, prediction) == (2, "v")  # SD 2.1 at 768 pixels, whose attention overflows in float16
    assert (sd.unet_config.sample_size, sd.unet_config.upcast_attention) == ((96, True) if large else (64, False))


def test_an_unknown_prediction_is_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "model.safetensors", {"modelspec.prediction_type": "edm"})
    with pytest.raises(CheckpointError, match='predicts "edm"; known are epsilon and v'):
        load(tmp_path / "model.safetensors")
    assert load(tmp_path / "model.safetensors", prediction="v").schedule.prediction == "v"


@pytest.mark.parametrize("spread, prediction", [(0.05, "eps"), (0.15, "v")])
def test_an_sd_2_that_says_nothing_is_guessed_aloud(spread: float, prediction: str, tmp_path: Path) -> None:
    bias = {UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias": spread * torch.tensor([1.0, -1.0])}
    other = {"v": "eps", "eps": "v"}[prediction]
    with pytest.warns(UserWarning, match=f"assuming {prediction}, .*--prediction {other}"):
        model = read_single_file(write(tmp_path / "model.safetensors", tiny_tensors(2) | bias))
    assert model.schedule.prediction == prediction


def test_zero_terminal_snr_needs_v(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model.safetensors: .*zero terminal SNR.*--prediction v"):
        load(write(tmp_path / "model.safetensors", tensors | {"ztsnr": torch.zeros(0)}))


@pytest.mark.parametrize("part", ["VAE", "UNet", "text encoder"])
def test_a_file_without_a_part(part: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    prefix = {"VAE": "first_stage_model.", "UNet": UNET, "text encoder": "cond_stage_model."}[part]
    left = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    with pytest.raises(CheckpointError, match=f"model.safetensors .* has no {part}. Use a version"):
        load(write(tmp_path / "model.safetensors", left))


def test_a_compiled_network_is_read(folder: Path, sd: StableDiffusion) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({f"module._orig_mod.{name}": tensor for name, tensor in load_file(file).items()}, file)
    assert equal(load(folder).unet.state_dict(), sd.unet.state_dict())
    as_shards(folder)
    assert equal(load(folder).unet.state_dict(), sd.unet.state_dict())
    save_file({"_orig_mod.a": torch.zeros(1), "a": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="under two names"):
        load(folder)


def test_shards_of_a_merged_student_say_so(folder: Path) -> None:
    as_shards(folder)
    for shard in folder.glob("unet/*-of-*"):
        save_file(load_file(shard), shard, {"guidance": "4"})
    assert load(folder).learned_guidance == "4"


@pytest.mark.parametrize(
    "key", ["to_q.base_layer.weight", "to_q.lora_A.default.weight", "processor.to_q_lora.up.weight"]
)
def test_a_lora_inside_a_network_is_named(key: str, folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {f"mid_block.attentions.0.transformer_blocks.0.attn1.{key}": torch.zeros(2, 2)}, file)
    with pytest.raises(CheckpointError, match="saved with a LoRA inside"):
        load(folder)


def test_clip_skip_by_configuration(folder: Path, sd: StableDiffusion) -> None:
    file = folder / "text_encoder/model.safetensors"
    tensors = load_file(file)
    more = {name.replace("layers.0.", "layers.1."): x.clone() for name, x in tensors.items() if "layers.0." in name}
    save_file(tensors | more, file)
    with pytest.warns(UserWarning, match="num_hidden_layers 1.*leaving out the last"):
        assert equal(load(folder).text_encoder.state_dict(), sd.text_encoder.state_dict())


def test_a_variant_of_one_part(folder: Path, sd: StableDiffusion) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file.with_stem(f"{file.stem}.non_ema"))
    with pytest.warns(UserWarning, match="(vae|text_encoder) has no weights of variant non_ema"):
        other = load(folder, variant="non_ema")
    assert equal(other.vae.state_dict(), sd.vae.state_dict())
    assert torch.equal(other.unet.conv_in.weight, sd.unet.conv_in.weight + 1)
    file.unlink()
    with pytest.raises(CheckpointError, match="--variant can select.*non_ema.safetensors"):
        load(folder)


def test_a_folder_of_the_hubs_cache(folder: Path, tmp_path: Path, capsys) -> None:
    root = tmp_path / "models--owner--tiny"
    shutil.copytree(folder, root / "snapshots/new")
    (root / "snapshots/old").mkdir()
    (root / "refs").mkdir()
    (root / "refs/main").write_text("new")
    assert load(root).path == root / "snapshots/new" and "using" in capsys.readouterr().err
    (root / "refs/main").unlink()
    os.utime(root / "snapshots/old", (0, 0))
    assert load(root).path == root / "snapshots/new"


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_values_that_are_not_finite_are_named(part: str, value: float, folder: Path) -> None:
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[0] = value
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"{file}.*not finite.* {name}:"):
        load(folder)


def test_values_too_large_for_the_dtype(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    large = tensors[LINEAR].clone()
    large[0, 0] = 1e6
    file = write(tmp_path / "model.safetensors", tensors | {LINEAR: large})
    assert load(file, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=f"{LINEAR} that float16 cannot hold"):
        load(file, dtype=torch.float16)


@pytest.mark.parametrize("part, changes", [("vae", dict(latent_channels=8)), ("text_encoder", dict(hidden_size=64))])
def test_parts_of_different_models(part: str, changes: dict, folder: Path) -> None:
    file = folder / part / "config.json"
    edit_json(file, changes)
    new = VAE(read_vae_config(file)) if part == "vae" else CLIPTextModel(CLIPTextConfig.from_pretrained(file.parent))
    save_file(new.state_dict(), next((folder / part).glob("*.safetensors")))
    with pytest.raises(CheckpointError, match="parts of different models"):
        load(folder)


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    sd = load(folder)
    sd.tokenizer.add_tokens(["<sks>"])
    sd.tokenizer.save_pretrained(folder / "tokenizer")
    counts = f"tokenizer has {VOCABULARY + 1} tokens, and the encoder knows {VOCABULARY}"
    with pytest.raises(CheckpointError, match=counts):
        load(folder).encode_prompt(["a <sks> apple"])


def test_a_tokenizer_without_some_of_its_merges(folder: Path) -> None:
    """A merges.txt that is cut off after a line reads, and spells the words that it lacks."""
    merges = folder / "tokenizer/merges.txt"
    lines = merges.read_text().splitlines()
    merges.write_text("\n".join(lines[:500]))
    first = lines[500].replace(" ", "")
    with pytest.raises(CheckpointError, match=f'tokenizer is damaged .no merge makes the token "{first}"'):
        load(folder).encode_prompt(["a red apple"])


@pytest.mark.parametrize("older", [False, True])
def test_a_learned_word_needs_no_merge(folder: Path, older: bool) -> None:
    """It is in tokenizer.json, or in older folders in added_tokens.json."""
    tokenizer = load(folder).tokenizer
    tokenizer.add_tokens(["<sks>"])
    if older:
        (folder / "tokenizer/added_tokens.json").write_text(json.dumps({"<sks>": VOCABULARY}))
    else:
        tokenizer.save_pretrained(folder / "tokenizer")
        (folder / "tokenizer/vocab.json").unlink()
        (folder / "tokenizer/merges.txt").unlink()
    tokenizer = read_tokenizer(folder / "tokenizer", CLIPTextConfig())
    assert tokenizer.tokenize("a <sks> apple") == ["a</w>", "<sks>", "apple</w>"]


def test_a_learned_word_of_several_embeddings_is_refused(folder: Path) -> None:
    """Textual inversion may save <sks>, <sks>_1, ... For <sks> in a prompt, diffusers writes them all."""
    words = {"<sks>": VOCABULARY, "<sks>_1": VOCABULARY + 1}
    (folder / "tokenizer/added_tokens.json").write_text(json.dumps(words))
    with pytest.raises(CheckpointError, match='tokenizer has a learned word of several embeddings ."<sks>", "<sks>_1"'):
        read_tokenizer(folder / "tokenizer", CLIPTextConfig())


def test_each_weight_is_copied_once():
    """A second copy, to reorder a kernel or to look for NaN, took as long as reading the weight."""
    stored = randn(64, 64, 3, 3, dtype=torch.float16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        weight = convert(stored, torch.float32)
        assert is_finite(weight)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert weight.nbytes <= allocated < 1.1 * weight.nbytes
    assert torch.equal(weight, stored.float()) and weight.is_contiguous(memory_format=torch.channels_last)
    for value in (math.inf, -math.inf, math.nan):
        weight[5, 6, 1, 2] = value
        assert not is_finite(weight) and not is_finite(weight[:, :, 1].mT)
