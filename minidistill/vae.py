"""The autoencoder of Stable Diffusion: images to latents of an eighth of their height and width, and back.

The latents of the emoji model have a quarter of both.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from minidistill.blocks import ResnetBlock, Upsample, attention, to_image, to_tokens
from minidistill.config import VAEConfig

EPS = 1e-6  # of every group norm in the VAE


class PixelAttention(nn.Module):
    """Single-head self-attention over all pixels. [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = to_tokens(self.group_norm(x))  # [B, H*W, C]
        tokens = attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens), heads=1)
        return x + to_image(self.to_out(tokens), like=x)


class Downsample(nn.Module):
    """[B, C, H, W] -> [B, C, H/2, W/2], padded at the bottom and right only, as the model was trained."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """One resolution: residual blocks, then a downsampler or an upsampler."""

    def __init__(self, in_channels: int, width: int, layers: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else width, width, groups, EPS) for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        for resize in [*getattr(self, "downsamplers", []), *getattr(self, "upsamplers", [])]:
            x = resize(x)
        return x


class MidBlock(nn.Module):
    """[B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, groups, EPS) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(width, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """[B, 3, H, W] -> [B, 2 * latent_channels, H / factor, W / factor]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.widths, config.groups
        self.conv_in = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[max(i - 1, 0)], width, config.layers, groups)
            if i < len(widths) - 1:
                level.downsamplers = nn.ModuleList([Downsample(width)])
            self.down_blocks.append(level)
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """[B, latent_channels, H, W] -> [B, 3, factor * H, factor * W]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.widths[::-1], config.groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[max(i - 1, 0)], width, config.layers + 1, groups)
            if i < len(widths) - 1:
                level.upsamplers = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(level)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Maps images in [-1, 1] to the latents that the UNet sees, scaled to unit variance, and back."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z|x), unscaled, for images x [B, 3, H, W]; each [B, 4, H/factor, W/factor]."""
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def encode(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Images x [B, 3, H, W] in [-1, 1] -> scaled latents [B, 4, H/factor, W/factor].

        Returns the posterior mean or, given a ``generator``, a sample from the posterior.
        """
        z, log_variance = self.posterior(x)
        if generator is not None:
            noise = torch.randn(z.shape, generator=generator, device=generator.device, dtype=z.dtype).to(z.device)
            z = z + torch.exp(0.5 * log_variance) * noise
        return z * self.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents z [B, 4, h, w] -> images [B, 3, factor * h, factor * w], roughly in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z / self.config.scaling_factor))
