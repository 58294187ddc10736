"""lora_formats.py: the names and alphas of each format, and the errors for files that have others."""

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import TINY_UNET, error, randn, tiny_student, tiny_unet
from torch import Tensor, nn

from minidistill import CheckpointError, load_lora, save_lora
from minidistill.config import SDXL_UNET
from minidistill.export.__main__ import main as export
from minidistill.formats.lora_formats import kohya_tensors, layer_name, peft_tensors, read_lora
from minidistill.formats.lora_io import fit, inject_file, merge_file
from minidistill.formats.original_names import translate, unet_names
from minidistill.formats.tensor_files import write_tensors
from minidistill.lora import lora_layers
from minidistill.unet import UNet


def underscored(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


LAYER, CONV = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1"
PEFT, KOHYA = f"unet.{LAYER}.lora_A.weight", f"{underscored(LAYER)}.lora_down.weight"
KEYS = {  # of lora_down, for LAYER
    "peft": PEFT,
    "diffusers' scripts": f"unet.{LAYER}.lora.down.weight",
    "diffusers' first scripts": f"{LAYER.replace('.to_q', '.processor.to_q_lora')}.down.weight",
    "kohya": KOHYA,
}


def up_key(key: str) -> str:
    return key.replace("lora_A", "lora_B").replace("lora_down", "lora_up").replace(".down.", ".up.")


def pair(rank: int = 2) -> tuple[Tensor, Tensor]:
    """A LoRA for LAYER."""
    return randn(rank, 64), randn(64, rank, seed=1)


def one_layer(path: Path, key: str, extra: dict | None = None, header: dict | None = None, rank: int = 2) -> Path:
    """A file with one pair, whose lora_down has this key."""
    save_file(dict(zip((key, up_key(key)), pair(rank))) | (extra or {}), path, header)
    return path


def test_to_out_in_the_first_scripts_of_diffusers(tmp_path: Path):
    file = one_layer(tmp_path / "x", f"{LAYER.replace('.to_q', '.processor.to_out_lora')}.down.weight")
    assert list(read_lora(file).layers) == [LAYER.replace(".to_q", ".to_out.0")]


def test_every_layer_of_a_unet_is_known_by_its_underscored_name():
    with torch.device("meta"):
        unet = UNet(SDXL_UNET)  # which has layers of every name
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert any("downsamplers" in name for name in layers) and any("conv_shortcut" in name for name in layers)
    assert [layer_name(underscored(name)) for name in layers] == layers
    assert [layer_name(f"unet.{name}") for name in layers] == layers


@pytest.mark.parametrize("rank, alpha", [(1, None), (3, None), (2, 1.0), (3, 0.1), (3, 7.0), (2, 0.0)])
@pytest.mark.parametrize("tensors", [peft_tensors, kohya_tensors])
def test_a_round_trip_preserves_the_effect(tensors, rank: int, alpha: float | None, tmp_path: Path):
    student = tiny_student(rank, alpha)
    save_lora(student, tmp_path / "lora.safetensors")
    written = tensors(read_lora(tmp_path / "lora.safetensors"))
    write_tensors(tmp_path / "foreign.safetensors", written, {})
    found, expected = lora_layers(load_lora(tiny_unet(), tmp_path / "foreign.safetensors")), lora_layers(student)
    assert list(found) == list(expected)
    for name, layer in expected.items():
        assert torch.equal(found[name].lora_down, layer.lora_down)
        assert torch.equal(found[name].scale * found[name].lora_up, layer.scale * layer.lora_up)


def test_tensors_are_unchanged_if_alpha_is_the_rank(tmp_path: Path):
    save_lora(tiny_student(), tmp_path / "lora.safetensors")
    file = read_lora(tmp_path / "lora.safetensors")
    peft, kohya = peft_tensors(file), kohya_tensors(file)
    assert len(peft) == 2 * len(file.layers) and len(kohya) == 3 * len(file.layers)
    for name, found in file.layers.items():
        assert torch.equal(peft[f"unet.{name}.lora_A.weight"], found.down)
        assert torch.equal(peft[f"unet.{name}.lora_B.weight"], found.up)
        name = underscored(name)
        assert torch.equal(kohya[f"{name}.lora_down.weight"], found.down)
        assert torch.equal(kohya[f"{name}.lora_up.weight"], found.up)
        assert torch.equal(kohya[f"{name}.alpha"], torch.tensor(2.0)) and kohya[f"{name}.alpha"].dtype == torch.float32
    assert file.layers[CONV].down.shape == (2, 64, 3, 3) and file.layers[CONV].up.shape == (64, 2, 1, 1)


# Files from other tools


@pytest.mark.parametrize("kind", KEYS)
def test_without_alpha_the_scale_is_one(kind: str, tmp_path: Path):
    file = read_lora(one_layer(tmp_path / "x.safetensors", KEYS[kind]))
    assert list(file.layers) == [LAYER] and file.layers[LAYER].scale == 1
    assert torch.equal(file.layers[LAYER].down, pair()[0]) and torch.equal(file.layers[LAYER].up, pair()[1])


def test_ranks_and_alphas_that_differ(tmp_path: Path):
    base = underscored(CONV)
    conv = {f"{base}.lora_down.weight": randn(4, 64, 3, 3), f"{base}.lora_up.weight": randn(64, 4, 1, 1, seed=2)}
    alphas = {f"{base}.alpha": torch.tensor(1.0), f"{underscored(LAYER)}.alpha": torch.tensor(8)}
    file = read_lora(one_layer(tmp_path / "x.safetensors", KOHYA, conv | alphas))
    assert {name: (p.rank, p.alpha) for name, p in file.layers.items()} == {LAYER: (2, 8), CONV: (4, 1)}
    student, merged = inject_file(tiny_unet(), file), tiny_unet()
    assert {name: layer.scale for name, layer in lora_layers(student).items()} == {LAYER: 4, CONV: 0.25}
    merge_file(merged, file)
    for name, layer in lora_layers(student).items():
        assert torch.equal(merged.get_submodule(name).weight, layer.weight + layer.delta())
    with pytest.raises(ValueError, match="one rank"):
        save_lora(student, tmp_path / "mixed.safetensors")


@pytest.mark.parametrize(
    "config, alpha",
    [
        ({"unet.r": 4, "unet.lora_alpha": 6}, 6),
        ({"lora_alpha": 6}, 6),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"to_q": 3}}, 3),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"^" + LAYER: 3}}, 3),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"^to_q": 3}}, 6),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"to_q": 3, LAYER: 4}}, 3),  # the first match
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"to_v": 3}}, 6),
        ({"unet.lora_alpha": 6, "unet.use_rslora": True}, 12),
        ({"text_encoder.lora_alpha": 6}, 4),
    ],
)
def test_alpha_of_a_peft_header(config: dict, alpha: float, tmp_path: Path):
    header = {"lora_adapter_metadata": json.dumps(config)}
    assert read_lora(one_layer(tmp_path / "x", PEFT, header=header, rank=4)).layers[LAYER].alpha == alpha


