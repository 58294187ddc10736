"""A convolution with its low-rank pair as one operator, ``torch.ops.minidistill.lora_conv``:

    y = x * W + b + s t B^T,     t = x * A          x [B, K, H, W], W [N, K, k, k], A [r, K, k, k], B [N, r, 1, 1]
    dt = s dy B,                 dB = s dy^T t      matrix products over the channels
    dx = dx(dy, W) + dx(dt, A),  dA = dA(dt, x)     the usual gradients of a convolution

In channels_last the product t B^T is a matmul that adds to y in place: one launch for lora_up and the sum. If k is 1,
the whole layer is linear in the channels, and the linear kernel computes it.

If k is 3, nothing else is fused, because on paper it would not pay. With M pixels and C channels in and out, the base
convolution takes 18 M C^2 operations. A fused implicit GEMM would save one pass over x and two over y, 6 M C bytes. On
an H200 (673 TFLOP/s and 2.76 TB/s, measured) that is 81 / C of the base's time: 25% at 320 channels, 6% at 1280. It
would lose more against cuDNN: r / 160 more arithmetic, an expected 70 to 80% of peak throughput, and for a single image
only 8 to 64 blocks for 132 multiprocessors.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minidistill.kernels.dispatch import Region, lora_linear_or_addmm
from minidistill.kernels.linear import call, setup_context

CONV = "minidistill::lora_conv"
torch.library.define(
    CONV,
    "(Tensor x, Tensor W, Tensor? b, Tensor A, Tensor B, float scale, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation) -> (Tensor y, Tensor t)",
)
convolution_backward = torch.ops.aten.convolution_backward


def to_rows(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B * H * W, C], a view in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """[B * H * W, C] -> [B, C, H, W] in channels_last, with B, H and W of ``like``."""
    B, _, H, W = like.shape
    return rows.view(B, H, W, rows.shape[1]).permute(0, 3, 1, 2)


def base_and_down(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, *window: Sequence[int]) -> tuple[Tensor, Tensor]:
    """x * W + b and x * A, both in channels_last. ``window``: stride, padding, dilation."""
    y, t = F.conv2d(x, W, b, *window), F.conv2d(x, A.to(x.dtype), None, *window)
    return y.contiguous(memory_format=torch.channels_last), t.contiguous(memory_format=torch.channels_last)


def forward(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, *window: Sequence[int]
) -> tuple[Tensor, Tensor]:
    y, t = base_and_down(x, W, b, A, *window)
    to_rows(y).addmm_(to_rows(t), B.flatten(1).to(x.dtype).T, alpha=scale)
    return y, t


def backward(ctx, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, W, A, B, t = ctx.saved_tensors
    options = (None, *ctx.window, False, [0, 0], 1)  # no bias, not transposed, one group
    rows = to_rows(dy)
    dt = from_rows(ctx.scale * (rows @ B.flatten(1).to(dy.dtype)), dy)
    dB = ctx.scale * (rows.T @ to_rows(t))
    dx, dA, _ = convolution_backward(dt, x, A.to(x.dtype), *options, [ctx.needs_input_grad[0], True, False])
    if ctx.needs_input_grad[0]:
        dx = dx + convolution_backward(dy, x, W, *options, [True, False, False])[0]
    return dx, None, None, dA.to(A.dtype), dB.view(B.shape).to(B.dtype), None, None, None, None


torch.library.impl(CONV, "default", forward)
torch.library.register_fake(CONV, lambda x, W, b, A, B, scale, *window: base_and_down(x, W, b, A, *window))
torch.library.register_autograd(CONV, backward, setup_context=setup_context)


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
    """y = x * W + b + scale (x * A) * B with W and b frozen. [B, K, H, W] -> [B, N, H', W'] in channels_last."""
    if W.shape[2:] == (1, 1) and tuple(stride) == (1, 1) and tuple(padding) == (0, 0):
        y = lora_linear_or_addmm(region, to_rows(x), W.flatten(1), b, A.flatten(1), B.flatten(1), scale)
        return from_rows(y, x)
    return call(torch.ops.minidistill.lora_conv, x, W, b, A, B, scale, stride, padding, dilation)
