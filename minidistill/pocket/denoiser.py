"""Stage 3: train the latent UNet with random caption dropout, then weaken its empty prompt."""

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

CAPTION_DROPOUT = 0.25  # as these weights were trained; weaken() replaces what the empty prompt learns from it
MIN_SNR = 20.0
WEIGHT_DECAY = 1e-2
# (updates, peak learning rate)
ROUNDS = ((5000, 1e-3), (4700, 8e-4))  # the second round starts from the averaged weights of the first
WEAK = (400, 1e-3)  # for the weak UNet
WEAKENING = (1200, 5e-4)  # for the empty prompt, which learns to imitate the weak UNet


@dataclass
class Captioned:
    """Latents with the embeddings of their captions, and of the empty prompt."""

    latents: Tensor  # [N, 4, h, w]
    captions: Tensor  # int64 [N], rows of contexts
    contexts: Tensor  # [M, L, D]
    empty: Tensor  # [L, D]
    schedule: Schedule = Schedule.from_config(ScheduleConfig())

    def noised(self, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A batch at random time steps: z_t and its noise [B, 4, h, w], t [B], context [B, L, D]."""
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
    """Train eps-prediction on cached latents; returns the averaged weights. Resumes from ``state`` if it exists.

    The empty prompt replaces a share ``dropout`` of the captions ("Classifier-Free Diffusion Guidance", alg. 1).
    """

    def loss_of_batch() -> tuple[Tensor, dict[str, Tensor]]:
        z_t, noise, t, context = data.noised(batch)
        dropped = torch.rand(batch, 1, 1) < dropout
        eps = unet(z_t, t, torch.where(dropped, data.empty, context))
        loss = (min_snr_weight(data.schedule, t, MIN_SNR) * (eps - noise).square()).mean()
        return loss, {"loss": loss}

    return fit(unet, loss_of_batch, state, steps, lr, WEIGHT_DECAY)


def weaken(strong: UNet, weak: UNet, data: Captioned, state: Path, steps: int, lr: float, batch: int = 16) -> UNet:
    """Teach the empty prompt u to predict as ``weak`` does, and keep captions c at the predictions of ``strong``:

    |eps(z_t, t, c) - eps_strong(z_t, t, c)|^2 + |eps(z_t', t', u) - eps_weak(z_t', t', u)|^2.

    Guidance leads away from the prediction for the empty prompt. A weak model makes the same errors as the strong one,
    only larger, so going away from it corrects them ("Guiding a Diffusion Model with a Bad Version of Itself", arXiv
    2406.02507). There the weak model is a second network that knows the caption; here it is the same network with the
    empty prompt, so this is still classifier-free guidance.

    Returns the averaged weights of a UNet that started as a copy of ``strong``.
    """
    unet = copy.deepcopy(strong)

    def loss_of_batch() -> tuple[Tensor, dict[str, Tensor]]:
        z_c, _, t_c, context = data.noised(batch)
        z_u, _, t_u, _ = data.noised(batch)
        empty = data.empty.expand_as(context)
        with torch.no_grad():
            target_c, target_u = strong(z_c, t_c, context), weak(z_u, t_u, empty)
        eps_c, eps_u = unet(torch.cat([z_c, z_u]), torch.cat([t_c, t_u]), torch.cat([context, empty])).chunk(2)
        loss_c, loss_u = F.mse_loss(eps_c, target_c), F.mse_loss(eps_u, target_u)
        return loss_c + loss_u, {"captions": loss_c, "empty": loss_u}

    return fit(unet, loss_of_batch, state, steps, lr, WEIGHT_DECAY)
