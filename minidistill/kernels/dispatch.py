"""Which LoRA layers the fused kernel computes: one table. cuBLAS has the others."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minidistill.kernels.op import lora_linear

# (x, W, b, A, B, scale) -> x W^T + b + scale (x A^T) B^T
LoRAFunction = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, float], Tensor]


class Region(NamedTuple):
    """The largest layer, y [M, N] from x [M, K]."""

    K: float
    N: float
    rank: int

    def holds(self, K: int, N: int, rank: int) -> bool:
        return K <= self.K and N <= self.N and rank <= self.rank


EVERYWHERE = Region(K=float("inf"), N=float("inf"), rank=128)

# Where the fused kernel was measured to be the faster one, by compute capability: `python -m minidistill.bench kernel`
# prints the line for a card. It has not run on any GPU yet. So no card is listed, "auto" is plain PyTorch, and only
# "fused" chooses the kernel.
FASTER: dict[tuple[int, int], Region] = {}


def fits(region: Region, x: Tensor, W: Tensor, A: Tensor) -> bool:
    (N, K), rank = W.shape, len(A)
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    narrow = dtype in (torch.float16, torch.bfloat16)
    whole_chunks = N % 8 == 0 and K % 8 == 0  # 16 bytes are moved at a time
    within_reach = x.numel() // K * max(K, N, rank) < 2**32  # of the kernel's offsets
    return narrow and whole_chunks and within_reach and region.holds(K, N, rank)


def addmm_chain(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """In three calls of cuBLAS: y = x W^T + b, t = x A^T, y + scale t B^T. [..., K] -> [..., N].

    Not y += ..., which selective checkpointing may have kept.
    """
    rows = x.reshape(-1, x.shape[-1])  # [M, K]
    y, t = F.linear(rows, W, b), F.linear(rows, A.to(x.dtype))
    return torch.addmm(y, t, B.to(y.dtype).T, alpha=scale).view(*x.shape[:-1], len(W))


def dispatched(region: Region, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    layer = lora_linear if fits(region, x, W, A) else addmm_chain
    return layer(x, W, b, A, B, scale)
