"""Batches for the training loop. Batch n depends on the seed and n alone, so a resumed run sees the same data."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from minidistill.conditioning import Conditioning
from minidistill.data.images import ImageLatents
from minidistill.data.trajectories import Trajectories, encode_prompts
from minidistill.distill import Batch, few_step_weight
from minidistill.pipeline import StableDiffusion
from minidistill.schedule import Schedule, add_noise, min_snr_weight

MIN_SNR = 5.0  # gamma of --weighting min-snr, as in its paper


@dataclass
class Examples:
    """The base of StoredStates and NoisedLatents, which add ``len()`` and ``batch(step)``. Batches are on the CPU.

    Attributes:
        latents: the stored trajectories or encoded images.
        prompts: embeddings of the distinct prompts; on the CPU, as those of many prompts would fill a small GPU.
        prompt_of: for each trajectory or image, its row in ``prompts``.
        batch_size: examples per update, over all processes.  weighting: "even" or "min-snr".
        student_steps: how many steps the student learns to take; None: as many as the teacher.
    """

    latents: Trajectories | ImageLatents
    prompts: Conditioning
    prompt_of: Tensor
    schedule: Schedule
    batch_size: int
    seed: int
    weighting: str
    student_steps: int | None = None

    def weight(self, t: Tensor) -> Tensor:
        """The weight of each example in the loss, [B, 1, 1, 1]."""
        if self.weighting == "min-snr":
            return min_snr_weight(self.schedule, t, MIN_SNR)
        return torch.ones(len(t), 1, 1, 1)


class StoredStates(Examples):
    """States of the teacher's trajectories, with the guided predictions made there as targets."""

    def __len__(self) -> int:
        return len(self.latents.examples)

    def batch(self, step: int) -> Batch:
        trajectory, position = self.latents.examples[batch_indices(len(self), self.batch_size, self.seed, step)].T
        z_t, target, t = self.latents.states(trajectory, position)
        if self.student_steps:
            weight = few_step_weight(self.schedule, self.student_steps)[position].view(-1, 1, 1, 1)
        else:
            weight = self.weight(t)
        return Batch(z_t, t, self.prompts[self.prompt_of[trajectory]], weight, target)


class NoisedLatents(Examples):
    """Clean latents, noised afresh at random time steps; the teacher is asked in the loop."""

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, step: int) -> Batch:
        chosen = batch_indices(len(self), self.batch_size, self.seed, step)
        generator = torch.Generator().manual_seed(self.seed + step)
        t = torch.randint(self.schedule.train_steps, chosen.shape, generator=generator)
        z_0 = self.latents.ends(chosen)
        z_t = add_noise(self.schedule, z_0, torch.randn(z_0.shape, generator=generator), t)
        return Batch(z_t, t, self.prompts[self.prompt_of[chosen]], self.weight(t))


def batch_indices(size: int, batch: int, seed: int, step: int) -> Tensor:
    """The indices below ``size`` in batch number ``step``; every epoch is shuffled anew."""
    per_epoch = max(size // batch, 1)
    epoch, i = divmod(step, per_epoch)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed + epoch))
    return order[i * batch : (i + 1) * batch]


def prompts_of(
    sd: StableDiffusion, captions: list[str], latents: Trajectories | ImageLatents
) -> tuple[Conditioning, Tensor]:
    """The embeddings, on the CPU, of the captions that ``latents`` use; and for each latent its row in them."""
    used, prompt_of = latents.prompts(torch.arange(len(latents))).unique(return_inverse=True)
    return encode_prompts(sd, [captions[i] for i in used]), prompt_of


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Move without waiting: a GPU copies from pinned memory on its own, while the loop goes on."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def batch_to_device(batch: Batch, device: torch.device) -> Batch:
    return batch.map(partial(to_device, device=device))
