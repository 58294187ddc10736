"""What the UNet and the VAE have in common. Shapes: B batch, C channels, H W height and width, L tokens, D width."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input


class FrozenConv(torch.autograd.Function):
    """W * x + b where neither W nor b learns: dx needs W alone, and autograd's own convolution would keep x too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.how = x.shape, (stride, padding)
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return conv2d_input(ctx.shape, weight.to(dy.dtype), dy, *ctx.how), None, None, None, None


class Conv2d(nn.Conv2d):
    """nn.Conv2d that, while it is frozen, keeps nothing of what went through it. (nn.Linear does so by itself.)"""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and not any(p.requires_grad for p in self.parameters()):
            return FrozenConv.apply(x, self.weight, self.bias, self.stride, self.padding)
        return super().forward(x)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; in the UNet the time embedding is added between them.

    ``x`` is [B, C_in, H, W], ``emb`` [B, time_width]; the result is [B, C_out, H, W].
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float, time_width: int | None = None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        if time_width is not None:
            self.time_emb_proj = nn.Linear(time_width, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        changes = in_channels != out_channels
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if changes else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Upsample(nn.Module):
    """Nearest neighbour to ``size``, or to twice the height and width; then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        return self.conv(F.interpolate(x, size or (2 * x.shape[2], 2 * x.shape[3]), mode="nearest"))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in ``heads`` heads of width d = D / heads ("Attention Is All You Need", eq. 1).

    ``q`` is [B, L, D], ``k`` and ``v`` [B, L', D]; the result is [B, L, D].
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, L, d]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H*W, C]."""
    return x.flatten(2).transpose(1, 2)


def to_picture(tokens: Tensor, like: Tensor) -> Tensor:
    """[B, H*W, C] -> [B, C, H, W], with the height and width of ``like``."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])
