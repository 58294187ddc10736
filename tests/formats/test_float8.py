"""W in 8 bits: the nearest codes, exact products, the gradients of a plain layer with that W, and only 8 bits kept."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import error, fill_up, losses, randn, tiny_student, tiny_unet, unet_inputs
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from minidistill import inject_lora, load, load_lora, merge_lora, save_lora
from minidistill.data.shards import fingerprint
from minidistill.export.__main__ import main as export
from minidistill.formats.float8 import Float8Weight, has_float8, to_float8
from minidistill.formats.load_model import build
from minidistill.formats.model_configs import Network
from minidistill.formats.tensor_files import read_tensors
from minidistill.lora import lora_parameters
from minidistill.training.recompute import recompute

LAYERS = {
    "linear": (partial(nn.Linear, 12, 10), (2, 5, 12)),
    "linear of vectors": (partial(nn.Linear, 12, 10), (3, 12)),
    "linear without bias": (partial(nn.Linear, 12, 10, bias=False), (2, 5, 12)),
    "convolution": (partial(nn.Conv2d, 6, 8, 3, padding=1), (2, 6, 7, 5)),
    "strided": (partial(nn.Conv2d, 6, 8, 3, stride=2, padding=1), (2, 6, 7, 5)),
    "1x1": (partial(nn.Conv2d, 6, 8, 1), (2, 6, 7, 5)),
}


@torch.no_grad()
def in_float8(network: nn.Module, prefix: str = "") -> nn.Module:
    """The network, frozen, with W in 8 bits."""
    weights = {name: to_float8(prefix + name, x.detach()) for name, x in network.state_dict().items()}
    network.load_state_dict(weights, assign=True)
    return network.requires_grad_(False)


@torch.no_grad()
def with_products(network: nn.Module) -> nn.Module:
    """The network with plain tensors of the same values."""
    for module in network.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if isinstance(p, Float8Weight):
                setattr(module, name, nn.Parameter(p.product(), requires_grad=False))
    return network


def gradients(model: nn.Module) -> list[Tensor]:
    """Predictions of teacher and student, and the gradients wrt z_t and the LoRA."""
    z_t, t, context = unet_inputs(dtype=torch.float64)
    z_t.requires_grad_()
    eps_hat, eps = model(z_t, t, context), model(z_t, t, context, lora_enabled=True)
    trained = [z_t, *lora_parameters(model)]
    return [eps_hat.detach(), eps.detach(), *torch.autograd.grad((eps - 2 * eps_hat).square().mean(), trained)]


def student(seed: int = 0, plain: bool = False) -> nn.Module:
    unet = in_float8(tiny_unet(seed).double())
    torch.manual_seed(seed)
    return fill_up(inject_lora(with_products(unet) if plain else unet, rank=2))


def test_every_value_gets_the_nearest_code():
    weight = randn(40, 50, seed=3, dtype=torch.float64) * randn(40, 1, seed=4, dtype=torch.float64).exp()
    kept = Float8Weight.quantize(weight)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    all_products = (codes[codes.isfinite()] * kept.scale).unique()
    nearest = (weight.flatten()[:, None] - all_products).abs().amin(1).view_as(weight)
    assert torch.equal((weight - kept.product()).abs(), nearest)
    assert kept.scale.log2() == kept.scale.log2().round()
    assert weight.abs().max() < 448 * kept.scale <= 2 * weight.abs().max()


@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.full((3, 4), 448.0), torch.full((3, 4), 1e-30)], ids=str)
def test_the_extremes_are_finite(weight: Tensor):
    torch.testing.assert_close(Float8Weight.quantize(weight).product(), weight, rtol=2**-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_w_is_the_same_in_every_dtype(dtype: torch.dtype):
    kept = Float8Weight.quantize(randn(30, 40))
    other = kept.to(dtype)
    assert other.dtype == dtype and torch.equal(other.code.view(torch.uint8), kept.code.view(torch.uint8))
    assert torch.equal(other.product().double(), kept.product().double())
    assert kept.nbytes == 30 * 40 + 4
    moved = kept.to("meta", dtype)
    assert [x.device.type for x in (moved, moved.code, moved.scale)] == ["meta"] * 3 and moved.dtype == dtype


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_a_plain_layer_with_the_product(kind: str):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = in_float8(make().double(), "mid_block.")
    torch.manual_seed(0)
    plain = with_products(in_float8(make().double(), "mid_block."))
    assert has_float8(layer) and not has_float8(plain)
    x = randn(*shape, dtype=torch.float64).requires_grad_()
    y, y_plain = layer(x), plain(x)
    dy = randn(*y.shape, seed=1, dtype=torch.float64)
    assert torch.equal(y, y_plain) and torch.equal(*(torch.autograd.grad(out, x, dy)[0] for out in (y, y_plain)))


@pytest.mark.parametrize("kind", LAYERS)
def test_autograd_keeps_the_8_bits_and_no_other_w(kind: str):
    """A linear layer keeps nothing else; PyTorch's convolution also keeps its input, as it does without 8 bits."""
    make, shape = LAYERS[kind]
    layer, x, kept = in_float8(make(), "mid_block."), randn(*shape).requires_grad_(), []
    with saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        layer(x)
    weights = [saved for saved in kept if isinstance(saved, Float8Weight)]
    others = [saved for saved in kept if not isinstance(saved, Float8Weight)]
    codes = layer.weight.code.untyped_storage().data_ptr()
    assert weights and all(saved.code.untyped_storage().data_ptr() == codes for saved in weights)
    assert all(saved is x or saved is layer.bias for saved in others)
    assert "convolution" in repr(layer(x).grad_fn).lower() or not others


