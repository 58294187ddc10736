"""The teacher's own guided trajectories, stored in shards: what the student learns from by default.

A trajectory is the path of DDIM from noise to image. Its states z_t, each with the guided prediction eps_hat made
there, are ready pairs of input and target, so no teacher is needed in the training loop. Its end z_0 is an image the
teacher generated; the paper's way noises those afresh, and then shards hold the ends alone.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from minidistill.conditioning import Conditioning, cat
from minidistill.data.shards import read_shard, teacher_fingerprint, write_shard
from minidistill.distill import few_step_states
from minidistill.formats.files import digest
from minidistill.guidance import Interval, guided
from minidistill.pipeline import StableDiffusion, on_device, require_finite
from minidistill.samplers import ddim_loop


def teacher_trajectory(
    sd: StableDiffusion,
    cond: Conditioning,
    uncond: Conditioning,
    guidance: float,
    z_T: Tensor,
    timesteps: Sequence[int],
    interval: Interval | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the guided teacher by DDIM from z_T [B, 4, h, w] through S ``timesteps``, the noisiest first.

    Returns every state z_t and its guided prediction, both [B, S, 4, h, w], and the end z_0 [B, 4, h, w].
    """
    model = guided(sd.unet, cond, uncond, guidance, interval)
    path = list(ddim_loop(model, sd.schedule, z_T, list(pairwise([*timesteps, -1]))))
    states = [z_T, *(z_t for z_t, _, _ in path)]  # S + 1
    predictions = [prediction for _, prediction, _ in path]
    return torch.stack(states[:-1], 1), torch.stack(predictions, 1), states[-1]


