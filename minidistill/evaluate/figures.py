"""Pictures in rows and columns with their labels: what the notebooks show."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from numpy.typing import ArrayLike


def picture_grid(
    rows: Mapping[str, Sequence[ArrayLike]],
    columns: Sequence[str] = (),
    xlabel: str = "",
    ylabel: str = "",
    side: float = 1.0,
) -> None:
    """Draw a row of pictures (PIL images, or arrays of grey values) for each label, under the labels of the columns.

    Args:
        xlabel, ylabel: what the columns and the rows differ in.
        side: of one picture, in inches.
    """
    across = max(len(pictures) for pictures in rows.values())
    size = (side * across + 1.2, side * len(rows) + 0.5)
    figure, grid = plt.subplots(len(rows), across, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for line, (label, pictures) in zip(grid, rows.items()):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        for axes, picture in zip(line, pictures):
            axes.imshow(picture, cmap="gray", interpolation="nearest")
    for axes, label in zip(grid[0], columns):
        axes.set_title(label, fontsize=9)
    figure.supxlabel(xlabel, fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