@pytest.mark.parametrize("below", [0, 100, float("inf")], ids=["normal", "low", "whole blocks"])
def test_teacher_student_and_gradients_are_those_of_the_products(below: float):
    model, plain = student(), student(plain=True)
    for network in (model, plain):
        recompute(network, below)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(plain), strict=True))


def test_switched_off_it_is_the_unet_before_injection():
    unet = in_float8(tiny_unet())
    before = unet(*unet_inputs())
    weight = unet.mid_block.resnets[0].conv1.weight
    model = fill_up(inject_lora(unet, rank=2))
    assert model.get_submodule("mid_block.resnets.0.conv1").weight is weight
    assert torch.equal(model(*unet_inputs()), before)
    assert not torch.equal(model(*unet_inputs(), lora_enabled=True), before)


def test_moved_and_cast_the_codes_stay():
    """As on the way to a GPU and back; the LoRA stays in float32."""
    model = student().float()
    layer, expected = model.get_submodule("mid_block.resnets.0.conv1"), model(*unet_inputs())
    shared = layer.weight
    model.to(memory_format=torch.channels_last)
    assert shared is layer.weight and shared.code.is_contiguous(memory_format=torch.channels_last)
    assert error(model(*unet_inputs()), expected) < 1e-5
    model.bfloat16()
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_up.dtype == torch.float32
    assert layer.weight.code.dtype == torch.float8_e4m3fn


def test_a_merge_is_refused_and_changes_nothing():
    model = student()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="cannot be changed in place.*export LORA --to checkpoint"):
        merge_lora(model)
    assert fingerprint(model) == before


# The commands


def test_loaded_are_the_blocks_in_8_bits(tiny_xl: Path):
    unet, plain = load(tiny_xl, weights="float8").unet, load(tiny_xl).unet
    for (name, p), q in zip(unet.named_parameters(), plain.parameters(), strict=True):
        assert isinstance(p, Float8Weight) == (q.ndim > 1 and "block" in name), name
        assert not p.requires_grad and p.shape == q.shape and p.dtype == q.dtype and error(p + 0, q + 0) < 2**-4


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux lists resident pages")
def test_the_original_w_leaves_the_memory(tmp_path: Path):
    """Once W is in 8 bits, its pages of the mapped file are freed."""
    file, name = tmp_path / "model.safetensors", "down_blocks.weight"
    save_file({name: torch.zeros(1024, 1024)}, file)
    network = Network(read_tensors(file)[0], file)
    build(lambda: nn.ModuleDict({"down_blocks": nn.Linear(1024, 1024, bias=False)}), network, torch.float32, to_float8)
    mapping = Path("/proc/self/smaps").read_text().partition(str(file))[2]
    resident = int(mapping.partition("Rss:")[2].split()[0]) * 1024
    assert resident < 0.1 * file.stat().st_size and network.tensors[name].data_ptr()  # still mapped


@pytest.mark.parametrize("model", ["tiny_model", "tiny_xl"])
def test_trained_exported_and_sampled(model: str, command, flags, tmp_path: Path, request: pytest.FixtureRequest):
    model, run = request.getfixturevalue(model), tmp_path / "run"
    common = ["--model", model, "--weights", "float8"]
    report = [] if model.name == "tiny" else ["--no-report"]
    done = command("train.py", *flags(run, model=model, weights="float8", memory="low"), *report)
    assert done.code == 0 and "W in float8" in done.out, done.err

    unet = load_lora(load(model, weights="float8").unet, run / "lora.safetensors")
    assert has_float8(unet)
    image = tmp_path / "image.png"
    assert command("sample.py", "a cat", *common, "--lora", run, "--steps", 2, "--out", image).code == 0
    export([str(run), "--to", "checkpoint", "--model", str(model), "--out", str(tmp_path / "merged")])
    merged = load_file(next((tmp_path / "merged/unet").glob("*.safetensors")))
    plain = load_lora(load(model).unet, run / "lora.safetensors")
    merge_lora(plain)  # into the original W
    assert all(error(merged[name], p.data) < 1e-6 for name, p in plain.named_parameters() if name in merged)


def test_the_loss_falls(command, flags, tmp_path: Path):
    assert command("train.py", *flags(tmp_path, weights="float8", steps=16, lr=0.02), "--no-report").code == 0
    assert sum(losses(tmp_path)[-8:]) < 0.9 * sum(losses(tmp_path)[:8])


@pytest.mark.parametrize(
    "contradiction", [["--method", "full"], ["--kernel", "fused"], ["--teacher-lora", "style.safetensors"]], ids=str
)
def test_contradictions(contradiction: list[str], command, flags, tmp_path: Path):
    done = command("train.py", *flags(tmp_path / "run", weights="float8"), *contradiction)
    assert "leave out --student full" in done.complaint and not (tmp_path / "run").exists()


def test_a_style_is_not_merged(command, tiny_model: Path, tmp_path: Path):
    style = tmp_path / "style.safetensors"
    save_lora(tiny_student(), tmp_path / "lora.safetensors", dict(base="tiny", guidance="4"))
    export([str(tmp_path / "lora.safetensors"), "--to", "peft", "--out", str(style)])
    tensors = load_file(style)
    save_file(tensors, style)  # without the header that makes it a student
    done = command("sample.py", "a cat", "--model", tiny_model, "--weights", "float8", "--lora", style)
    assert str(style) in done.complaint and "--weights float8" in done.complaint
