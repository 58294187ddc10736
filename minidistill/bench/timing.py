"""The clock that all benchmarks share."""

from collections.abc import Callable, Hashable, Mapping

import torch
from tqdm import tqdm

from minidistill.evaluate.sampling import Stopwatch


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``run()`` takes, until the device has finished."""
    with Stopwatch(device) as clock:
        run()
    return clock.seconds


def take_turns(
    runs: Mapping[Hashable, Callable[[], object]], repeats: int, device: torch.device
) -> dict[Hashable, list[float]]:
    """Seconds of every run, ``repeats`` times in turn (A, B, A, B, ...): what slows the machine slows all alike."""
    seconds: dict[Hashable, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(repeats), "timing"):
        for name, run in runs.items():
            seconds[name].append(timed(run, device))
    return seconds