def test_an_alpha_beside_its_layer_counts_more_than_the_header(tmp_path: Path):
    """As in a file that somebody converted to kohya's names, with its header; ComfyUI reads the tensor."""
    alpha = {f"{underscored(LAYER)}.alpha": torch.tensor(1.0)}
    header = {"lora_adapter_metadata": '{"unet.lora_alpha": 6}'}
    assert read_lora(one_layer(tmp_path / "x", KOHYA, alpha, header)).layers[LAYER].alpha == 1


def test_half_precision_is_widened(tmp_path: Path):
    save_file({key: tensor.half() for key, tensor in zip((KOHYA, up_key(KOHYA)), pair())}, tmp_path / "x.safetensors")
    assert read_lora(tmp_path / "x.safetensors").layers[LAYER].down.dtype == torch.float32


def test_scale_times_alpha(tmp_path: Path):
    assert read_lora(one_layer(tmp_path / "x", PEFT), 0.25).layers[LAYER].scale == 0.25
    assert lora_layers(load_lora(tiny_unet(), tmp_path / "x", -0.5))[LAYER].scale == -0.5


def test_a_text_encoders_lora_alone(tmp_path: Path):
    save_file({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": randn(2, 4)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="not a LoRA for a UNet.*lora_te_text_model"):
        read_lora(tmp_path / "x")


def test_another_model_is_named_by_kohyas_header(tmp_path: Path):
    tensors = {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": randn(2, 4)}
    tensors |= {"lora_unet_input_blocks_4_1_proj_in.lora_up.weight": randn(4, 2)}
    save_file(tensors, tmp_path / "x", {"ss_base_model_version": "sdxl_base_v1-0"})
    with pytest.raises(CheckpointError, match="made for sdxl_base_v1-0.*\n.*input_blocks.4.1.proj_in"):
        load_lora(tiny_unet(), tmp_path / "x")


OTHER_MODELS = {  # key of lora_down, as the tools write it
    "Flux, diffusers": "transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight",
    "Flux, kohya": "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
    "Flux, ComfyUI": "diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight",
    "SD 3, kohya": "lora_unet_joint_blocks_0_x_block_attn_proj.lora_down.weight",
    "PixArt, peft": "base_model.model.transformer_blocks.0.attn1.to_k.lora_A.weight",
    "Wan": "diffusion_model.blocks.0.cross_attn.k.lora_A.weight",
}


@pytest.mark.filterwarnings("ignore:.*adapter_config")
@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_a_lora_of_another_kind_of_model(kind: str, tmp_path: Path):
    header = {"modelspec.architecture": "flux-1-dev/lora"}
    file = one_layer(tmp_path / "x.safetensors", OTHER_MODELS[kind], header=header)
    for to in ("peft", "kohya"):
        with pytest.raises(ValueError, match="x.safetensors is .* another kind of model.*for flux-1-dev/lora"):
            export([str(file), "--to", to])
    with pytest.raises(CheckpointError, match="another model than this one.*for flux-1-dev/lora"):
        load_lora(tiny_unet(), file)
    assert list(tmp_path.iterdir()) == [file]


# Every layer of the student in other people's spellings: our name and the original code's -> key of lora_down


def original(name: str) -> str:
    return translate(f"{name}.", unet_names(TINY_UNET)).removesuffix(".")


SPELLINGS = {
    "LyCORIS, OneTrainer": lambda name: f"{underscored(original(name))}.lora_down.weight",
    "original, with dots": lambda name: f"diffusion_model.{original(name)}.lora_A.weight",
    "original, in a checkpoint": lambda name: f"model.diffusion_model.{original(name)}.lora_down.weight",
    "peft": lambda name: f"base_model.model.{name}.lora_A.weight",
    "peft, adapter named": lambda name: f"base_model.model.unet.{name}.lora_A.default.weight",
    "peft, no model named": lambda name: f"{name}.lora_A.my-style.weight",
    "lycoris_": lambda name: f"lycoris_{name.replace('.', '_')}.lora_down.weight",
    "no prefix": lambda name: f"{name}.lora_down.weight",
    "compiled": lambda name: f"unet._orig_mod.{name}.lora.down.weight",
    "lora_linear_layer": lambda name: f"unet.{name}.lora_linear_layer.down.weight",
}


@pytest.mark.filterwarnings("ignore:.*adapter_config")
@pytest.mark.parametrize("kind", SPELLINGS)
def test_other_spellings(kind: str, tmp_path: Path):
    student, tensors = tiny_student(), {}
    for name, layer in lora_layers(student).items():
        key = SPELLINGS[kind](name)
        tensors |= {key: layer.lora_down.detach(), up_key(key): layer.lora_up.detach()}
    assert len(tensors) == 2 * len(lora_layers(student))
    save_file(tensors, tmp_path / "x.safetensors")
    unet = tiny_unet()
    merge_file(unet, read_lora(tmp_path / "x.safetensors"))
    for name, layer in lora_layers(student).items():
        assert torch.equal(unet.get_submodule(name).weight, layer.weight + layer.delta()), name


@pytest.mark.parametrize("prefix", ["base_model.model.", "unet.base_model.model."])
def test_alpha_of_a_peft_adapter(prefix: str, tmp_path: Path):
    """The second prefix is that of diffusers' ``save_lora_weights`` with the state dict of a peft model."""
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 1}')
    file = one_layer(tmp_path / "x.safetensors", f"{prefix}{LAYER}.lora_A.weight")
    assert read_lora(file).layers[LAYER].alpha == 1


@pytest.mark.parametrize("context, shape", [(1024, (2, 64)), (768, (2, 64, 1, 1))])
def test_projections_that_kohya_trains_as_convolutions(context: int, shape: tuple, tmp_path: Path):
    """SD 2.x has matrices there, and diffusers wants a LoRA of the same shape."""
    block = "down_blocks.0.attentions.0"
    proj_in, to_k = underscored(f"{block}.proj_in"), underscored(f"{block}.transformer_blocks.0.attn2.to_k")
    tensors = {f"{proj_in}.lora_down.weight": randn(2, 64, 1, 1), f"{proj_in}.lora_up.weight": randn(64, 2, 1, 1)}
    tensors |= {f"{to_k}.lora_down.weight": randn(2, context), f"{to_k}.lora_up.weight": randn(64, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert peft_tensors(read_lora(tmp_path / "x.safetensors"))[f"unet.{block}.proj_in.lora_A.weight"].shape == shape


def test_the_original_names_cannot_become_pefts(tmp_path: Path):
    key = SPELLINGS["LyCORIS, OneTrainer"](LAYER)
    file = read_lora(one_layer(tmp_path / "x.safetensors", key))
    assert set(kohya_tensors(file)) == {key, up_key(key), key.replace("lora_down.weight", "alpha")}
    with pytest.raises(ValueError, match="export --to kohya"):
        peft_tensors(file)


@pytest.mark.parametrize("down, up", [((2, 576), (64, 2)), ((2, 64, 3, 3), (64, 2)), ((2, 576), (64, 2, 1, 1))])
def test_a_flattened_convolution(down: tuple, up: tuple, tmp_path: Path):
    lora_down, lora_up, unet, before = randn(*down), randn(*up, seed=1), tiny_unet(), tiny_unet()
    save_file({f"{CONV}.lora_A.weight": lora_down, f"{CONV}.lora_B.weight": lora_up}, tmp_path / "x.safetensors")
    merge_file(unet, read_lora(tmp_path / "x.safetensors"))
    expected = before.get_submodule(CONV).weight + (lora_up.view(64, 2) @ lora_down.view(2, 576)).view(64, 64, 3, 3)
    assert error(unet.get_submodule(CONV).weight.detach(), expected.detach()) < 1e-6


def test_three_convolutions_of_lycoris(tmp_path: Path):
    down, mid, up = randn(2, 64, 1, 1), randn(2, 2, 3, 3, seed=1), randn(64, 2, 1, 1, seed=2)
    tensors = {f"{CONV}.lora_down.weight": down, f"{CONV}.lora_mid.weight": mid, f"{CONV}.lora_up.weight": up}
    save_file(tensors, tmp_path / "x.safetensors")
    student, x = load_lora(tiny_unet(), tmp_path / "x.safetensors").get_submodule(CONV), randn(1, 64, 4, 4, seed=3)
    student.switch.enabled = True
    expected = F.conv2d(x, student.weight, student.bias, padding=1)
    expected += F.conv2d(F.conv2d(F.conv2d(x, down), mid, padding=1), up)
    assert error(student(x).detach(), expected.detach()) < 1e-5


@pytest.mark.parametrize(
    "kind",
    ["bundle_emb.sks.clip_l", "bundle_emb.sks.string_to_param.*", "clip_l.a", "lora_te1_a", "lora_te_text_model_a"],
)
def test_what_belongs_to_the_text_encoder_is_left_out_aloud(kind: str, tmp_path: Path):
    extra = {key: randn(1, 32) for key in (f"{kind}.lora_down.weight", f"{kind}.lora_up.weight", kind)}
    with pytest.warns(UserWarning, match=r"x.safetensors also changes the text encoder .* words \(3 tensors\)"):
        assert list(read_lora(one_layer(tmp_path / "x.safetensors", KOHYA, extra)).layers) == [LAYER]


OTHER_KINDS = {
    "lora_unet_conv_in.hada_w1_a": "LoHa",
    "lora_unet_conv_in.lokr_w1": "LoKr",
    "lora_unet_conv_in.dora_scale": "DoRA",
    "lora_unet_conv_in.diff": "full differences",
    "lora_unet_conv_in.diff_b": "full differences",
    "lora_unet_conv_in.on_input": "IA3",
    "base_model.model.conv_in.ia3_l": "IA3",
    "base_model.model.conv_in.lora_magnitude_vector.default.weight": "DoRA",
    "base_model.model.conv_in.lora_B.bias": "trained biases",
    "emb_params": "textual inversion",
}


@pytest.mark.parametrize("key", OTHER_KINDS)
def test_other_changes_are_named_by_kind(key: str, tmp_path: Path):
    save_file({key: randn(2, 2), "lora_unet_conv_in.alpha": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=f"x.safetensors holds .*{OTHER_KINDS[key]}.*{key}"):
        read_lora(tmp_path / "x.safetensors")


def test_one_layer_under_two_names(tmp_path: Path):
    ours, theirs = SPELLINGS["no prefix"](LAYER), SPELLINGS["LyCORIS, OneTrainer"](LAYER)
    down, up = pair()
    save_file({ours: down, up_key(ours): up, theirs: down.clone(), up_key(theirs): up.clone()}, tmp_path / "x")
    with pytest.raises(CheckpointError, match=f"{LAYER} is there under two names"):
        load_lora(tiny_unet(), tmp_path / "x")


# Folders


@pytest.mark.parametrize("name", ["lora", "pytorch_lora_weights", "adapter_model"])
def test_the_lora_in_a_folder(name: str, tmp_path: Path):
    one_layer(tmp_path / "other.safetensors", KOHYA)
    one_layer(tmp_path / f"{name}.safetensors", PEFT, rank=4)
    assert read_lora(tmp_path).layers[LAYER].rank == 4
    (tmp_path / f"{name}.safetensors").unlink()
    with pytest.raises(CheckpointError, match="It holds other.safetensors"):
        read_lora(tmp_path)


@pytest.mark.parametrize(
    "config, alpha",
    [(dict(lora_alpha=6, r=4), 6), (dict(lora_alpha=8, use_rslora=True), 16), (dict(lora_alpha=None), 4)],
)
@pytest.mark.parametrize("kind", ["peft", "peft, no model named"])
def test_alpha_in_the_json_of_peft(kind: str, config: dict, alpha: float, tmp_path: Path):
    """A state dict of a model with an adapter has no prefix, but the adapter's name, and no alpha either."""
    one_layer(tmp_path / "adapter_model.safetensors", SPELLINGS[kind](LAYER), rank=4)
    with pytest.warns(UserWarning, match="no adapter_config.json"):
        assert read_lora(tmp_path).layers[LAYER].alpha == 4
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert read_lora(tmp_path).layers[LAYER].alpha == alpha


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_a_peft_adapter_that_changed_w_is_refused(start: str, tmp_path: Path):
    """Its pair was taken out of W, so beside an unchanged W it is wrong."""
    one_layer(tmp_path / "adapter_model.safetensors", SPELLINGS["peft"](LAYER), rank=4)
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(r=4, lora_alpha=4, init_lora_weights=start)))
    with pytest.raises(CheckpointError, match=f'initialised by "{start}".*path_initial_model_for_weight_conversion'):
        read_lora(tmp_path)


KEY = underscored(LAYER)
THREE = {f"{CONV}.lora_down.weight": randn(2, 64, 1, 1), f"{CONV}.lora_up.weight": randn(64, 2, 1, 1)}
MID, DO_NOT_FIT = f"{CONV}.lora_mid.weight", f"layers whose .* do not fit.*{CONV}"
NOT_FINITE = f"not finite.* {LAYER}.lora_up"
ADAPTERS = ("base_model.model.conv_in.lora_A.default.weight", "base_model.model.conv_in.lora_A.second.weight")
DAMAGED = {
    "not a number": ({up_key(KOHYA): torch.tensor([0.0] * 127 + [float("nan")]).view(64, 2)}, {}, NOT_FINITE),
    "endless": ({up_key(KOHYA): torch.tensor([0.0] * 127 + [float("inf")]).view(64, 2)}, {}, NOT_FINITE),
    "mid: in": (THREE | {MID: randn(2, 3, 3, 3)}, {}, DO_NOT_FIT),
    "mid: out": (THREE | {MID: randn(3, 2, 3, 3)}, {}, DO_NOT_FIT),
    "mid: a matrix": (THREE | {MID: randn(2, 2)}, {}, DO_NOT_FIT),
    "two adapters": ({key: randn(2, 4) for key in ADAPTERS}, {}, "two LoRAs for conv_in"),
    "int8": ({KOHYA: torch.zeros(2, 64).to(torch.int8)}, {}, "not floats"),
    "bool": ({KOHYA: torch.zeros(2, 64).to(torch.bool)}, {}, "not floats"),
    "float8": ({KOHYA: torch.zeros(2, 64).to(torch.float8_e4m3fn)}, {}, "not floats"),
    "half a pair": ({"lora_unet_conv_in.lora_down.weight": randn(2, 4, 3, 3)}, {}, "conv_in"),
    "alpha alone": ({"lora_unet_conv_in.alpha": torch.tensor(1.0)}, {}, "conv_in"),
    "two alphas": ({f"{KEY}.alpha": torch.ones(2)}, {}, "damaged"),
    "endless alpha": ({f"{KEY}.alpha": torch.tensor(float("inf"))}, {}, LAYER),
    "no alpha": ({f"{KEY}.alpha": torch.tensor(float("nan"))}, {}, LAYER),
    "other ranks": ({up_key(KOHYA): randn(64, 3)}, {}, LAYER),
    "rank 0": ({KOHYA: randn(0, 64), up_key(KOHYA): randn(64, 0)}, {}, LAYER),
    "header: no JSON": ({}, {"lora_adapter_metadata": "{"}, "damaged"),
    "header: a list": ({}, {"lora_adapter_metadata": "[1]"}, "damaged"),
    "header: deep": ({}, {"lora_adapter_metadata": "[" * 100_000}, "damaged"),
    "header: no number": ({}, {"lora_adapter_metadata": '{"unet.lora_alpha": "much"}'}, "damaged"),
    "header: a pattern": ({}, {"lora_adapter_metadata": '{"unet.alpha_pattern": {"to_(q|k)": 2}}'}, "to_"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_gets_one_sentence(case: str, tmp_path: Path):
    extra, header, named = DAMAGED[case]
    one_layer(tmp_path / "x.safetensors", KOHYA, extra, header)
    with pytest.raises(CheckpointError, match=f"x.safetensors.*(?:{named})"):
        read_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", KEYS)
def test_a_damaged_file_is_read_or_named(kind: str, tmp_path: Path):
    header = {"lora_adapter_metadata": '{"unet.lora_alpha": 3, "unet.alpha_pattern": {"to_q": 2}}'}
    data = one_layer(tmp_path / "whole", KEYS[kind], header=header).read_bytes()
    dice, refused, file = random.Random(0), 0, tmp_path / "x.safetensors"
    weights = dict(tiny_unet().named_parameters())
    for _ in range(300):
        damaged = bytearray(data[: dice.choice([len(data), dice.randrange(len(data))])])
        for _ in range(dice.randrange(4)):
            if damaged:  # most of the damage hits the header
                damaged[dice.randrange(min(len(damaged), 600))] = dice.randrange(256)
        file.write_bytes(damaged)
        try:
            fit(read_lora(file), weights)
        except CheckpointError as error:
            refused += 1
            assert "x.safetensors" in str(error)
    assert refused > 100


def test_equal_contents_equal_bytes(tmp_path: Path):
    tensors = dict(zip("ab", pair()))
    header = {key: key for key in ["the", "order", "of", "a", "header", "is", "arbitrary"]}
    for name in ("one", "two"):
        write_tensors(tmp_path / name, tensors, header)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert torch.equal(load_file(tmp_path / "one")["a"], tensors["a"])
    (tmp_path / "any file").touch()
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "any file").stat().st_mode
