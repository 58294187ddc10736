"""A training run's folder: one run at a time, checkpoints to go on from, and a clean stop."""

import hashlib
import io
import json
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import nn

from minidistill.formats.files import written_whole

try:
    import fcntl
except ImportError:  # on Windows, where two runs in one folder go unnoticed
    fcntl = None

KEPT = 2  # checkpoints; the older one is for when the newer turns out damaged
DIGEST = 32  # bytes of SHA-256, at the end of a checkpoint: torch.load itself does not notice a flipped bit


def lock(folder: Path, wait: bool = False) -> IO[str]:
    """Have a folder, made if it is not there, to oneself for as long as the returned file is open.

    Where another run has it, waits for that one, or raises ValueError. The kernel lets go of it when a process ends,
    whatever ends it, so no lock is ever left over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ("filling" if wait else "lock")).open("a")  # --out and --states may be the same folder
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise ValueError(f"Another run is at work in {folder}: let it end, or name another --out.") from None
        print(f"Another run is at work in {folder}: waiting for it.", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list instead of dying of them: the loop looks at it between two updates."""
    caught: list[int] = []
    before = {n: signal.signal(n, lambda number, frame: caught.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    """Save after ``len(losses)`` updates, and the losses so far as ``metrics.jsonl``.

    Nothing else makes a run what it is: the learning rate and the place in the data follow from the number of updates,
    and all randomness in the loop comes from generators seeded with it, none from the global one.
    """
    # The metrics first: of a run that was killed in between, the updates since the checkpoint before are made again.
    with written_whole(out / "metrics.jsonl") as beside:
        lines = [json.dumps({"step": step + 1, "loss": loss}) for step, loss in enumerate(losses)]
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    state = {
        "trained": [p.detach() for p in trained],
        "optimizer": optimizer.state_dict(),
        "losses": losses,
        "settings": settings,
    }
    contents = io.BytesIO()
    torch.save(state, contents)
    contents.write(hashlib.sha256(contents.getbuffer()).digest())
    file = out / f"checkpoints/step-{len(losses):06d}.pt"
    with written_whole(file) as beside:
        beside.write_bytes(contents.getbuffer())  # a full disk is an OSError here, whatever torch.save would call it
    files = checkpoint_files(out)
    here = files.index(file) + 1
    for other in [*files[: max(here - KEPT, 0)], *files[here:]]:  # later ones were damaged, and passed over
        other.unlink()


def is_whole(file: Path) -> bool:
    """Whether the checkpoint is as it was written."""
    contents = memoryview(file.read_bytes())
    return hashlib.sha256(contents[:-DIGEST]).digest() == contents[-DIGEST:]


def resume(
    out: Path, trained: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, settings: dict[str, str]
) -> list[float]:
    """Go on from the newest whole checkpoint: fills parameters and optimizer, returns the losses so far, one an update.

    Where there is none, nothing is filled and there are no losses. Raises ValueError that names the flags which differ
    from those the checkpoint was made with.
    """
    for file in reversed(checkpoint_files(out)):
        if not is_whole(file):
            warnings.warn(f"{file} is damaged and passed over: its checksum differs.", stacklevel=2)
            continue
        state = torch.load(file, weights_only=True, map_location="cpu")  # which does not mind a digest after the end
        found = state["settings"]
        flags = [
            f"--{name.replace('_', '-')} {found.get(name)}" for name in settings if settings[name] != found.get(name)
        ]
        if flags:
            raise ValueError(f"{file} was made with {', '.join(flags)}: give the same, or another --out.")
        with torch.no_grad():
            for p, saved in zip(trained, state["trained"], strict=True):
                p.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        return state["losses"]
    return []
