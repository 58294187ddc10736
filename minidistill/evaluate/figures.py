"""Figures in files, and labelled images in rows and columns for the notebooks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from minidistill.evaluate.metrics import Estimate
from minidistill.formats.files import atomic_write


@contextmanager
def figure_file(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of ``width`` x ``height`` inches, which is written to ``path`` as PNG when the block ends."""
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def plot_estimates(axes: Axes, x: Sequence, estimates: Sequence[Estimate], style: str, label: str = "") -> None:
    """Plot estimates over ``x``, each with its 95% interval."""
    errors = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
    axes.errorbar(x, [e.value for e in estimates], errors, fmt=style, capsize=3, label=label)


def picture_grid(
    rows: Mapping[str, Sequence[ArrayLike]],
    columns: Sequence[str] = (),
    xlabel: str = "",
    ylabel: str = "",
    side: float = 1.0,
) -> None:
    """Plot a row of images (PIL images, or arrays of grey values) for each label.

    Args:
        columns: the title of each column.
        xlabel, ylabel: what the columns and the rows vary.
        side: the size of one image in inches.
    """
    width = max(len(images) for images in rows.values())
    size = (side * width + 1.2, side * len(rows) + 0.5)
    figure, grid = plt.subplots(len(rows), width, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for line, (label, images) in zip(grid, rows.items()):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        for axes, image in zip(line, images):
            axes.imshow(image, cmap="gray", interpolation="nearest")
    for axes, label in zip(grid[0], columns):
        axes.set_title(label, fontsize=9)
    figure.supxlabel(xlabel, fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
