"""A package of emoji in which every thing is a blob of random colours: the real one isn't needed for the tests."""

from pathlib import Path

import pytest
from tiny import write_emoji

from minidistill.pocket.images import Renderer


@pytest.fixture(scope="session")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_emoji(tmp_path_factory.mktemp("models") / "package")


@pytest.fixture(scope="session")
def renderer(emoji: Path) -> Renderer:
    return Renderer(emoji)
