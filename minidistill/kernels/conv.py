"""A convolution and its low-rank pair as one operator, ``torch.ops.minidistill.lora_conv``:

    y = x * W + b + s t B^T,     t = x * A          x [B, K, H, W], W [N, K, k, k], A [r, K, k, k], B [N, r, 1, 1]
    dt = s dy B,                 dB = s dy^T t      over the channels, as matrices
    dx = dx(dy, W) + dx(dt, A),  dA = dA(dt, x)     as of any convolution

In channels_last the convolution of t with B is a matmul, which adds to y in place: one launch for lora_up and the sum.
Where k is 1, all of it is a linear layer of the channels, and the linear kernel's.

Where k is 3 nothing more is fused, for reasons on paper. Of the base's 18 M C^2 operations (M pixels, C channels in and
out) an implicit GEMM would save reading x once and y twice, 6 M C bytes. On an H200 (790 TFLOP/s, 4.3 TB/s) that is
61 / C of the base's time, 19% at 320 channels and 5% at 1280. It would lose more to cuDNN: r / 160 more arithmetic, a
kernel that is expected to reach 70 to 80% of the peak, and for one picture 8 to 64 blocks for 132 processors.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minidistill.kernels.dispatch import Region, dispatched
from minidistill.kernels.op import save, value

CONV = "minidistill::lora_conv"
torch.library.define(
    CONV,
    "(Tensor x, Tensor W, Tensor? b, Tensor A, Tensor B, float scale, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation) -> (Tensor y, Tensor t)",
)
convolution_backward = torch.ops.aten.convolution_backward


def to_rows(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B * H * W, C], which in channels_last is a view."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """[B * H * W, C] -> [B, C, H, W] in channels_last."""
    B, _, H, W = like.shape
    return rows.view(B, H, W, rows.shape[1]).permute(0, 3, 1, 2)


def convolved(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, *how: Sequence[int]) -> tuple[Tensor, Tensor]:
    """x * W + b and x * A."""
    return tuple(
        F.conv2d(x, w, bias, *how).contiguous(memory_format=torch.channels_last)
        for w, bias in ((W, b), (A.to(x.dtype), None))
    )


def forward(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, *how: Sequence[int]
) -> tuple[Tensor, Tensor]:
    y, t = convolved(x, W, b, A, *how)
    to_rows(y).addmm_(to_rows(t), B.flatten(1).to(x.dtype).T, alpha=scale)
    return y, t


def fake(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, *how: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return convolved(x, W, b, A, *how)


def backward(ctx, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, W, A, B, t = ctx.saved_tensors
    rest = (None, *ctx.how, False, [0, 0], 1)  # no bias, no transposed convolution, one group
    rows = to_rows(dy)
    dt = from_rows(ctx.scale * (rows @ B.flatten(1).to(dy.dtype)), dy)
    dB = ctx.scale * (rows.T @ to_rows(t))
    dx, dA, _ = convolution_backward(dt, x, A.to(x.dtype), *rest, [ctx.needs_input_grad[0], True, False])
    if ctx.needs_input_grad[0]:
        dx = dx + convolution_backward(dy, x, W, *rest, [True, False, False])[0]
    return dx, None, None, dA.to(A.dtype), dB.view(B.shape).to(B.dtype), None, None, None, None


torch.library.impl(CONV, "default", forward)
torch.library.register_fake(CONV, fake)
torch.library.register_autograd(CONV, backward, setup_context=save)


def lora_conv(
    region: Region,
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """y = x * W + b + scale (x * A) * B, with W and b frozen. [B, K, H, W] -> [B, N, H', W'] in channels_last."""
    if W.shape[2:] == (1, 1) and tuple(stride) == (1, 1) and tuple(padding) == (0, 0):
        y = dispatched(region, to_rows(x), W.flatten(1), b, A.flatten(1), B.flatten(1), scale)
        return from_rows(y, x)
    return value(torch.ops.minidistill.lora_conv, x, W, b, A, B, scale, stride, padding, dilation)
