"""LoRA files exchanged with diffusers and peft give the same images in both directions."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import levels
from torch import Tensor, nn

from minidistill import inject_lora, load, load_lora, merge_lora, save_lora
from minidistill.export import __main__ as export
from minidistill.formats.lora_formats import LoRAFile, Pair, kohya_tensors, peft_tensors, read_lora
from minidistill.formats.lora_io import merge_file
from minidistill.formats.tensor_files import write_tensors
from minidistill.lora import lora_layers

from .helpers import POCKET, PROMPTS, SD1, SD2, diffusers, randn, write_small

peft = pytest.importorskip("peft", reason="diffusers needs peft for LoRA")

STEPS = 2  # of a picture: the second starts from what the LoRA made of the noise
ATTENTION, CONVOLUTIONS, EVERYTHING = ["*.attentions.*"], ["*.attentions.*", "*.resnets.*"], ["*"]
STUDENTS = [
    *((rank, alpha, targets) for rank, alpha in [(1, 1), (4, 6), (64, 64)] for targets in (ATTENTION, CONVOLUTIONS)),
    (3, 0.1, EVERYTHING),
]


@contextmanager
def no_warning() -> Iterator[None]:
    """diffusers logs nothing but its usual message about a LoRA without a text encoder part."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = diffusers.utils.logging.get_logger("diffusers")
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    logger.removeHandler(handler)
    assert not [message for message in said if "No LoRA keys associated to CLIPTextModel" not in message]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model of each kind: attention's proj_in is a convolution, or linear."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("sd1", "sd2")}
    for folder, style in zip(folders.values(), (SD1, SD2)):
        write_small(folder, style=style).to(torch.float32).save_pretrained(folder)
    return folders


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def small(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture(scope="module", params=STUDENTS, ids=str)
def student(request: pytest.FixtureRequest, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(small, tmp_path_factory.mktemp("student") / "lora.safetensors", *request.param)


@torch.no_grad()
def write_student(model: Path, path: Path, rank: int, alpha: float, targets: list[str]) -> Path:
    student = inject_lora(load(model).unet, rank, alpha, targets)
    for i, layer in enumerate(lora_layers(student).values()):
        layer.lora_up.copy_(0.5 * rank**0.5 / alpha * randn(*layer.lora_up.shape, seed=i))  # of equal size
    save_lora(student, path, dict(base="small", guidance="5", negative_prompt="", method="trajectories"))
    return path


@cache
def unchanged(model: Path):
    """As loaded, for ``with_lora``, which copies what it changes."""
    return diffusers.StableDiffusionPipeline.from_pretrained(
        model, torch_dtype=torch.float32, safety_checker=None, local_files_only=True
    )


def pipeline(model: Path, lora: Path | None = None):
    return with_lora(unchanged(model), lora)


def with_lora(original, lora: Path | None):
    """A copy of the pipeline with its own UNet, and with ``lora`` if given."""
    pipe = copy.copy(original)
    pipe.unet = copy.deepcopy(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        with no_warning():
            pipe.load_lora_weights(str(lora))
    return pipe


@cache
def starting_noise(model: Path, side: int) -> Tensor:
    return load(model).starting_noise([3, 4], height=side, width=side)


def draw_theirs(pipe, model: Path, side: int = 32) -> np.ndarray:
    options = dict(height=side, width=side, num_inference_steps=STEPS, guidance_scale=1)
    return levels(pipe(PROMPTS, latents=starting_noise(model, side), **options).images)


@cache
def draw_ours(model: Path, lora: Path | None, side: int = 32) -> np.ndarray:
    """Like sample.py: merged, one call per step."""
    sd = load(model)
    if lora:
        sd.unet = load_lora(sd.unet, lora)
        merge_lora(sd.unet)
    options = dict(steps=STEPS, seed=3, height=side, width=side, guidance=None if lora else 1)
    return levels(sd.sample(PROMPTS, lora_enabled=lora is not None, **options))


def adapted(unet: nn.Module) -> dict[str, nn.Module]:
    """The layers to which peft has added a LoRA."""
    return {name: m for name, m in unet.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def same_pictures(model: Path, written: Path, lora: Path, side: int = 32) -> None:
    pipe = pipeline(model, written)
    ours, theirs = lora_layers(load_lora(load(model).unet, lora)), adapted(pipe.unet)
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        (adapter,) = theirs[name].lora_A
        down, up = (getattr(theirs[name], part)[adapter].weight for part in ("lora_A", "lora_B"))
        assert torch.equal(down, layer.lora_down)
        if theirs[name].scaling[adapter] == layer.scale:
            assert torch.equal(up, layer.lora_up)
        else:
            assert theirs[name].scaling[adapter] == 1 and torch.equal(up, layer.scale * layer.lora_up)
    found = draw_ours(model, lora, side)
    assert np.abs(found - draw_theirs(pipe, model, side)).max() <= 1
    assert np.abs(found - draw_ours(model, None, side)).max() > 8  # the LoRA has a visible effect


@pytest.mark.parametrize("to", ["peft", "kohya"])
def test_diffusers_draws_what_we_draw(to: str, student: Path, small: Path) -> None:
    export.main([str(student), "--to", to])
    same_pictures(small, student.with_name(f"lora-{to}.safetensors"), student)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_diffusers_draws_the_same_in_few_steps(steps: int, small: Path, tmp_path: Path) -> None:
    """With trailing spacing, set as docs/formats-and-tools.md says."""
    lora = write_student(small, tmp_path / "lora.safetensors", 4, 4, CONVOLUTIONS)
    export.main([str(lora), "--to", "peft"])
    sd = load(small)
    sd.unet = load_lora(sd.unet, lora)
    options = dict(height=32, width=32)
    ours = levels(sd.sample(PROMPTS, steps=steps, spacing="trailing", seed=3, lora_enabled=True, **options))
    pipe = pipeline(small, tmp_path / "lora-peft.safetensors")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    options |= dict(latents=sd.starting_noise([3, 4], **options), num_inference_steps=steps, guidance_scale=1)
    assert np.abs(ours - levels(pipe(PROMPTS, **options).images)).max() <= 1


@pytest.mark.parametrize("to", ["peft", "kohya"])
def test_the_student_that_ships(to: str, tmp_path: Path) -> None:
    lora = POCKET / "guidance-lora.safetensors"
    export.main([str(lora), "--to", to, "--out", str(tmp_path / "written.safetensors")])
    same_pictures(POCKET, tmp_path / "written.safetensors", lora, side=64)


@pytest.mark.parametrize("tensors", [peft_tensors, kohya_tensors])
def test_ranks_and_alphas_that_differ(tensors, small: Path, tmp_path: Path) -> None:
    file = read_lora(write_student(small, tmp_path / "lora.safetensors", 4, 4, CONVOLUTIONS))
    layers = {
        name: Pair(pair.down[: 2 + i % 3], pair.up[:, : 2 + i % 3], alpha=[3.0, 5.0][i % 2])
        for i, (name, pair) in enumerate(file.layers.items())
    }
    write_tensors(tmp_path / "mixed.safetensors", tensors(LoRAFile(file.path, layers, {})), {})
    sd = load(small)
    merge_file(sd.unet, LoRAFile(file.path, layers, {}))
    ours = levels(sd.sample(PROMPTS, steps=STEPS, seed=3, guidance=1, height=32, width=32))
    assert np.abs(ours - draw_ours(small, tmp_path / "mixed.safetensors")).max() <= 1
    assert np.abs(ours - draw_theirs(pipeline(small, tmp_path / "mixed.safetensors"), small)).max() <= 1


def test_diffusers_draws_the_merged_checkpoint(small: Path, tmp_path: Path) -> None:
    lora = write_student(small, tmp_path / "lora.safetensors", 4, 6, CONVOLUTIONS)
    export.main([str(lora), "--to", "checkpoint", "--model", str(small), "--out", str(tmp_path / "out")])
    theirs = draw_theirs(pipeline(tmp_path / "out"), small)
    assert np.abs(draw_ours(small, lora) - theirs).max() <= 1
    assert np.array_equal(draw_ours(small, lora), draw_ours(tmp_path / "out", None))


@torch.no_grad()
def adapter(pipe, **settings) -> None:
    """Add a LoRA as peft trains it, with nonzero values."""
    pipe.unet.add_adapter(peft.LoraConfig(init_lora_weights="gaussian", **settings))
    for i, layer in enumerate(adapted(pipe.unet).values()):
        up = layer.lora_B["default"].weight
        up.copy_(0.1 * randn(*up.shape, seed=i))


ADAPTERS = {
    "attention": dict(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    "convolutions": dict(r=3, lora_alpha=5, target_modules=["to_q", "conv1", "proj_in", "ff.net.0.proj"]),
    "patterns": dict(
        r=3, lora_alpha=5, target_modules=["to_q", "conv1"], rank_pattern={"conv1": 2}, alpha_pattern={"conv1": 7}
    ),
    "rslora": dict(r=4, lora_alpha=5, target_modules=["to_q", "conv1"], use_rslora=True),
}


def saved(pipe, folder: Path, names: str = "peft", configured: bool = True) -> Path:
    """diffusers saves the LoRA, with its configuration in the header, under its present or its older scripts' names."""
    layers = peft.get_peft_model_state_dict(pipe.unet)
    if names == "diffusers":
        layers = diffusers.utils.convert_state_dict_to_diffusers(layers)
    header = diffusers.training_utils._collate_lora_metadata({"unet": pipe.unet}) if configured else {}
    pipe.save_lora_weights(folder, unet_lora_layers=layers, **header)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("names", ["peft", "diffusers"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_lora_trained_by_peft(kind: str, names: str, small: Path, tmp_path: Path) -> None:
    pipe = pipeline(small)
    adapter(pipe, **ADAPTERS[kind])
    file = saved(pipe, tmp_path, names)
    assert len(read_lora(file).layers) == len(adapted(pipe.unet))
    assert np.abs(draw_ours(small, file) - draw_theirs(pipe, small)).max() <= 1


def test_a_lora_without_a_configuration(small: Path, tmp_path: Path) -> None:
    """Without alpha in the file, diffusers and we use the rank."""
    pipe = pipeline(small)
    adapter(pipe, **ADAPTERS["convolutions"])
    file = saved(pipe, tmp_path, configured=False)
    assert np.abs(draw_ours(small, file) - draw_theirs(pipeline(small, file), small)).max() <= 1


def test_theirs_to_kohyas_names(small: Path, tmp_path: Path) -> None:
    pipe = pipeline(small)
    adapter(pipe, **ADAPTERS["convolutions"])
    export.main([str(saved(pipe, tmp_path)), "--to", "kohya", "--out", str(tmp_path / "kohya.safetensors")])
    assert all(key.startswith("lora_unet_") for key in load_file(tmp_path / "kohya.safetensors"))
    again = draw_theirs(pipeline(small, tmp_path / "kohya.safetensors"), small)
    assert np.abs(again - draw_theirs(pipe, small)).max() <= 1
