"""The denoiser of Stable Diffusion 1.x, 2.x and XL: a UNet of residual blocks and transformers.

Modules are named as in the official folder layout, so published checkpoints load strictly.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidistill.blocks import ResnetBlock, Upsample, attention, to_image, to_tokens
from minidistill.conditioning import Conditioning
from minidistill.config import UNetConfig


def run(block: Callable[..., Tensor], *args: Tensor | torch.Size) -> Tensor:
    """Call a block: the default ``UNet.run_block``, which training/recompute.py replaces to save memory."""
    return block(*args)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """[B] -> [B, width]: cosines, then sines, of t at ``width / 2`` frequencies from 1 to 1/10000 (DDPM, appendix B).

    Always in float32, as Stable Diffusion was trained.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies  # [B, width / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepMLP(nn.Module):
    """[B, width] -> [B, out_width]."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, out_width)
        self.linear_2 = nn.Linear(out_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Attention(nn.Module):
    """Cross-attention from ``x`` to ``context``; self-attention without one. [B, L, C], [B, L', D] -> [B, L, C]."""

    def __init__(self, width: int, context_width: int, heads: int, upcast: bool):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be split into {heads} heads")
        self.heads, self.upcast = heads, upcast
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.to_out(self.read(self.to_q(x), x if context is None else context))

    def read(self, q: Tensor, context: Tensor) -> Tensor:
        """Attention of the queries [B, L, C] over ``context`` [B, L', D]; guidance.away_from wraps it."""
        k, v = self.to_k(context), self.to_v(context)  # [B, L', C] each
        if self.upcast:
            wide = torch.promote_types(q.dtype, torch.float32)
            return attention(q.to(wide), k.to(wide), v.to(wide), self.heads).to(q.dtype)
        return attention(q, k, v, self.heads)


class GEGLU(nn.Module):
    """x -> a * gelu(b), with a and b the halves of one projection ("GLU Variants Improve Transformer", eq. 5)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)  # [B, L, inner] each
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """[B, L, C] -> [B, L, C]."""

    def __init__(self, width: int):
        super().__init__()
        # The Identity stands where training had a dropout, so that the last layer keeps its published name, net.2.
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward: three pre-norm residual branches."""

    def __init__(self, width: int, context_width: int, heads: int, upcast: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads, upcast)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context_width, heads, upcast)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """``depth`` transformer blocks over the pixels as tokens. [B, C, H, W], [B, L, D] -> [B, C, H, W]."""

    def __init__(self, width: int, heads: int, depth: int, config: UNetConfig):
        super().__init__()
        self.linear_projection = config.linear_projection
        projection = nn.Linear if config.linear_projection else partial(nn.Conv2d, kernel_size=1)
        self.norm = nn.GroupNorm(config.groups, width, eps=1e-6)
        self.proj_in = projection(width, width)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, config.context_width, heads, config.upcast_attention) for _ in range(depth)
        )
        self.proj_out = projection(width, width)

    def forward(self, x: Tensor, context: Tensor, run_block: Callable[..., Tensor] = run) -> Tensor:
        h = self.norm(x)
        tokens = self.proj_in(to_tokens(h)) if self.linear_projection else to_tokens(self.proj_in(h))  # [B, H*W, C]
        for block in self.transformer_blocks:
            tokens = run_block(block, tokens, context)
        if self.linear_projection:
            return x + to_image(self.proj_out(tokens), like=x)
        return x + self.proj_out(to_image(tokens, like=x))


