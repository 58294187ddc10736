"""A training run's folder: checkpoints to go on from, and a clean stop."""

import io
import json
import pickle
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from minidistill.files import written_whole

KEPT = 2  # checkpoints; the older one is for when the newer turns out damaged


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
    """Save after ``len(losses)`` updates, and the losses so far as ``metrics.jsonl``."""
    state = {
        "trained": [p.detach() for p in trained],
        "optimizer": optimizer.state_dict(),
        "losses": losses,
        "settings": settings,
    }
    contents = io.BytesIO()
    torch.save(state, contents)
    with written_whole(out / f"checkpoints/step-{len(losses):06d}.pt") as beside:
        beside.write_bytes(contents.getbuffer())  # a full disk is an OSError here, whatever torch.save would call it
    for old in checkpoint_files(out)[:-KEPT]:
        old.unlink()
    with written_whole(out / "metrics.jsonl") as beside:
        lines = [json.dumps({"step": step + 1, "loss": loss}) for step, loss in enumerate(losses)]
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")


def resume(
    out: Path, trained: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, settings: dict[str, str]
) -> list[float]:
    """Go on from the newest whole checkpoint: fills parameters and optimizer, returns the losses so far, one an update.

    Where there is none, nothing is filled and there are no losses. Raises ValueError that names the flags which differ
    from those the checkpoint was made with.
    """
    for file in reversed(checkpoint_files(out)):
        try:
            state = torch.load(file, weights_only=True, map_location="cpu")
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            warnings.warn(f"{file} is damaged and passed over: {error}", stacklevel=2)
            continue
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
