"""Chooses between the fused kernel and cuBLAS, layer by layer."""

import sys
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minidistill.kernels.build import obstacle
from minidistill.kernels.linear import lora_linear


class Region(NamedTuple):
    """The layers [M, K] -> [M, N] to fuse: of M rows or more, and of K, N and rank or less. Others use cuBLAS."""

    M: int
    K: float
    N: float
    rank: int

    def covers(self, K: int, N: int, rank: int, M: float = float("inf")) -> bool:
        """Whether a layer is in the region, with M rows or, without M, with enough of them."""
        return M >= self.M and K <= self.K and N <= self.N and rank <= self.rank


EVERYWHERE = Region(M=0, K=float("inf"), N=float("inf"), rank=128)
HALF = (torch.float16, torch.bfloat16)  # what the kernel computes in

# By compute capability, a region in which every layer that was measured trains faster with the kernel. Elsewhere "auto"
# means plain PyTorch. 9.0: an H200, forward and backward in a CUDA graph, at rank 16 (results/gpu). With fewer rows
# there are too few blocks for its 132 multiprocessors, as a block goes through all of K.
FASTER: dict[tuple[int, int], Region] = {(9, 0): Region(M=4096, K=640, N=640, rank=16)}


def choose_region(
    kernel: str, device: torch.device, dtype: torch.dtype, sizes: Iterable[tuple[int, int, int]]
) -> Region | None:
    """Return the layers that ``install(kernel=...)`` fuses for a model on ``device`` in ``dtype``; None for none.

    ``sizes``: K, N and rank of the layers. "auto" builds the kernel only if one of them is in the region.
    """
    if kernel == "fused":
        if reason := obstacle(device):
            print(f"LoRA layers run in plain PyTorch: {reason}.", file=sys.stderr)
            return None
        if dtype not in HALF:
            print(
                f"The fused kernel needs float16 or bfloat16: in {dtype} it runs only under autocast.", file=sys.stderr
            )
        return EVERYWHERE
    if kernel == "auto" and device.type == "cuda" and dtype in HALF:
        region = FASTER.get(torch.cuda.get_device_capability(device))
        if region and any(region.covers(*size) for size in sizes) and not obstacle(device):
            return region
    return None


def fits(region: Region, x: Tensor, W: Tensor, A: Tensor) -> bool:
    """True if the kernel supports this layer and ``region`` covers it."""
    (N, K), rank = W.shape, len(A)
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    whole_chunks = N % 8 == 0 and K % 8 == 0  # the kernel moves 16 bytes at a time
    M = x.numel() // K
    addressable = M * max(K, N, rank) < 2**32  # the kernel's offsets have 32 bits
    return dtype in HALF and whole_chunks and addressable and region.covers(K, N, rank, M)


def addmm_chain(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Three cuBLAS calls: y = x W^T + b, t = x A^T, y + scale t B^T. [..., K] -> [..., N]."""
    rows = x.reshape(-1, x.shape[-1])  # [M, K]
    y, t = F.linear(rows, W, b), F.linear(rows, A.to(x.dtype))
    # Not in place: selective activation checkpointing may have stored y.
    return torch.addmm(y, t, B.to(y.dtype).T, alpha=scale).view(*x.shape[:-1], len(W))


def lora_linear_or_addmm(
    region: Region, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """Compute the layer with the fused kernel if it fits, else with cuBLAS."""
    layer = lora_linear if fits(region, x, W, A) else addmm_chain
    return layer(x, W, b, A, B, scale)
