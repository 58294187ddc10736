"""LoRA files of SDXL exchanged with diffusers and peft, and read as kohya's scripts write them."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import TINY_XL_UNET, levels
from torch import Tensor

from minidistill import inject_lora, load, load_lora
from minidistill.config import SDXL_UNET, UNetConfig
from minidistill.export import __main__ as export
from minidistill.formats.lora_formats import LoRAFile, Pair, kohya_tensors, read_lora
from minidistill.formats.lora_io import merge_file
from minidistill.formats.original_names import translate, unet_names
from minidistill.lora import DEFAULT_TARGETS, lora_layers
from minidistill.unet import UNet

from . import test_lora_formats as lora_formats
from .helpers import PROMPTS, diffusers, randn, small_xl
from .test_lora_formats import (
    ADAPTERS,
    ATTENTION,
    CONVOLUTIONS,
    EVERYTHING,
    STEPS,
    adapted,
    adapter,
    saved,
    with_lora,
    write_student,
)

SIDE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xl")
    small_xl().to(torch.float32).save_pretrained(folder)
    return folder


STUDENTS = [(4, 4, ATTENTION), (4, 6, CONVOLUTIONS), (64, 64, CONVOLUTIONS), (3, 0.1, EVERYTHING)]


@pytest.fixture(scope="module", params=STUDENTS, ids=str)
def student(request: pytest.FixtureRequest, folder: Path, tmp_path_factory) -> tuple[Path, bool]:
    """The file, and whether its alpha is its rank."""
    rank, alpha, _ = request.param
    return write_student(folder, tmp_path_factory.mktemp("student") / "lora.safetensors", *request.param), alpha == rank


@cache
def unchanged(folder: Path) -> "diffusers.StableDiffusionXLPipeline":
    """As loaded, for ``with_lora``, which copies what it changes."""
    return diffusers.StableDiffusionXLPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, local_files_only=True, add_watermarker=False
    )


def pipeline(folder: Path, lora: Path | None = None) -> "diffusers.StableDiffusionXLPipeline":
    return with_lora(unchanged(folder), lora)


draw_ours = partial(lora_formats.draw_ours, side=SIDE)
draw_theirs = partial(lora_formats.draw_theirs, side=SIDE)


@pytest.mark.parametrize("to", ["peft", "kohya"])
def test_diffusers_draws_what_we_draw(to: str, student: tuple[Path, bool], folder: Path) -> None:
    lora, unscaled = student
    written = lora.with_name(f"lora-{to}.safetensors")
    export.main([str(lora), "--to", to])
    pipe = pipeline(folder, written)
    layers = lora_layers(load_lora(load(folder).unet, lora))
    assert layers.keys() == adapted(pipe.unet).keys()
    found = draw_ours(folder, lora)
    assert np.abs(found - draw_theirs(pipe, folder)).max() <= 1
    assert np.abs(found - draw_ours(folder, None)).max() > 8  # the LoRA has a visible effect
    assert np.abs(found - draw_ours(folder, written)).max() <= 1  # it reads back
    if unscaled:
        again = lora_layers(load_lora(load(folder).unet, written))
        for name, layer in layers.items():
            assert torch.equal(layer.lora_down, again[name].lora_down) and torch.equal(
                layer.lora_up, again[name].lora_up
            )


def test_diffusers_draws_the_merged_checkpoint(folder: Path, tmp_path: Path) -> None:
    lora = write_student(folder, tmp_path / "lora.safetensors", 4, 6, CONVOLUTIONS)
    export.main([str(lora), "--to", "checkpoint", "--model", str(folder), "--out", str(tmp_path / "out")])
    assert np.abs(draw_ours(folder, lora) - draw_theirs(pipeline(tmp_path / "out"), folder)).max() <= 1


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_lora_trained_by_peft(kind: str, folder: Path, tmp_path: Path) -> None:
    pipe = pipeline(folder)
    adapter(pipe, **ADAPTERS[kind])
    file = saved(pipe, tmp_path)
    assert len(read_lora(file).layers) == len(adapted(pipe.unet))
    assert np.abs(draw_ours(folder, file) - draw_theirs(pipe, folder)).max() <= 1


def kohya_file(path: Path) -> dict[str, Tensor]:
    """A style by kohya's scripts: attention and feed-forward of one block, both text encoders, alpha 2 at rank 4."""
    block = "lora_unet_output_blocks_1_1_transformer_blocks_1_"
    layers = {
        f"{block}attn1_to_q": (64, 64),
        f"{block}attn2_to_k": (192, 64),
        f"{block}attn2_to_out_0": (64, 64),
        f"{block}ff_net_0_proj": (64, 512),
        f"{block}ff_net_2": (256, 64),
        "lora_unet_middle_block_1_proj_in": (64, 64),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (64, 64),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": (128, 96),
    }
    tensors = {}
    for i, (name, (wide_in, wide_out)) in enumerate(layers.items()):
        tensors[f"{name}.lora_down.weight"] = randn(4, wide_in, seed=i).float() * wide_in**-0.5
        tensors[f"{name}.lora_up.weight"] = randn(wide_out, 4, seed=100 + i).float()
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path, {"ss_base_model_version": "sdxl_base_v1-0"})
    return tensors


