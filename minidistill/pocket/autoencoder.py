"""Stage 2: train the VAE, and scale its latents to unit variance."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minidistill.pocket.images import to_pixels
from minidistill.pocket.stage import fit
from minidistill.vae import VAE

KL_WEIGHT = 1e-5  # small: it keeps the latents near the origin, but the images matter more
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 1e-3


def loss_of(vae: VAE, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The squared error (which PSNR measures), a little absolute error for the edges, and the KL divergence of the
    posterior from the unit Gaussian ("Auto-Encoding Variational Bayes", appendix B), of images [B, 3, H, W]."""
    mean, log_variance = vae.posterior(x)
    z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    reconstruction = vae.decode(z * vae.config.scaling_factor)
    squared = F.mse_loss(reconstruction, x)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    loss = squared + 0.1 * F.l1_loss(reconstruction, x) + KL_WEIGHT * kl
    return loss, {"psnr": -10 * torch.log10(squared / 4), "kl": kl}


def train_vae(
    vae: VAE, new_images: Callable[[], Tensor], state: Path, steps: int, decoder_only: bool = False, **how: bool
) -> VAE:
    """Train on the uint8 images [B, 3, H, W] of each call; returns the averaged weights. Resumes from ``state``.
    ``how``: compiled and bfloat16, as in stage.fit.

    With ``decoder_only`` the latents, and the UNet that has learned them, stay as they are.
    """
    vae.requires_grad_(not decoder_only)
    for part in (vae.decoder, vae.post_quant_conv):
        part.requires_grad_(True)
    return fit(vae, lambda: (to_pixels(new_images()),), loss_of, state, steps, LEARNING_RATE, WEIGHT_DECAY, **how)


@torch.no_grad()
def encode_all(vae: VAE, images: Tensor, batch: int = 64) -> Tensor:
    """The scaled latents [N, 4, h, w] of uint8 images [N, 3, H, W]."""
    batches = tqdm(images.split(batch), desc="latents", unit="batch")
    return torch.cat([vae.encode(to_pixels(some)) for some in batches])


@torch.no_grad()
def normalise_latents(vae: VAE, latents: Tensor) -> None:
    """Give every latent channel mean 0 and variance 1, by folding shift and scale into the VAE's 1x1 convolutions.

    Stable Diffusion's single scaling factor would leave the channels with different variances. ``latents``
    [N, 4, h, w] come from this VAE, with a scaling factor of 1.
    """
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    after, before = vae.quant_conv, vae.post_quant_conv
    after.weight[:channels] /= std[:, None, None, None]
    after.bias[:channels] = (after.bias[:channels] - mean) / std
    after.bias[channels:] -= 2 * std.log()
    before.bias += (before.weight[:, :, 0, 0] * mean).sum(1)
    before.weight *= std[None, :, None, None]


@torch.no_grad()
def psnr(vae: VAE, images: Tensor, batch: int = 64) -> float:
    """Mean PSNR in dB of the reconstructions of uint8 images [N, 3, H, W]."""
    ratios = []
    for some in images.split(batch):
        x = to_pixels(some)
        error = (vae.decode(vae.encode(x)).clamp(-1, 1) - x).square().mean((1, 2, 3))
        ratios.append(-10 * torch.log10(error / 4))
    return torch.cat(ratios).mean().item()
