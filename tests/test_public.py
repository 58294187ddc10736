"""The public surface: every function documents its arguments, result and errors, and does what it documents."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import TOKENS, tiny_unet
from torch import Tensor, nn

import minidistill
from minidistill import (
    CheckpointError,
    StableDiffusion,
    ddim_invert,
    ddim_sample,
    inject_lora,
    load,
    load_lora,
    save_lora,
)
from minidistill.conditioning import Conditioning
from minidistill.distill import FullStudent
from minidistill.guidance import Interval, guided, plain
from minidistill.unet import UNet
from minidistill.vae import VAE

EXPORTED = {name: getattr(minidistill, name) for name in minidistill.__all__}
METHODS = {
    f"StableDiffusion.{name}": member
    for name, member in vars(StableDiffusion).items()
    if not name.startswith("_") and (callable(member) or hasattr(member, "__get__"))
}
CALLED = {"sd.unet": UNet.forward, "sd.vae.encode": VAE.encode, "sd.vae.decode": VAE.decode}
PUBLIC = EXPORTED | METHODS | CALLED


@pytest.mark.parametrize("name", PUBLIC)
def test_it_has_a_docstring(name: str):
    assert inspect.getdoc(PUBLIC[name])


@pytest.mark.parametrize("name", [n for n, found in PUBLIC.items() if inspect.isfunction(found)])
def test_the_docstring_names_every_parameter(name: str):
    """A single parameter needs no name: the first line says what the function does with it."""
    found = PUBLIC[name]
    parameters = [parameter for parameter in inspect.signature(found).parameters if parameter != "self"]
    missing = [parameter for parameter in parameters if not re.search(rf"\b{parameter}\b", inspect.getdoc(found))]
    assert len(parameters) == 1 or not missing


# Shapes. The tiny model has images of 16x16, latents of 8x8, and TOKENS tokens of width 32.


def test_shapes_of_a_model(sd: StableDiffusion):
    cond = sd.encode_prompt(["a red apple", ""])
    tokens = sd.encode_tokens(torch.zeros(2, TOKENS, dtype=torch.int64)).tokens
    assert isinstance(cond, Conditioning) and cond.tokens.shape == tokens.shape == (2, TOKENS, 32)
    assert len(cond) == 2 and len(cond[:1]) == 1 and len(cond[:1].expand(5)) == 5 and cond.pooled is None
    assert cond.to(torch.float64).tokens.dtype == torch.float64
    assert sd.starting_noise([1, 2, 3]).shape == (3, 4, 8, 8)
    assert sd.starting_noise([1], height=20, width=32).shape == (1, 4, 10, 16)
    z_T, t = sd.starting_noise([1, 2]), torch.tensor([999, 500])
    for model in (plain(sd.unet, cond), guided(sd.unet, cond, cond, 2.0, Interval(600, 999))):
        with torch.no_grad():
            assert model(z_T, t).shape == z_T.shape
    with torch.no_grad():
        assert sd.vae.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 8, 8)
        assert sd.vae.decode(z_T).shape == (2, 3, 16, 16)
    assert sd.device == torch.device("cpu") and sd.dtype == torch.float32


def test_the_surface_is_that_of_the_design():
    names = "load inject_lora load_lora save_lora merge_lora unmerge_lora guided_noise ddim_sample ddim_invert"
    assert set(names.split()) <= set(minidistill.__all__)


def test_the_configuration_of_the_unet_does_not_depend_on_the_student(sd: StableDiffusion):
    config = sd.unet.config
    assert sd.unet_config is config
    for student in (inject_lora(sd.unet, rank=1), FullStudent(sd.unet, tiny_unet())):
        sd.unet = student
        assert sd.unet_config is config


# Errors


def other_lora(folder: Path) -> Path:
    """A LoRA for another network."""
    file = folder / "other.safetensors"
    save_lora(inject_lora(nn.Sequential(nn.Linear(2, 2)), 1, targets=["*"]), file)
    return file


def steps_of(sampler: Callable, sd: StableDiffusion) -> Tensor:
    return next(sampler(plain(sd.unet, sd.encode_prompt(["x"])), sd.schedule, sd.starting_noise([0]), 1001))


def drawn(sd: StableDiffusion, steps: int = 2, **how: object) -> object:
    return sd.sample(["x"], steps, **how)


ERRORS: list[tuple[str, type[Exception], Callable[[StableDiffusion, Path], object]]] = [
    ("load", CheckpointError, lambda sd, tmp: load(tmp / "nowhere")),
    ("load", ValueError, lambda sd, tmp: load(sd.path, device="abacus")),
    ("StableDiffusion.tokenizer", CheckpointError, lambda sd, tmp: load(sd.path, tokenizer=tmp).tokenizer),
    (
        "StableDiffusion.encode_prompt",
        CheckpointError,
        lambda sd, tmp: load(sd.path, tokenizer=tmp).encode_prompt(["x"]),
    ),
    ("StableDiffusion.starting_noise", ValueError, lambda sd, tmp: sd.starting_noise([0], height=15)),
    ("StableDiffusion.sample", ValueError, lambda sd, tmp: drawn(sd, steps=1001)),
    ("StableDiffusion.sample", ValueError, lambda sd, tmp: drawn(sd, selective=1.5)),
    ("StableDiffusion.sample", ValueError, lambda sd, tmp: drawn(sd, width=15)),
    ("StableDiffusion.sample", ValueError, lambda sd, tmp: drawn(sd, selective=0.5, interval=Interval(0, 9))),
    ("StableDiffusion.sample", ValueError, lambda sd, tmp: drawn(sd, eta=1.5)),
    ("StableDiffusion.sample", ValueError, lambda sd, tmp: drawn(sd, lora_enabled=True)),  # there is no student
    ("ddim_sample", ValueError, lambda sd, tmp: steps_of(ddim_sample, sd)),
    ("ddim_invert", ValueError, lambda sd, tmp: steps_of(ddim_invert, sd)),
    ("inject_lora", ValueError, lambda sd, tmp: inject_lora(sd.unet, rank=0)),
    ("inject_lora", ValueError, lambda sd, tmp: inject_lora(inject_lora(sd.unet))),
    ("inject_lora", ValueError, lambda sd, tmp: inject_lora(sd.unet, targets=["nothing"])),
    ("save_lora", ValueError, lambda sd, tmp: save_lora(sd.unet, tmp / "lora.safetensors")),
    ("load_lora", CheckpointError, lambda sd, tmp: load_lora(sd.unet, other_lora(tmp))),
    ("load_lora", CheckpointError, lambda sd, tmp: load_lora(sd.unet, tmp / "nowhere.safetensors")),
]


@pytest.mark.parametrize("name, kind, wrong", ERRORS)
def test_errors(name: str, kind: type[Exception], wrong: Callable, sd: StableDiffusion, tmp_path: Path):
    with pytest.raises(kind):
        wrong(sd, tmp_path)
    assert kind.__name__ in inspect.getdoc(PUBLIC[name])  # as its docstring says
