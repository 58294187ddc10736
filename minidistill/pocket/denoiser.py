"""Stage 3: the latent UNet, with captions dropped now and then so that it can be guided."""

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minidistill.config import ScheduleConfig
from minidistill.distill import learning_rate
from minidistill.pocket.stage import Average, resume, save_state
from minidistill.schedule import Schedule, add_noise, min_snr_weight
from minidistill.unet import UNet

CAPTION_DROPOUT = (
    0.25  # 0.1 to 0.2 is usual; more keeps the unconditional half from lagging where there is little noise
)
MIN_SNR = 20.0
ROUNDS = ((5000, 1e-3), (4700, 8e-4))  # updates and peak rate; the second starts from the averaged weights of the first


def train_unet(
    unet: UNet,
    latents: Tensor,
    captions: Tensor,
    contexts: Tensor,
    empty: Tensor,
    state: Path,
    steps: int,
    lr: float,
    seed: int,
    batch: int = 32,
    save_every: int = 200,
) -> UNet:
    """Train eps-prediction on cached latents; returns the averaged weights. Resumes from ``state`` where that exists.

    Args:
        latents: [N, 4, h, w].  captions: [N] int64, the row of ``contexts`` that describes each.
        contexts: [M, L, D] caption embeddings.  empty: [L, D], that of the empty prompt.
    """
    torch.manual_seed(seed)
    schedule = Schedule.from_config(ScheduleConfig())
    unet = unet.to(memory_format=torch.channels_last).train().requires_grad_(True)
    average = Average(unet, 0.998)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-2)
    start = resume(state, unet, average, optimizer)
    progress = tqdm(range(start, steps), initial=start, total=steps, desc="unet", unit="step", mininterval=1)
    for step in progress:
        some = torch.randint(len(latents), (batch,))
        z_0 = latents[some].contiguous(memory_format=torch.channels_last)
        t = torch.randint(schedule.train_steps, (batch,))
        noise = torch.randn_like(z_0)
        dropped = torch.rand(batch, 1, 1) < CAPTION_DROPOUT
        context = torch.where(dropped, empty, contexts[captions[some]])
        eps = unet(add_noise(schedule, z_0, noise, t), t, context)
        loss = (min_snr_weight(schedule, t, MIN_SNR) * (eps - noise).square()).mean()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup=200)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.update(unet, step)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % save_every == 0:
            save_state(state, step + 1, unet, average, optimizer)
    return average.model
