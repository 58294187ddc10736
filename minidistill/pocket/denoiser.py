"""Stage 3: the latent UNet: trained with captions dropped now and then; then its empty prompt is made weak."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minidistill.config import ScheduleConfig
from minidistill.pocket.stage import fit
from minidistill.schedule import Schedule, add_noise, min_snr_weight
from minidistill.unet import UNet

CAPTION_DROPOUT = 0.25  # as these weights were trained; what the empty prompt learns by it, weaken() replaces
MIN_SNR = 20.0
WEIGHT_DECAY = 1e-2
# (updates, peak learning rate)
ROUNDS = ((5000, 1e-3), (4700, 8e-4))  # the second starts from the averaged weights of the first
WEAK = (400, 1e-3)  # trains the UNet that the empty prompt is to imitate
WEAKENING = (1200, 5e-4)  # teaches the empty prompt to imitate it


@dataclass
class Captioned:
    """Latents, and the embeddings of their captions and of the empty prompt."""

    latents: Tensor  # [N, 4, h, w]
    captions: Tensor  # int64 [N], each one's row of contexts
    contexts: Tensor  # [M, L, D]
    empty: Tensor  # [L, D]
    schedule: Schedule = Schedule.from_config(ScheduleConfig())

    def noised(self, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A batch at random times: z_t and its noise [B, 4, h, w], t [B], context [B, L, D]."""
        some = torch.randint(len(self.latents), (batch,))
        z_0 = self.latents[some].contiguous(memory_format=torch.channels_last)
        t = torch.randint(self.schedule.train_steps, (batch,))
        noise = torch.randn_like(z_0)
        return add_noise(self.schedule, z_0, noise, t), noise, t, self.contexts[self.captions[some]]


def train_unet(
    unet: UNet,
    data: Captioned,
    state: Path,
    steps: int,
    lr: float,
    dropout: float = CAPTION_DROPOUT,
    batch: int = 32,
) -> UNet:
    """Train eps-prediction on cached latents; returns the averaged weights. Resumes from ``state`` where that exists.

    A share ``dropout`` of the captions gives way to the empty prompt ("Classifier-Free Diffusion Guidance", alg. 1).
    """

    def loss_of_batch() -> tuple[Tensor, dict[str, Tensor]]:
        z_t, noise, t, context = data.noised(batch)
        dropped = torch.rand(batch, 1, 1) < dropout
        eps = unet(z_t, t, torch.where(dropped, data.empty, context))
        loss = (min_snr_weight(data.schedule, t, MIN_SNR) * (eps - noise).square()).mean()
        return loss, {"loss": loss}

    return fit(unet, loss_of_batch, state, steps, lr, WEIGHT_DECAY)


def weaken(strong: UNet, weak: UNet, data: Captioned, state: Path, steps: int, lr: float, batch: int = 16) -> UNet:
    """Teach the empty prompt u to predict as ``weak`` does, while captions c are held to what ``strong`` predicts:

    |eps(z_t, t, c) - eps_strong(z_t, t, c)|^2 + |eps(z_t', t', u) - eps_weak(z_t', t', u)|^2.

    Guidance leads away from what the empty prompt predicts. A weak model errs as the strong one does, only more: going
    away from it mends errors ("Guiding a Diffusion Model with a Bad Version of Itself", arXiv 2406.02507). There it is
    a second network, and is told the caption; here it is not, so that this is classifier-free guidance as well.

    Returns the averaged weights of a UNet that began as a copy of ``strong``.
    """
    unet = copy.deepcopy(strong)

    def loss_of_batch() -> tuple[Tensor, dict[str, Tensor]]:
        z_c, _, t_c, context = data.noised(batch)
        z_u, _, t_u, _ = data.noised(batch)
        empty = data.empty.expand_as(context)
        with torch.no_grad():
            target_c, target_u = strong(z_c, t_c, context), weak(z_u, t_u, empty)
        eps_c, eps_u = unet(torch.cat([z_c, z_u]), torch.cat([t_c, t_u]), torch.cat([context, empty])).chunk(2)
        held, learned = F.mse_loss(eps_c, target_c), F.mse_loss(eps_u, target_u)
        return held + learned, {"captions": held, "empty": learned}

    return fit(unet, loss_of_batch, state, steps, lr, WEIGHT_DECAY)