def generate(
    sd: StableDiffusion,
    captions: list[str],
    folder: Path,
    *,
    count: int,
    steps: int,
    guidance: float,
    negative_prompt: str | None = None,
    interval: Interval | None = None,
    seed: int = 0,
    batch: int = 16,
    stride: int = 1,
    keep_states: bool = True,
    student_steps: int | None = None,
    weights: str | None = None,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], object] = lambda: None,
) -> "Trajectories":
    """Have the teacher sample ``count`` trajectories of ``steps`` DDIM steps, in shards of ``batch`` under ``folder``.

    Captions are used in shuffled order, over and over. Existing shards are kept, so an interrupted run continues where
    it stopped and a run that asks for more adds to them; damaged shards are made again. ``world`` processes, of which
    this is number ``rank``, share the missing shards, and meet at ``wait()``; a shard does not depend on who makes it.

    The states of one trajectory are much alike. With ``stride`` n the teacher takes only the first step and every n-th,
    which gives n times as many images in the same time; the offset shifts from shard to shard, so n shards together
    have every t. Without ``keep_states`` only the ends z_0 are stored. With ``student_steps`` the teacher's
    steps have trailing spacing, and only the states that the student will visit are stored, each with the prediction
    that leads to the next.
    ``weights`` is the ``teacher_fingerprint``, if it is known already.

    Raises ValueError when the folder holds shards made with other settings, and for ``student_steps`` that do not fit.
    """
    if student_steps and (steps % student_steps or stride > 1 or not keep_states):
        raise ValueError(f"{student_steps} student steps need whole trajectories of a multiple of as many steps.")
    schedule, every_t = sd.schedule, sd.schedule.timesteps(steps, "trailing" if student_steps else None)
    student_t = schedule.timesteps(student_steps, "trailing") if student_steps else []
    if student_t and every_t[:: steps // student_steps] != student_t:  # rounded differently
        raise ValueError(
            f"The teacher's {steps} steps skip a time of the student's {student_steps}: choose another --sample-steps."
        )
    levels = [schedule.alphas_cumprod.tolist(), schedule.final_alpha.item(), every_t]
    tokens = [sd.tokenizer(captions, verbose=False).input_ids, sd.tokenizer.pad_token_id]
    settings = dict(
        weights=weights or teacher_fingerprint(sd),
        prediction=schedule.prediction,
        schedule=digest(json.dumps(levels).encode()),
        captions=digest(json.dumps(tokens).encode()),
        steps=steps,
        guidance=guidance,
        negative_prompt=sd.stated_negative(negative_prompt),
        seed=seed,
        batch=batch,
        stride=stride,
        keep_states=keep_states,
    )
    size = [sd.height, sd.width] if {sd.height, sd.width} != {sd.trained_side} else None
    optional = dict(interval=interval, student_steps=student_steps, size=size)
    made_with = json.dumps(settings | {name: value for name, value in optional.items() if value})
    epochs = range(-(-count // len(captions)))
    shuffles = [torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed + i)) for i in epochs]
    order = torch.cat(shuffles)[:count]  # the caption of each trajectory
    uncond = sd.encode_negative(negative_prompt)
    # Everything below is by shard, and a shard goes by the number of its first trajectory.
    files = {first: folder / f"trajectories-{first:06d}.safetensors" for first in range(0, count, batch)}
    captions_of = dict(zip(files, order.split(batch)))
    missing = [first for first, file in files.items() if not is_shard(file, made_with, len(captions_of[first]))]
    wait()  # every process must know what is missing before any of it is made
    existing = count - sum(len(captions_of[first]) for first in missing)
    mine = missing[rank::world]
    used = torch.cat([order[:0], *(captions_of[first] for first in mine)]).unique()
    prompts = encode_prompts(sd, [captions[i] for i in used]) if mine else None
    bar = tqdm(initial=existing, total=count, desc="teacher trajectories", unit="trajectory", disable=rank > 0)
    for first in missing:  # for the bar, other processes keep pace with this one
        if first in mine:
            cond = prompts[torch.searchsorted(used, captions_of[first])].to(sd.device)
            z_T = sd.starting_noise(range(seed + first, seed + first + len(cond)))
            timesteps = strided(every_t, stride, first // batch)
            z_t, target, z_0 = teacher_trajectory(
                sd, cond, uncond.expand(len(cond)), guidance, z_T, timesteps, interval
            )
            require_finite(z_0, sd.unet)
            if student_steps:
                z_t, target = few_step_states(schedule, z_t, z_0, student_steps)
                timesteps = student_t
            tensors = {"z_0": z_0, "z_t": z_t, "target": target} if keep_states else {"z_0": z_0}
            # Half precision rounds by 1/2000 of a value, far below what any student misses, and halves the disk space.
            tensors = {name: x.half().cpu().contiguous() for name, x in tensors.items()}
            tensors |= {"prompt": captions_of[first], "t": torch.tensor(timesteps)}
            write_shard(files[first], tensors, made_with)
        bar.update(len(captions_of[first]))
    bar.close()
    wait()
    return Trajectories(list(files.values()), count)


def strided(timesteps: Sequence[int], stride: int, shard: int) -> list[int]:
    """The time steps that the teacher visits in shard number ``shard``: the first, and every ``stride``-th.

    The choice shifts from shard to shard, so that ``stride`` shards cover all steps.
    """
    return [t for i, t in enumerate(timesteps) if i == 0 or i % stride == shard % stride]


PROMPTS_AT_ONCE = 8  # with 64, SDXL's encoders would keep 0.6 GB of hidden states


def encode_prompts(sd: StableDiffusion, prompts: Sequence[str]) -> Conditioning:
    """The embeddings of N prompts, on the CPU, as those of many prompts would fill a small GPU."""
    starts = range(0, len(prompts), PROMPTS_AT_ONCE)
    with on_device(sd.text_encoder, sd.device):  # moved once, for all of them
        return cat([sd.encode_prompt(list(prompts[i : i + PROMPTS_AT_ONCE])).to("cpu") for i in starts])


def is_shard(file: Path, made_with: str, size: int) -> bool:
    """True for an intact shard of at least ``size`` trajectories. Raises ValueError if made with other settings."""
    if not file.exists():
        return False
    shard = read_shard(file)
    if shard is None:
        warnings.warn(f"{file} is damaged: the teacher samples it again.", stacklevel=3)
        return False
    tensors, stored = shard
    if stored != made_with:
        raise ValueError(
            f"{file} was generated with other settings ({stored}): delete {file.parent}, "
            "or give another folder with --out or --states."
        )
    return len(tensors["prompt"]) >= size


class Trajectories:
    """The first ``count`` trajectories of some shards.

    The shards are memory-mapped, so memory does not grow with them. ``examples`` [E, 2] int64 lists every stored state
    as (trajectory, step).
    """

    def __init__(self, files: list[Path], count: int):
        self.shards = [load_file(file) for file in files]
        self.rows = [(s, row) for s, shard in enumerate(self.shards) for row in range(len(shard["prompt"]))][:count]
        steps = [range(len(self.shards[s]["t"])) for s, _ in self.rows]
        self.examples = torch.tensor([(i, step) for i, steps_of_one in enumerate(steps) for step in steps_of_one])

    def __len__(self) -> int:
        return len(self.rows)

    def prompts(self, trajectories: Tensor) -> Tensor:
        """The prompt number of each trajectory, [B]."""
        return torch.stack([self.shards[s]["prompt"][row] for s, row in self.rows_of(trajectories)])

    def ends(self, trajectories: Tensor) -> Tensor:
        """z_0 of each trajectory, [B, 4, h, w] float32."""
        return torch.stack([self.shards[s]["z_0"][row] for s, row in self.rows_of(trajectories)]).float()

    def states(self, trajectories: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z_t and its guided prediction at one step of each trajectory, [B, 4, h, w] float32, and t [B]."""
        rows = list(zip(self.rows_of(trajectories), steps.tolist()))
        z_t = torch.stack([self.shards[s]["z_t"][row, step] for (s, row), step in rows])
        target = torch.stack([self.shards[s]["target"][row, step] for (s, row), step in rows])
        return z_t.float(), target.float(), torch.stack([self.shards[s]["t"][step] for (s, _), step in rows])

    def rows_of(self, trajectories: Tensor) -> list[tuple[int, int]]:
        """The shard of each trajectory and its row there."""
        return [self.rows[i] for i in trajectories.tolist()]
