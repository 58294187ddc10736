"""The clock that all benchmarks share, and the device it runs on."""

import platform
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

Name = TypeVar("Name", bound=Hashable)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``run()`` takes, until the device has finished."""
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def take_turns(runs: Mapping[Name, Callable[[], object]], repeats: int, device: torch.device) -> dict[Name, list[float]]:
    """Seconds of every run, ``repeats`` times in turn (A, B, A, B, ...): what slows the machine down slows all alike."""
    seconds: dict[Name, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(repeats), "timing"):
        for name, run in runs.items():
            seconds[name].append(timed(run, device))
    return seconds


def find_device(name: str) -> torch.device:
    """The device called ``name``. Raises ValueError for a CUDA device on a machine without one."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here: use --device cpu.")
    return device


def device_name(device: torch.device) -> str:
    """The model of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return models[0].split(": ")[1] if models else platform.processor() or platform.machine()
