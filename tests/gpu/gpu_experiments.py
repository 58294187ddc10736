"""The stage of quarter_hour.py that times changes to the CUDA kernel: one patch each, in experiments/.

  python tests/gpu/gpu_experiments.py LOGS ENDS [dry]

is a process of its own, because PyTorch loads one kernel per process. It measures the package in the current folder.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

from gpu_measurements import Figures, attempt, table
from quarter_hour import ROOT, Task

from minidistill.bench import kernel
from minidistill.kernels.build import CSRC

PATCHES = {path.stem: path for path in sorted(Path(__file__).with_name("experiments").glob("*.patch"))}


def copy_package(task: Task, name: str) -> None:
    """Copy the package into a folder of scratch, and apply the patch ``name`` there, if there is one."""
    folder = task.scratch / name
    shutil.copytree(ROOT / "minidistill", folder / "minidistill", ignore=shutil.ignore_patterns("__pycache__"))
    if name in PATCHES:
        # Without this, git finds a repository above the folder and skips the patch.
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(task.scratch)}
        subprocess.run(["git", "apply", PATCHES[name]], cwd=folder, env=environment, check=True)


def start(task: Task, name: str, *command: object) -> subprocess.Popen:
    """Run Python with the copy ``name`` of the package."""
    folder = task.scratch / name
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT / "tests"))),
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )


def measured(task: Task, name: str, ends: float) -> dict[str, object]:
    """Layer -> rows, from a process that must be done at ``ends``."""
    logs = task.logs / name
    logs.mkdir()
    process = start(task, name, __file__, logs, ends, *["dry"] * task.dry)
    try:
        output, _ = process.communicate(timeout=max(ends - time.monotonic(), 0))
    finally:
        process.kill()
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}; logs/stages.txt says more")
    return json.loads(output)


def experiments(task: Task) -> Figures:
    """``table``, for addmm and the fused kernel only: of the kernel as it is, and with each of the patches."""
    names = ["shipped", *PATCHES]
    for name in names:
        copy_package(task, name)
    names = names[-1:] if task.dry else names
    for build in [start(task, name, "-m", "minidistill.kernels") for name in names if not task.dry]:
        build.wait()  # all at once, as nothing is timed yet
    for i, name in enumerate(names):
        now = time.monotonic()
        figures = attempt(measured, task, name, now + (task.ends - now) / (len(names) - i))
        if isinstance(figures, str):  # it failed
            figures = {"all layers": figures}
        for layer, rows in figures.items():
            yield f"{name}, {layer}", rows


def measure(logs: str, ends: str, dry: str = "") -> None:
    """Print the figures of ``table`` as JSON."""
    assert CSRC.is_relative_to(Path.cwd()), f"{CSRC} is not the copy in {Path.cwd()}"
    task = Task(Path(), Path(logs), Path(), bool(dry), float(ends))
    with patch.object(kernel, "WAYS", {way: kernel.WAYS[way] for way in ("addmm", "fused")}):
        print(json.dumps(dict(table(task))))


STAGES = {"experiments": experiments}

if __name__ == "__main__":
    measure(*sys.argv[1:])
