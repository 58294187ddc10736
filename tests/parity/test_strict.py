"""Damaged folders written by diffusers: one error names what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
from tiny import edit_json

from minidistill import load
from minidistill.formats.files import CheckpointError

from .helpers import write_small


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_small(folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A private copy, to damage."""
    return Path(shutil.copytree(written, tmp_path / "model"))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
def test_missing_part(part: str, folder: Path) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(CheckpointError, match=f"no {part}"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ],
)
def test_missing_or_unreadable_file(name: str, folder: Path) -> None:
    file = folder / name
    file.write_bytes(b"<html>404 not found</html>")
    with pytest.raises(CheckpointError, match=f"{file.name} is not"):
        load(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=file.name):
        load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        dict(down_block_types=["CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"]),
        dict(up_block_types=["UpBlock2D", "UpBlock2D", "UpBlock2D"]),
        dict(mid_block_type="UNetMidBlock2D"),
        dict(addition_embed_type="text_image"),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_kinds_of_unet(changes: dict, folder: Path) -> None:
    edit_json(folder / "unet/config.json", changes)
    with pytest.raises(CheckpointError, match="SD 1.x, 2.x and XL"):
        load(folder)


def test_unknown_blocks_in_a_short_config(folder: Path) -> None:
    (folder / "unet/config.json").write_text(json.dumps(dict(down_block_types=["SkipDownBlock2D"])))
    with pytest.raises(CheckpointError, match="SkipDownBlock2D"):
        load(folder)


def test_unknown_prediction(folder: Path) -> None:
    edit_json(folder / "scheduler/scheduler_config.json", dict(prediction_type="sample"))
    with pytest.raises(CheckpointError, match="sample"):
        load(folder)


@pytest.mark.parametrize("path", ["nowhere", "model/model_index.json"])
def test_wrong_path(path: str, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=path):
        load(folder.parent / path)
