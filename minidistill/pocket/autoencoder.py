"""Stage 2: train the VAE, and scale its latents to unit variance."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minidistill.config import VAEConfig
from minidistill.pocket.images import to_pixels
from minidistill.pocket.stage import fit
from minidistill.vae import VAE

KL_WEIGHT = 1e-5  # small: it keeps the latents near the origin, but the images matter more


def train_vae(config: VAEConfig, images: Tensor, state: Path, steps: int, batch: int = 4, lr: float = 2e-3) -> VAE:
    """Train on uint8 images [N, 3, H, W]; returns the averaged weights. Resumes from ``state`` if it exists.

    The loss is the squared error (which PSNR measures), a little absolute error for the edges, and the KL divergence
    of the posterior from the unit Gaussian ("Auto-Encoding Variational Bayes", appendix B).
    """
    vae = VAE(config)

    def loss_of_batch() -> tuple[Tensor, dict[str, Tensor]]:
        x = to_pixels(images[torch.randint(len(images), (batch,))])
        mean, log_variance = vae.posterior(x)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        reconstruction = vae.decode(z * config.scaling_factor)
        squared = F.mse_loss(reconstruction, x)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = squared + 0.1 * F.l1_loss(reconstruction, x) + KL_WEIGHT * kl
        return loss, {"psnr": -10 * torch.log10(squared / 4), "kl": kl}

    return fit(vae, loss_of_batch, state, steps, lr, weight_decay=1e-3)


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
