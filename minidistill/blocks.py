"""What the UNet and the VAE share. Shapes: B batch, C channels, H W height and width, L tokens, D width."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, with a shortcut around them; in the UNet the time embedding is added between them.

    ``x`` is [B, C_in, H, W], ``emb`` [B, time_width]; returns [B, C_out, H, W].
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float, time_width: int | None = None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_width is not None:
            self.time_emb_proj = nn.Linear(time_width, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]  # [B, C_out, 1, 1], the same for all pixels
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Upsample(nn.Module):
    """Nearest neighbour to ``size`` (default: twice the height and width), then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        return self.conv(F.interpolate(x, size or (2 * x.shape[2], 2 * x.shape[3]), mode="nearest"))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in ``heads`` heads of width d = D / heads ("Attention Is All You Need", eq. 1).

    ``q`` is [B, L, D], ``k`` and ``v`` are [B, L', D]; returns [B, L, D].
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, L, d]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H*W, C]."""
    return x.flatten(2).transpose(1, 2)


def to_image(tokens: Tensor, like: Tensor) -> Tensor:
    """[B, H*W, C] -> [B, C, H, W], with the height and width of ``like``."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])
