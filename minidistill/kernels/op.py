"""A LoRA layer as one operator, ``torch.ops.minidistill.lora_linear``, with its gradient for frozen W and b:

    y = x W^T + b + t B^T,     t = s x A^T          x [..., K], W [N, K], b [N], A [r, K], B [N, r]
    dx = dy W + dt A,          dt = s dy B
    dA = dt^T x,               dB = dy^T t

Here are its schema, its reference in plain PyTorch, which serves every device, and its gradient. csrc/ has what takes
their place where it is built: the kernel, which makes (y, t) and (dx, dt) in one launch each, and the gradient in C++.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER, DX = "minidistill::lora_linear", "minidistill::lora_linear_dx"
torch.library.define(LAYER, "(Tensor x, Tensor W, Tensor? b, Tensor A, Tensor B, float scale) -> (Tensor y, Tensor t)")
torch.library.define(DX, "(Tensor dy, Tensor W, Tensor A, Tensor B, float scale) -> (Tensor dx, Tensor dt)")


def reference(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Rounds where the kernel does: A and B on load, t before it meets B, and y; sums are in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide, A, B = x.to(wide), A.to(x.dtype).to(wide), B.to(x.dtype).to(wide)
    t = (scale * F.linear(x_wide, A)).to(x.dtype)
    y = F.linear(x_wide, W.to(wide), None if b is None else b.to(wide)) + F.linear(t.to(wide), B)
    return y.to(x.dtype), t


def reference_dx(dy: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return reference(dy, W.T, None, B.T, A.T, scale)


torch.library.impl(LAYER, "default", reference)
torch.library.impl(DX, "default", reference_dx)


@torch.library.register_fake(LAYER)
def _(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], len(W)), x.new_empty(*x.shape[:-1], len(A))


@torch.library.register_fake(DX)
def _(dy: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return dy.new_empty(*dy.shape[:-1], W.shape[1]), dy.new_empty(*dy.shape[:-1], len(A))


def save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, W, _, A, B, ctx.scale, *ctx.how = inputs  # of a convolution: stride, padding, dilation
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


torch.library.register_autograd(LAYER, backward, setup_context=save)


def value(layer: Callable[..., tuple[Tensor, Tensor]], x: Tensor, W: Tensor, b: Tensor | None, *rest) -> Tensor:
    """y of a layer; under autocast, of x, W and b in its dtype."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return layer(x, W, b, *rest)[0]
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return layer(x.to(dtype), W.to(dtype), None if b is None else b.to(dtype), *rest)[0]


def lora_linear(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y = x W^T + b + scale (x A^T) B^T, whose gradients reach x, A and B: W and b are taken as frozen.

    x [..., K], W [N, K] and b [N] have one dtype; A [r, K] and B [N, r] are float32 (in float64 so are all). Under
    autocast the computation is in its dtype. The kernel takes r from 0 to 128, and K and N that are multiples of 8.
    """
    return value(torch.ops.minidistill.lora_linear, x, W, b, A, B, scale)
