"""Peak memory, of the GPU or of a process; and the fresh process in which a measurement has it to itself."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CALL = "import json, pickle, sys; call, args = pickle.load(sys.stdin.buffer); print(json.dumps(call(*args)))"


def in_fresh_process(function: Callable, *args: Any, **environment: str) -> Any:
    """``function(*args)``, computed in a new Python process; the result must fit into JSON.

    Raises ValueError, with what the process printed, if it fails.
    """
    done = subprocess.run(
        [sys.executable, "-c", CALL],
        input=pickle.dumps((function, args)),
        capture_output=True,
        env=os.environ | environment,
    )
    if done.returncode:
        call = f"{function.__name__}({', '.join(map(str, args))})"
        raise ValueError(f"{call} failed with exit code {done.returncode}:\n{done.stderr.decode()}")
    return json.loads(done.stdout)


def resident(field: str) -> int:
    """Bytes of memory this process has now ("VmRSS") or had at most ("VmHWM").

    Not from getrusage, whose peak starts at that of the parent process.
    """
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def peak_bytes(make: Callable[[], Callable[[], object]], device: torch.device) -> int:
    """Peak bytes while ``make()`` runs and its result is called twice, beyond what was in use before."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else resident("VmRSS")
    run = make()
    run(), run()  # AdamW's state exists only from the second update on
    return (torch.cuda.max_memory_allocated(device) if cuda else resident("VmHWM")) - before
