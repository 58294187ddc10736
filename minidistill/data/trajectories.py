"""What the student learns from: the teacher's own guided trajectories, on disk.

A trajectory is what DDIM passes through on its way from noise to picture. Its states z_t and the guided predictions
eps_hat made there are ready pairs of input and target, with no teacher in the loop; its end z_0 is a latent that the
teacher generated, to be noised afresh (the paper's way, for which shards hold the ends alone).
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from minidistill.data.prompts import prompts, read_prompts
from minidistill.formats.files import blamed, digest, written_whole
from minidistill.formats.tensor_files import sort_header
from minidistill.pipeline import StableDiffusion
from minidistill.schedule import ddim_step
from minidistill.training.ranks import ALONE, Ranks

T = TypeVar("T")


def prompt_split(model_folder: Path, file: Path | None = None) -> tuple[list[str], list[str]]:
    """Prompts to learn from, and others kept for evaluation.

    Those of a text ``file`` (one a line); or the captions in the model folder's ``compositions.json``, which says
    itself which are held out; or our own list. Raises ValueError for a ``compositions.json`` that has not both.
    """
    compositions = model_folder / "compositions.json"
    if file is None and compositions.is_file():
        with blamed(compositions):
            rows = json.loads(compositions.read_text(encoding="utf-8"))
            learned = [r["caption"] for r in rows if not r["held_out"]]
            held_out = [r["caption"] for r in rows if r["held_out"]]
        if not (learned and held_out):
            raise ValueError(f"{compositions} should have captions to learn from and captions that are held out.")
        return learned, held_out
    return every_tenth_held_out(read_prompts(file) if file else prompts())


def every_tenth_held_out(listed: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those to learn from, and every tenth for evaluation. None is on both sides, unless there is only one."""
    everything = list(dict.fromkeys(listed))
    held_out = everything[::10]
    return [p for i, p in enumerate(everything) if i % 10] or held_out, held_out


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of the items, evenly spread over them: neighbours in a list of prompts are alike."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def teacher_trajectory(
    sd: StableDiffusion, cond: Tensor, uncond: Tensor, guidance: float, z_T: Tensor, timesteps: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the teacher by DDIM from z_T [B, 4, h, w] through the given S time steps, the noisiest first.

    Returns every state z_t and its guided prediction, both [B, S, 4, h, w], and the end z_0 [B, 4, h, w].
    """
    model = sd.denoiser(cond, uncond, guidance)
    z_t, states, targets = z_T, [], []
    with torch.no_grad():
        for t, t_next in pairwise([*timesteps, -1]):
            states.append(z_t)
            targets.append(model(z_t, torch.full((len(z_t),), t, device=z_t.device)))
            z_t = ddim_step(sd.schedule, targets[-1], z_t, t, t_next)
    return torch.stack(states, 1), torch.stack(targets, 1), z_t


def fingerprint(*networks: nn.Module) -> str:
    """A hash of the frozen weights, down to the last bit: other weights, other trajectories."""
    found = hashlib.sha256()
    for weight in (p for network in networks for p in network.parameters() if not p.requires_grad):
        found.update(weight.cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def generate(
    sd: StableDiffusion,
    captions: list[str],
    folder: Path,
    *,
    count: int,
    steps: int,
    guidance: float,
    negative_prompt: str = "",
    seed: int = 0,
    batch: int = 16,
    stride: int = 1,
    keep_states: bool = True,
    weights: str | None = None,
    ranks: Ranks = ALONE,
) -> "States":
    """Have the teacher draw ``count`` trajectories of ``steps`` DDIM steps, in shards of ``batch`` under ``folder``.

    Captions are taken in a shuffled order, again and again. Shards that are there already are kept, so an interrupted
    run goes on where it stopped, and one that asks for more adds to them; damaged ones are made again. Several
    ``ranks`` divide among them what is missing: each shard is made once, and is the same whoever makes it. Without
    ``keep_states`` only the ends z_0 are stored. ``weights`` is the fingerprint of UNet and text encoder, where that is
    known already.

    The states of one trajectory are much alike. With a ``stride`` n the teacher takes the first step, then only every
    n-th, at offsets that shift from shard to shard: n times the pictures for the time, and from n shards on every t.

    Raises ValueError when the folder holds shards that were made with other settings.
    """
    schedule, every_t = sd.schedule, sd.schedule.timesteps(steps)
    levels = [schedule.alphas_cumprod.tolist(), schedule.final_alpha.item(), every_t]
    tokens = [sd.tokenizer(captions).input_ids, sd.tokenizer.pad_token_id]
    settings = dict(
        weights=weights or fingerprint(sd.unet, sd.text_encoder),
        prediction=schedule.prediction,
        schedule=digest(json.dumps(levels).encode()),
        captions=digest(json.dumps(tokens).encode()),
        steps=steps,
        guidance=guidance,
        negative_prompt=negative_prompt,
        seed=seed,
        batch=batch,
        stride=stride,
        keep_states=keep_states,
    )
    made_with = json.dumps(settings)
    order = torch.cat([
        torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed + i))
        for i in range(-(-count // len(captions)))
    ])[:count]  # fmt: skip
    uncond = sd.encode_prompt([negative_prompt])
    files = {first: folder / f"trajectories-{first:06d}.safetensors" for first in range(0, count, batch)}
    chosen = dict(zip(files, order.split(batch)))
    missing = [first for first, file in files.items() if not is_shard(file, made_with, len(chosen[first]))]
    ranks.wait()  # all know what is missing before any of it is made
    there = count - sum(len(chosen[first]) for first in missing)
    bar = tqdm(initial=there, total=count, desc="teacher trajectories", unit="trajectory", disable=not ranks.first)
    for turn, first in enumerate(missing):
        if turn % ranks.world == ranks.rank:
            cond = sd.encode_prompt([captions[i] for i in chosen[first]])
            z_T = sd.starting_noise(range(seed + first, seed + first + len(cond)))
            offset = first // batch % stride
            timesteps = [t for i, t in enumerate(every_t) if i == 0 or i % stride == offset]
            z_t, target, z_0 = teacher_trajectory(sd, cond, uncond.expand_as(cond), guidance, z_T, timesteps)
            tensors = {"z_0": z_0, "z_t": z_t, "target": target} if keep_states else {"z_0": z_0}
            # Half precision rounds by 1/2000 of a value: far below what any student misses, at half the disk.
            tensors = {name: x.half().cpu().contiguous() for name, x in tensors.items()}
            tensors |= {"prompt": chosen[first], "t": torch.tensor(timesteps)}
            write_shard(files[first], tensors, made_with)
        bar.update(len(chosen[first]))
    bar.close()
    ranks.wait()
    return States(list(files.values()), count)


def write_shard(file: Path, tensors: dict[str, Tensor], made_with: str) -> None:
    with written_whole(file) as beside:
        beside.write_bytes(save(tensors, {"made_with": made_with, "checksum": checksum(tensors, made_with)}))
        sort_header(beside)


def read_shard(file: Path) -> tuple[dict[str, Tensor], str] | None:
    """The tensors of a shard, and what it was made with; None if it is damaged."""
    try:
        with safe_open(file, "pt") as shard:
            metadata = shard.metadata() or {}
        tensors, made_with = load_file(file), metadata["made_with"]
        return (tensors, made_with) if metadata["checksum"] == checksum(tensors, made_with) else None
    except (SafetensorError, OSError, KeyError):
        return None


def checksum(tensors: Mapping[str, Tensor], made_with: str) -> str:
    """Of all that a shard says: safetensors itself does not notice a flipped bit."""
    found = hashlib.sha256(made_with.encode())
    for name, x in sorted(tensors.items()):
        found.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        found.update(x.view(torch.uint8).numpy())
    return found.hexdigest()


def is_shard(file: Path, made_with: str, size: int) -> bool:
    """Whether the file is a whole shard of ``size`` or more; raises ValueError if it was made with other settings."""
    if not file.exists():
        return False
    shard = read_shard(file)
    if shard is None:
        warnings.warn(f"{file} is damaged: the teacher draws it again.", stacklevel=3)
        return False
    tensors, found = shard
    if found != made_with:
        raise ValueError(
            f"{file} was generated with other settings ({found}): delete {file.parent}, "
            "or give --out (or --states) another folder."
        )
    return len(tensors["prompt"]) >= size


class States:
    """The first ``count`` trajectories of some shards. ``len`` counts trajectories.

    The shards are memory-mapped: what is read of them comes from disk when it is, and memory does not grow with them.
    ``examples`` [E, 2] int64 names every state there is, as a trajectory and a step of it.
    """

    def __init__(self, files: list[Path], count: int):
        self.shards = [load_file(file) for file in files]
        self.where = [(s, row) for s, shard in enumerate(self.shards) for row in range(len(shard["prompt"]))][:count]
        steps = [range(len(self.shards[s]["t"])) for s, _ in self.where]
        self.examples = torch.tensor([(i, step) for i, taken in enumerate(steps) for step in taken])

    def __len__(self) -> int:
        return len(self.where)

    def prompts(self, trajectories: Tensor) -> Tensor:
        """The prompt's number of each trajectory, [B]."""
        return torch.stack([self.shards[s]["prompt"][row] for s, row in self._rows(trajectories)])

    def ends(self, trajectories: Tensor) -> Tensor:
        """z_0 of each trajectory, [B, 4, h, w] float32."""
        return torch.stack([self.shards[s]["z_0"][row] for s, row in self._rows(trajectories)]).float()

    def states(self, trajectories: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The state z_t and guided prediction at the given step of each, [B, 4, h, w] float32, and t [B]."""
        rows = list(zip(self._rows(trajectories), steps.tolist()))
        z_t = torch.stack([self.shards[s]["z_t"][row, step] for (s, row), step in rows])
        target = torch.stack([self.shards[s]["target"][row, step] for (s, row), step in rows])
        return z_t.float(), target.float(), torch.stack([self.shards[s]["t"][step] for (s, _), step in rows])

    def _rows(self, trajectories: Tensor) -> list[tuple[int, int]]:
        return [self.where[i] for i in trajectories.tolist()]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Without waiting: a GPU fetches x from pinned memory when it comes to it, and meanwhile the loop goes on."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def batches(size: int, batch: int, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Endless batches of indices below ``size``, shuffled anew each epoch; ``start`` skips the first ones.

    The n-th batch depends on the arguments alone, so a resumed run sees the data it would have seen.
    """
    per_epoch = max(size // batch, 1)
    epoch, first = divmod(start, per_epoch)
    while True:
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed + epoch))
        for i in range(first, per_epoch):
            yield order[i * batch : (i + 1) * batch]
        epoch, first = epoch + 1, 0
