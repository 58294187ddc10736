"""lora_io.py: a LoRA file returns what was saved, fits one network only, and is never half-written."""

import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY_UNET, error, tiny_student, tiny_unet
from torch import Tensor

from minidistill import CheckpointError, load_lora, save_lora
from minidistill.formats import tensor_files
from minidistill.formats.lora_formats import read_lora
from minidistill.formats.lora_io import merge_file
from minidistill.lora import lora_layers

METADATA = dict(base="tiny", guidance="5", method="trajectories", negative_prompt="")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The LoRA of the tiny student."""
    save_lora(tiny_student(), tmp_path / "lora.safetensors", METADATA)
    return tmp_path / "lora.safetensors"


def rewrite(file: Path, header: dict[str, str], tensors: dict[str, Tensor] | None = None) -> None:
    """The same file with other metadata, or other tensors."""
    save_file(tensors or load_file(file), file, read_lora(file).metadata | header)


def is_untouched(model: torch.nn.Module) -> bool:
    return all(p.requires_grad for p in model.parameters()) and not lora_layers(model)


def test_round_trip_is_bit_exact(file: Path):
    saved, loaded = lora_layers(tiny_student()), lora_layers(load_lora(tiny_unet(), file))
    assert list(saved) == list(loaded)
    for name, layer in saved.items():
        assert torch.equal(loaded[name].lora_down, layer.lora_down)
        assert torch.equal(loaded[name].lora_up, layer.lora_up)
        assert loaded[name].scale == layer.scale


@pytest.mark.parametrize("rank, alpha", [(3, 1.0), (3, 0.1), (2, 2.718281828459045), (2, 12345678.0), (2, 0.0)])
def test_the_scale_is_kept_exactly(rank: int, alpha: float, tmp_path: Path):
    model = tiny_student(rank, alpha)
    save_lora(model, tmp_path / "lora.safetensors")
    layers = lora_layers(load_lora(tiny_unet(), tmp_path / "lora.safetensors")).values()
    assert {layer.scale for layer in layers} == {alpha / rank}


def test_only_the_layers_in_the_file_are_adapted(file: Path):
    tensors = {name: tensor for name, tensor in load_file(file).items() if "mid_block" in name}
    rewrite(file, {}, tensors)
    adapted = lora_layers(load_lora(tiny_unet(), file))
    assert {f"{name}.{part}" for name in adapted for part in ("lora_down", "lora_up")} == set(tensors)


def test_metadata(file: Path):
    assert METADATA | dict(rank="2", alpha="2") == {k: v for k, v in read_lora(file).metadata.items() if k != "format"}


def test_metadata_may_be_any_text(tmp_path: Path):
    text = 'a "quoted" été\n苹果'
    save_lora(tiny_student(), tmp_path / "lora.safetensors", dict(negative_prompt=text))
    assert read_lora(tmp_path / "lora.safetensors").metadata["negative_prompt"] == text


def test_nothing_to_save(tmp_path: Path):
    with pytest.raises(ValueError, match="inject_lora"):
        save_lora(tiny_unet(), tmp_path / "lora.safetensors")
    assert not list(tmp_path.iterdir())


def test_another_base_lists_every_layer_that_differs(file: Path):
    unet = tiny_unet(config=replace(TINY_UNET, context_width=48))
    expected = [name for name in lora_layers(tiny_student()) if name.endswith(("attn2.to_k", "attn2.to_v"))]
    with pytest.raises(CheckpointError) as caught:
        load_lora(unet, file)
    message = str(caught.value)
    assert "another model" in message and "made for tiny" in message and str(file) in message
    assert len(expected) >= 4 and message.count("\n") == len(expected)
    assert all(f"{name} is [" in message for name in expected)
    assert is_untouched(unet)


def test_another_base_lists_layers_that_it_lacks(file: Path):
    unet = tiny_unet(config=replace(TINY_UNET, mid_depth=0))
    with pytest.raises(CheckpointError, match="no such layer: mid_block.attentions.0.transformer_blocks.0.attn1.to_q"):
        load_lora(unet, file)
    assert is_untouched(unet)


def test_a_matrix_and_a_1x1_convolution_are_the_same(file: Path):
    """kohya's scripts write SD 2's linear proj_in and proj_out as convolutions."""
    config = replace(TINY_UNET, linear_projection=True)
    unet, before = tiny_unet(config=config), tiny_unet(config=config)
    merge_file(unet, read_lora(file))
    for name, pair in read_lora(file).layers.items():
        added = torch.einsum("or,ri...->oi...", pair.up.flatten(1).double(), pair.down.double()) * pair.scale
        weight = before.get_submodule(name).weight.detach().double()
        assert error(unet.get_submodule(name).weight.detach().double(), weight + added.view_as(weight)) < 1e-6, name


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"<html>404</html>", lambda data: b""])
def test_a_damaged_file_is_named(damage, file: Path):
    file.write_bytes(damage(file.read_bytes()))
    unet = tiny_unet()
    with pytest.raises(CheckpointError, match="lora.safetensors is (not a readable|empty)"):
        load_lora(unet, file)
    assert is_untouched(unet)


def test_weights_that_are_no_lora(tmp_path: Path):
    save_file(tiny_unet().state_dict(), tmp_path / "unet.safetensors")
    with pytest.raises(CheckpointError, match="not a LoRA"):
        load_lora(tiny_unet(), tmp_path / "unet.safetensors")


@pytest.mark.parametrize("part, shape", [("lora_down", (3, 64, 3, 3)), ("lora_up", (64, 2, 3, 3))])
def test_a_tensor_that_does_not_fit_names_the_layer(part: str, shape: tuple[int, ...], file: Path):
    rewrite(file, {}, load_file(file) | {f"mid_block.resnets.0.conv1.{part}": torch.zeros(shape)})
    unet = tiny_unet()
    with pytest.raises(CheckpointError, match="mid_block.resnets.0.conv1"):
        load_lora(unet, file)
    assert is_untouched(unet)


@pytest.mark.parametrize("header", [dict(rank="4"), dict(rank="two"), dict(alpha="much")])
def test_a_header_that_does_not_fit(header: dict, file: Path):
    rewrite(file, header)
    with pytest.raises(CheckpointError, match="lora.safetensors"):
        load_lora(tiny_unet(), file)


def test_our_tensors_without_their_header(file: Path):
    """As a program leaves them that casts the tensors and saves them again. Their strength would be a guess."""
    save_file(load_file(file), file)
    with pytest.raises(CheckpointError, match="lora.safetensors is damaged .its header has no rank and alpha"):
        load_lora(tiny_unet(), file)


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_writing_that_fails_leaves_the_old_file(failure: BaseException, file: Path, monkeypatch: pytest.MonkeyPatch):
    before = file.read_bytes()

    def save_half(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(before[:1000])
        raise failure

    monkeypatch.setattr(tensor_files, "save_file", save_half)
    with pytest.raises(type(failure)):
        save_lora(tiny_student(alpha=9), file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_full_disk_names_the_file(file: Path):
    """With files limited to a thousand bytes, safetensors raises its own error; scripts expect an OSError."""
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=file.name):
            save_lora(tiny_student(alpha=9), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]
