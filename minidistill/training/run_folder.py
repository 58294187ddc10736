"""The folder of a run: one run at a time, and checkpoints to resume from."""

import argparse
import hashlib
import io
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import nn

from minidistill.data.shards import schedule_fingerprint, vae_fingerprint
from minidistill.formats.files import atomic_write, digest, write_text
from minidistill.pipeline import StableDiffusion
from minidistill.training.cuda_graph import load_moments

try:
    import fcntl
except ImportError:  # on Windows, where two runs in one folder go unnoticed
    fcntl = None

# Flags that do not change what is learned, or that are recorded otherwise: --student and --source as --method, the
# spacing by --student-steps and --model, --sample-batch where the teacher samples what the student learns from.
FREE = {"out", "states", "resume", "no_report", "save_every", "device", "kernel", "memory", "accumulate", "compile"}
FREE |= {"no_graph", "batched_teacher", "student", "source", "spacing", "sample_batch"}
CONTENTS = re.compile(r".*( \([0-9a-f]{16}\))", re.DOTALL)  # a flag with the fingerprint of what it names
KEPT = 2  # checkpoints: the older one is for when the newer turns out to be damaged
DIGEST = 32  # bytes of SHA-256 at the end of a checkpoint: torch.load itself does not notice a flipped bit


def lock(folder: Path, wait: bool = False) -> IO[str]:
    """Lock a folder, made if it does not exist, for as long as the returned file is open.

    If another run holds it, wait for that run, or raise ValueError. The operating system releases the lock when a
    process ends, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ("filling" if wait else "lock")).open("a")  # two names, as --out and --states may be one folder
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise ValueError(
                f"Another run is at work in {folder}: wait for it to end, or name another --out."
            ) from None
        print(f"Another run is at work in {folder}: waiting for it.", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def checkpoint_files(out: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((out / "checkpoints").glob("step-*.pt"))


def save_checkpoint(
    out: Path,
    trained: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    losses: list[float],
    settings: dict[str, str],
) -> None:
    """Save the state after ``len(losses)`` updates, and the losses so far as ``metrics.jsonl``.

    That is all a run needs: learning rate and data follow from the number of updates, and the loop's random numbers
    come from generators seeded with it, never from the global one.
    """
    # The metrics come first: if the run is killed in between, it resumes from the older checkpoint and rewrites them.
    lines = [json.dumps({"step": step + 1, "loss": loss}) for step, loss in enumerate(losses)]
    write_text(out / "metrics.jsonl", "\n".join(lines) + "\n")
    state = {
        "trained": [p.detach() for p in trained],
        "optimizer": optimizer.state_dict(),
        "losses": losses,
        "settings": settings,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    path = out / f"checkpoints/step-{len(losses):06d}.pt"
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(data)  # here a full disk is an OSError, which torch.save would disguise
        file.write(hashlib.sha256(data).digest())
    files = checkpoint_files(out)
    newest = files.index(path) + 1
    for other in [*files[: max(newest - KEPT, 0)], *files[newest:]]:  # later ones were damaged, and passed over
        other.unlink()


def fixed_settings(
    args: argparse.Namespace, sd: StableDiffusion, weights: str, style: Mapping[str, str], stamp: Mapping[str, str]
) -> dict[str, str]:
    """The flags that must be the same when a run is resumed, as text.

    A flag that names a file has a fingerprint of its contents: other weights may lie under the same path by now, and
    the same weights under another. ``weights`` is the ``teacher_fingerprint``, ``style`` what
    ``prepare_teacher`` returned, ``stamp`` the fingerprint of the prompts or images to learn from, by flag.
    """
    model = f"{weights} {vae_fingerprint(sd.vae)} {schedule_fingerprint(sd.schedule)}"
    fingerprints = {"model": digest(model.encode())}
    fingerprints |= {flag: digest(file_and_scale.encode()) for flag, file_and_scale in style.items()}
    if args.tokenizer:
        fingerprints["tokenizer"] = digest(str(sorted(sd.tokenizer.get_vocab().items())).encode())
    fingerprints |= stamp
    settings = {flag: str(value) for flag, value in vars(args).items() if flag not in FREE}
    if args.source != "images":  # the batch decides which states of a trajectory are stored
        settings["sample_batch"] = str(None if args.sample_batch == args.batch else args.sample_batch)
    return settings | {flag: f"{settings[flag]} ({value})" for flag, value in fingerprints.items()}


def contents(setting: str) -> str:
    """The fingerprint in a setting, if it has one: the same model may lie under another path by now."""
    return CONTENTS.sub(r"\1", setting)


def is_intact(file: Path) -> bool:
    """True if the checkpoint is as it was written."""
    data = memoryview(file.read_bytes())
    return hashlib.sha256(data[:-DIGEST]).digest() == data[-DIGEST:]


def resume(
    out: Path, trained: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, settings: dict[str, str]
) -> list[float]:
    """Load the newest intact checkpoint into parameters and optimizer; returns the losses so far, one per update.

    Without a checkpoint nothing is loaded and there are no losses. Raises ValueError that names the flags which differ
    from the checkpoint's.
    """
    for file in reversed(checkpoint_files(out)):
        if not is_intact(file):
            warnings.warn(f"{file} is damaged and passed over: its checksum differs.", stacklevel=2)
            continue
        state = torch.load(file, weights_only=True, map_location="cpu")  # ignores the digest at the end
        saved = state["settings"]
        differing = [
            f"--{name.replace('_', '-')} {saved.get(name)}".removesuffix(" True")
            for name in settings
            if contents(settings[name]) != contents(saved.get(name, "None"))  # None: newer than the checkpoint
        ]
        if differing:
            message = f"{file} was made with {', '.join(differing)}: give the same, or another --out."
            if any(flag.endswith(" None") for flag in differing):
                message += " None is a flag that was left out."
            raise ValueError(message)
        with torch.no_grad():
            for p, value in zip(trained, state["trained"], strict=True):
                p.copy_(value)
        load_moments(optimizer, state["optimizer"])
        return state["losses"]
    return []
