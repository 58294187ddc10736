"""Stage 2: train the VAE."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minidistill.pocket.autoencoder import KL_WEIGHT
from minidistill.pocket.emoji3d.stage import fit
from minidistill.pocket.images import to_pixels
from minidistill.vae import VAE

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
    vae: VAE,
    new_images: Callable[[], Tensor],
    state: Path,
    steps: int,
    decoder_only: bool = False,
    **how: bool,
) -> VAE:
    """Train on the uint8 images [B, 3, H, W] of each call; returns the averaged weights. Resumes from ``state``.
    ``how``: compiled and bfloat16, as in stage.fit.

    With ``decoder_only`` the latents, and the UNet that has learned them, stay as they are.
    """
    vae.requires_grad_(not decoder_only)
    for part in (vae.decoder, vae.post_quant_conv):
        part.requires_grad_(True)
    return fit(vae, lambda: (to_pixels(new_images()),), loss_of, state, steps, LEARNING_RATE, WEIGHT_DECAY, **how)
