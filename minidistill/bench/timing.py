"""A clock, the name of what it timed, and a table of it: what benchmarks and evaluation share."""

import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds, until the device is done."""
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return models[0].split(": ")[1] if models else platform.processor() or platform.machine()


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """In Markdown: the titles, what lies under them (``---``), and the rows."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