class Downsample(nn.Module):
    """[B, C, H, W] -> [B, C, H/2, W/2]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Level(nn.Module):
    """One resolution: residual blocks, each followed by a transformer unless ``depth`` is 0.

    ``in_channels`` lists the input width of each residual block. The UNet adds a downsampler or an upsampler.
    """

    def __init__(self, in_channels: list[int], width: int, heads: int, depth: int, config: UNetConfig):
        super().__init__()
        time_width = 4 * config.widths[0]
        self.resnets = nn.ModuleList(ResnetBlock(c, width, config.groups, 1e-5, time_width) for c in in_channels)
        if depth:
            self.attentions = nn.ModuleList(SpatialTransformer(width, heads, depth, config) for _ in in_channels)


class MidBlock(nn.Module):
    """At the lowest resolution: residual block, transformer, residual block."""

    def __init__(self, width: int, heads: int, config: UNetConfig):
        super().__init__()
        time_width = 4 * config.widths[0]
        self.resnets = nn.ModuleList(ResnetBlock(width, width, config.groups, 1e-5, time_width) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(width, heads, config.mid_depth, config)])


class UNet(nn.Module):
    """Predicts the noise (or v) in noisy latents, given the time step and the prompt."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, n = config.widths, config.layers
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(widths[0], 4 * widths[0])
        if config.pooled_width:
            self.add_embedding = TimestepMLP(config.pooled_width + 6 * config.size_width, 4 * widths[0])

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # widths of the feature maps that the way up will concatenate
        for i, width in enumerate(widths):
            level = Level([skips[-1]] + [width] * (n - 1), width, config.heads[i], config.depth[i], config)
            skips += [width] * n
            if i < len(widths) - 1:
                level.downsamplers = nn.ModuleList([Downsample(width)])
                skips.append(width)
            self.down_blocks.append(level)

        self.mid_block = MidBlock(widths[-1], config.heads[-1], config)

        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            in_channels = [c + skips.pop() for c in [below] + [width] * n]
            level = Level(in_channels, width, config.heads[i], config.depth[i], config)
            if i > 0:
                level.upsamplers = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(level)
            below = width

        self.conv_norm_out = nn.GroupNorm(config.groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    run_block = staticmethod(run)  # how the network calls its blocks

    def run_layer(self, level: Level, i: int, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        """The i-th residual block of a level, and the transformer after it if there is one."""
        x = self.run_block(level.resnets[i], x, emb)
        return self.run_block(level.attentions[i], x, context) if hasattr(level, "attentions") else x

    def embed_prompt_and_sizes(self, cond: Conditioning) -> Tensor:
        """What SDXL adds to the time embedding, [B, 4 * widths[0]]: pooled vector and sizes, through two layers."""
        if getattr(cond, "sizes", None) is None:
            raise ValueError("SDXL needs a Conditioning with a pooled vector and sizes, as encode_prompt returns it.")
        sizes = timestep_embedding(cond.sizes.flatten(), self.config.size_width)  # [B * 6, size_width]
        sizes = sizes.view(len(cond), -1).to(cond.pooled.dtype)  # [B, 6 * size_width]
        return self.add_embedding(torch.cat([cond.pooled, sizes], dim=1))

    def run_output(self, x: Tensor) -> Tensor:
        """[B, widths[0], H, W] -> [B, 4, H, W]."""
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def forward(self, z_t: Tensor, t: Tensor, cond: Conditioning | Tensor) -> Tensor:
        """Predict eps or v, [B, 4, H, W].

        Args:
            z_t: noisy latents [B, 4, H, W], in the weights' dtype or a wider one; the result has the dtype of z_t.
            t: time steps [B], int64.
            cond: the prompts, or their token embeddings [B, L, D], in the weights' dtype. SDXL also needs a pooled
                vector and sizes, as ``StableDiffusion.encode_prompt`` returns them.
        """
        context = cond if isinstance(cond, Tensor) else cond.tokens  # [B, L, D]
        dtype = self.conv_in.weight.dtype
        emb = self.time_embedding(timestep_embedding(t, self.config.widths[0]).to(dtype))  # [B, 4 * widths[0]]
        if self.config.pooled_width:
            emb = emb + self.embed_prompt_and_sizes(cond)
        x = self.conv_in(z_t.to(dtype))  # [B, widths[0], H, W]
        skips = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = self.run_layer(level, i, x, emb, context)
                skips.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)  # [B, C, H/2, W/2]
                skips.append(x)

        first, last = self.mid_block.resnets
        x = self.run_block(first, x, emb)
        x = self.run_block(self.mid_block.attentions[0], x, context)
        x = self.run_block(last, x, emb)

        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = torch.cat([x, skips.pop()], dim=1)  # [B, C + C_skip, H, W]
                x = self.run_layer(level, i, x, emb, context)
            if hasattr(level, "upsamplers"):
                # [B, C, 2H, 2W], or one less where the way down halved an odd side
                x = self.run_block(level.upsamplers[0], x, skips[-1].shape[2:])
        return self.run_block(self.run_output, x).to(z_t.dtype)
