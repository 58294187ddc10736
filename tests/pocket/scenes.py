"""What the tests of the judge and of its recognition look at."""

import torch
from torch import Tensor

from minidistill.pocket.compositions import pair_compositions, single_compositions

FEW = single_compositions()[::211]  # 13 things on various colours
FEW_PAIRS = pair_compositions()[::211]


def flat(colours: list[tuple[int, int, int]], side: int = 64) -> Tensor:
    """uint8 [N, 3, side, side], one flat colour each."""
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].repeat(1, 1, side, side)