def test_a_style_by_kohyas_scripts(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    unet_only = {name: x for name, x in kohya_file(file).items() if name.startswith("lora_unet_")}
    with pytest.warns(UserWarning, match="text encoder"):
        style = read_lora(file)
    assert len(style.layers) == 6 and all(pair.scale == 0.5 for pair in style.layers.values())
    save_file(unet_only, tmp_path / "unet.safetensors")
    sd = load(folder)
    merge_file(sd.unet, style)
    ours = levels(sd.sample(PROMPTS, steps=STEPS, seed=3, guidance=1, height=SIDE, width=SIDE))
    assert np.abs(ours - draw_theirs(pipeline(folder, tmp_path / "unet.safetensors"), folder)).max() <= 1
    assert np.abs(ours - draw_ours(folder, None)).max() > 8


def kohya_names(config: UNetConfig, *targets: str) -> set[str]:
    """What the layers of a LoRA are called in kohya's format."""
    with torch.device("meta"):
        unet = inject_lora(UNet(config), 1, targets=targets)
    layers = {name: Pair(x.lora_down, x.lora_up, 1.0) for name, x in lora_layers(unet).items()}
    keys = {name.partition(".")[0] for name in kohya_tensors(LoRAFile(Path("x"), layers, {}))}
    names = unet_names(config)
    assert keys == {"lora_unet_" + translate(f"{name}.", names)[:-1].replace(".", "_") for name in layers}
    return keys


@pytest.mark.parametrize("attention", ["attn2_to_k", "attn1_to_q"])
def test_names_at_full_size_do_not_depend_on_the_layers_that_have_a_lora(attention: str) -> None:
    """Even if only the first residual block of each level has one, and no layer reads the prompt."""
    targets = ["down_blocks.*.resnets.0.*", "up_blocks.*.resnets.[01].*", f"*.{attention.replace('_', '.', 1)}"]
    assert {
        f"lora_unet_input_blocks_7_1_transformer_blocks_0_{attention}",
        "lora_unet_output_blocks_1_0_out_layers_3",
    } <= kohya_names(SDXL_UNET, *targets)


def test_the_embedding_of_sizes_tells_that_it_is_sdxl() -> None:
    """diffusers reads kohya's files by its original name only, and would leave the layer out."""
    theirs = {name.removeprefix("lora_unet_") for name in kohya_names(TINY_XL_UNET, "add_embedding.*")}
    tensors = {f"lora_unet_{name}.lora_{part}.weight": torch.ones(1, 1) for name in theirs for part in ("down", "up")}
    read, _ = diffusers.StableDiffusionXLPipeline.lora_state_dict(tensors)
    assert {name.rpartition(".lora.")[0] for name in read} == {f"unet.add_embedding.linear_{i}" for i in (1, 2)}


@pytest.mark.parametrize("widths", [(32, 64), (40, 80), (160, 320)])
def test_names_of_a_smaller_model(widths: tuple[int, int]) -> None:
    """Also where a feed-forward layer or a level is as wide as a level of SDXL."""
    names = kohya_names(replace(TINY_XL_UNET, widths=widths, groups=8), *DEFAULT_TARGETS)
    assert "lora_unet_input_blocks_3_1_transformer_blocks_1_ff_net_0_proj" in names


@pytest.mark.parametrize("down, up", [("1", "[01]"), ("0", "0")])
def test_names_of_a_smaller_model_with_few_layers(down: str, up: str) -> None:
    """Its levels have two residual blocks, but only one of them has a LoRA: taken for SDXL's two."""
    targets = [f"down_blocks.*.resnets.{down}.*", f"up_blocks.*.resnets.{up}.*", "*.attn2.to_k"]
    kohya_names(replace(TINY_XL_UNET, layers=2, groups=8), *targets)
