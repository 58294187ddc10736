"""The clock that all benchmarks share."""

import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial

import torch
from tqdm import tqdm


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``run()`` takes, until the device has finished."""
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def take_turns(
    runs: Mapping[Hashable, Callable[[], object]], repeats: int, device: torch.device
) -> dict[Hashable, list[float]]:
    """Seconds of every run, ``repeats`` times in turn (A, B, A, B, ...): what slows the machine slows all alike."""
    seconds: dict[Hashable, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(repeats), "timing"):
        for name, run in runs.items():
            seconds[name].append(timed(run, device))
    return seconds
