"""A LoRA layer as one operator, ``torch.ops.minidistill.lora_linear``, with its gradient for frozen W and b:

    y = x W^T + b + t B^T,     t = s x A^T          x [..., K], W [N, K], b [N], A [r, K], B [N, r]
    dx = dy W + dt A,          dt = s dy B
    dA = dt^T x,               dB = dy^T t

This file has the schema, a reference in plain PyTorch that runs on every device, and the gradient. Once csrc/ is built,
its CUDA kernel replaces the reference on GPUs, computing (y, t) and (dx, dt) in one launch each, and its C++ gradient
replaces the one here.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER, DX = "minidistill::lora_linear", "minidistill::lora_linear_dx"
torch.library.define(LAYER, "(Tensor x, Tensor W, Tensor? b, Tensor A, Tensor B, float scale) -> (Tensor y, Tensor t)")
torch.library.define(DX, "(Tensor dy, Tensor W, Tensor A, Tensor B, float scale) -> (Tensor dx, Tensor dt)")


def reference(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(y, t), rounded where the kernel rounds: A and B on load, t before its product with B, y. Sums in float32+."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide, A, B = x.to(wide), A.to(x.dtype).to(wide), B.to(x.dtype).to(wide)
    t = (scale * F.linear(x_wide, A)).to(x.dtype)
    y = F.linear(x_wide, W.to(wide), None if b is None else b.to(wide)) + F.linear(t.to(wide), B)
    return y.to(x.dtype), t


def reference_dx(dy: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(dx, dt): the same computation with transposed weights, A and B exchanged."""
    return reference(dy, W.T, None, B.T, A.T, scale)


torch.library.impl(LAYER, "default", reference)
torch.library.impl(DX, "default", reference_dx)


@torch.library.register_fake(LAYER)
def _(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], len(W)), x.new_empty(*x.shape[:-1], len(A))


@torch.library.register_fake(DX)
def _(dy: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return dy.new_empty(*dy.shape[:-1], W.shape[1]), dy.new_empty(*dy.shape[:-1], len(A))


def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, W, _, A, B, ctx.scale, *ctx.window = inputs  # for a convolution, window is stride, padding and dilation
    ctx.save_for_backward(x, W, A, B, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def backward(ctx, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, W, A, B, t = ctx.saved_tensors
    if ctx.needs_input_grad[0]:
        dx, dt = torch.ops.minidistill.lora_linear_dx(dy, W, A, B, ctx.scale)
    else:
        dx, dt = None, ctx.scale * (dy @ B.to(dy.dtype))
    x, dy, t, dt = (torch.atleast_2d(x).flatten(0, -2) for x in (x, dy, t, dt))
    return dx, None, None, (dt.T @ x).to(A.dtype), (dy.T @ t).to(B.dtype), None


torch.library.register_autograd(LAYER, backward, setup_context=setup_context)


def call(op: Callable[..., tuple[Tensor, Tensor]], x: Tensor, W: Tensor, b: Tensor | None, *rest) -> Tensor:
    """Return y of ``op``. Under autocast, x, W and b are cast first."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return op(x, W, b, *rest)[0]
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return op(x.to(dtype), W.to(dtype), None if b is None else b.to(dtype), *rest)[0]


def lora_linear(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y = x W^T + b + scale (x A^T) B^T, differentiable in x, A and B; W and b are frozen.

    x [..., K], W [N, K] and b [N] have the same dtype. A [r, K] and B [N, r] are float32, or float64 if x is. Under
    autocast the autocast dtype applies. The kernel supports ranks 0 to 128, and K and N divisible by 8.
    """
    return call(torch.ops.minidistill.lora_linear, x, W, b, A, B, scale)
