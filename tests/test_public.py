"""What minidistill exports: every function says what goes in, what comes out and what is raised, and keeps to it."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import fill_up, randn, tiny_unet, unet_inputs
from torch import Tensor, nn

import minidistill
from minidistill import (
    CheckpointError,
    StableDiffusion,
    ddim_invert,
    ddim_sample,
    guided_noise,
    inject_lora,
    load,
    load_lora,
    merge_lora,
    save_lora,
    unmerge_lora,
)
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
    """One alone needs no name: what the function does is done to it."""
    found = PUBLIC[name]
    parameters = [parameter for parameter in inspect.signature(found).parameters if parameter != "self"]
    missing = [parameter for parameter in parameters if not re.search(rf"\b{parameter}\b", inspect.getdoc(found))]
    assert len(parameters) == 1 or not missing


# Shapes. The tiny model: pictures of 16x16, latents of 8x8, 16 tokens of width 32.


def test_shapes_of_a_model(sd: StableDiffusion):
    cond = sd.encode_prompt(["a red apple", ""])
    assert cond.shape == sd.encode_tokens(torch.zeros(2, 16, dtype=torch.int64)).shape == (2, 16, 32)
    assert sd.starting_noise([1, 2, 3]).shape == (3, 4, 8, 8)
    assert sd.starting_noise([1], height=20, width=32).shape == (1, 4, 10, 16)
    z_T, t = sd.starting_noise([1, 2]), torch.tensor([999, 500])
    for model in (sd.denoiser(cond), sd.denoiser(cond, cond, guidance=2.0, guided_until=600)):
        with torch.no_grad():
            assert model(z_T, t).shape == z_T.shape
    with torch.no_grad():
        assert sd.vae.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 8, 8)
        assert sd.vae.decode(z_T).shape == (2, 3, 16, 16)
    assert sd.device == torch.device("cpu") and sd.dtype == torch.float32


def test_shapes_of_pictures(sd: StableDiffusion):
    pictures = sd.sample(["a red apple", "a rocket"], steps=2, height=20, width=32)
    assert [picture.size for picture in pictures] == [(32, 20)] * 2
    assert all(isinstance(picture, Image.Image) for picture in pictures)
    assert len(sd.sample("one prompt", steps=1)) == 1


def test_shapes_of_samplers(sd: StableDiffusion):
    z = randn(2, 4, 8, 8)
    for function in (ddim_sample, ddim_invert):
        yielded = list(function(lambda z_t, t: z_t * (t >= 0)[:, None, None, None], sd.schedule, z, 3))
        assert [x.shape for x in yielded] == [z.shape] * 3


def test_shapes_of_guidance():
    z_t, t, cond = unet_inputs()
    assert guided_noise(tiny_unet(), z_t, t, cond, torch.zeros_like(cond), 2.5).shape == z_t.shape


def test_lora_there_and_back(tmp_path: Path):
    inputs = unet_inputs()
    unet = fill_up(inject_lora(tiny_unet(), rank=2))
    save_lora(unet, tmp_path / "lora.safetensors")
    with torch.no_grad():
        teacher, student = unet(*inputs), unet(*inputs, lora_enabled=True)
        again = load_lora(tiny_unet(), tmp_path / "lora.safetensors", scale=1.0)
        assert torch.equal(again(*inputs, lora_enabled=True), student)
        merge_lora(unet)
        torch.testing.assert_close(unet(*inputs), student, rtol=1e-4, atol=1e-5)
        unmerge_lora(unet)
        torch.testing.assert_close(unet(*inputs), teacher, rtol=1e-4, atol=1e-5)
    assert student.shape == inputs[0].shape and not torch.allclose(teacher, student)


# Errors


def other_lora(folder: Path) -> Path:
    """A LoRA for another network."""
    file = folder / "other.safetensors"
    save_lora(inject_lora(nn.Sequential(nn.Linear(2, 2)), 1, targets=["*"]), file)
    return file


def steps_of(sampler: Callable, sd: StableDiffusion) -> Tensor:
    return next(sampler(sd.denoiser(sd.encode_prompt(["x"])), sd.schedule, sd.starting_noise([0]), 1001))


ERRORS: dict[str, tuple[str, type[Exception], Callable[[StableDiffusion, Path], object]]] = {
    "no such model": ("load", CheckpointError, lambda sd, tmp: load(tmp / "nowhere")),
    "no such device": ("load", ValueError, lambda sd, tmp: load(sd.path, device="abacus")),
    "no tokenizer": (
        "StableDiffusion.tokenizer",
        CheckpointError,
        lambda sd, tmp: load(sd.path, tokenizer=tmp).tokenizer,
    ),
    "no tokenizer for a prompt": (
        "StableDiffusion.encode_prompt",
        CheckpointError,
        lambda sd, tmp: load(sd.path, tokenizer=tmp).encode_prompt(["x"]),
    ),
    "half a latent": ("StableDiffusion.starting_noise", ValueError, lambda sd, tmp: sd.starting_noise([0], height=15)),
    "too many steps": ("StableDiffusion.sample", ValueError, lambda sd, tmp: sd.sample(["x"], steps=1001)),
    "selective": ("StableDiffusion.sample", ValueError, lambda sd, tmp: sd.sample(["x"], steps=2, selective=1.5)),
    "half a picture": ("StableDiffusion.sample", ValueError, lambda sd, tmp: sd.sample(["x"], steps=2, width=15)),
    "too many steps of DDIM": ("ddim_sample", ValueError, lambda sd, tmp: steps_of(ddim_sample, sd)),
    "too many steps back": ("ddim_invert", ValueError, lambda sd, tmp: steps_of(ddim_invert, sd)),
    "no rank": ("inject_lora", ValueError, lambda sd, tmp: inject_lora(sd.unet, rank=0)),
    "LoRA twice": ("inject_lora", ValueError, lambda sd, tmp: inject_lora(inject_lora(sd.unet))),
    "LoRA of nothing": ("inject_lora", ValueError, lambda sd, tmp: inject_lora(sd.unet, targets=["nothing"])),
    "no LoRA to save": ("save_lora", ValueError, lambda sd, tmp: save_lora(sd.unet, tmp / "lora.safetensors")),
    "another network's LoRA": ("load_lora", CheckpointError, lambda sd, tmp: load_lora(sd.unet, other_lora(tmp))),
    "no such LoRA": ("load_lora", CheckpointError, lambda sd, tmp: load_lora(sd.unet, tmp / "nowhere.safetensors")),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str, sd: StableDiffusion, tmp_path: Path):
    name, kind, wrong = ERRORS[case]
    with pytest.raises(kind):
        wrong(sd, tmp_path)
    assert kind.__name__ in inspect.getdoc(PUBLIC[name])  # as its docstring says
