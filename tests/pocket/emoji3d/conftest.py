"""A package of emoji in which every thing is a blob of random colours: the real one isn't needed for the tests."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minidistill.pocket.emoji3d.compositions import THINGS
from minidistill.pocket.emoji3d.images import Renderer


@pytest.fixture(scope="session")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    (folder / "assets").mkdir()
    rng = np.random.default_rng(0)
    for i, character in enumerate(THINGS):
        blob = np.full((4, 4, 4), 255, dtype=np.uint8)
        blob[:, :, :3] = rng.integers(256, size=(4, 4, 3))
        blob[0, 0, 3] = 0  # a transparent corner
        sheet = Image.new("RGBA", (80, 80))
        sheet.paste(Image.fromarray(blob).resize((64, 64), Image.Resampling.NEAREST), (8, 8))
        suffix = "-fe0f" if i % 5 == 0 else ""
        sheet.save(folder / f"assets/{ord(character):04x}{suffix}.webp", lossless=True)
    return folder


@pytest.fixture(scope="session")
def renderer(emoji: Path) -> Renderer:
    return Renderer(emoji)
