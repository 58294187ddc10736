"""A run that is killed at any moment and resumed ends like an undisturbed one, to the last byte.

PYTHONPATH=.:tests python tests/training/test_killed.py 20    kills 20 runs and prints the results
"""

import errno
import itertools
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from tiny import ROOT, fork, run_script, same_result, write_tiny

from minidistill.formats.files import atomic_folder, atomic_write

SHARDS, UPDATES = 4, 6  # a checkpoint after each of these


def start(out: Path, flags: list[str], half_written: int = 0) -> BaseProcess:
    """Run train.py in a fork of this process.

    With ``half_written`` n, the process cuts the n-th file that it is about to rename in half, and kills itself.
    """
    renamed = itertools.count(1)

    def kill(event: str, args: tuple) -> None:
        if event == "os.rename" and str(out) in str(args[1]) and next(renamed) == half_written:
            os.truncate(args[0], os.path.getsize(args[0]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        sys.addaudithook(kill)
        run_script(ROOT / "train.py", [*flags, "--out", str(out), "--no-report"])

    return fork(run, out.with_suffix(".log"))


def finish(out: Path, flags: list[str]) -> None:
    (process := start(out, flags)).join(600)
    assert process.exitcode == 0, out.with_suffix(".log").read_text()


def stage(out: Path) -> str:
    """How far a killed run had got."""
    if list(out.rglob("*.tmp")):
        return "writing a file"
    if (out / "lora.safetensors").exists():
        return "after all"
    if list(out.glob("checkpoints/*.pt")):
        return "learning"
    return "sampling trajectories" if list(out.glob("states/trajectories*")) else "loading"


def main(folder: Path, points: int) -> tuple[int, int]:
    """Kill runs and resume them; returns how many, and how many of them ended like the undisturbed one."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("cat", "dog")))
    flags = dict(model=write_tiny(folder / "model"), prompts=prompts, trajectories=2 * SHARDS, sample_steps=3)
    flags |= dict(steps=UPDATES, batch=2, rank=2, save_every=1, device="cpu")
    flags = [x for name, value in flags.items() for x in (f"--{name.replace('_', '-')}", str(value))]

    runpy.run_path(str(ROOT / "train.py"))  # so that the forks need not import everything again
    before = time.monotonic()
    finish(undisturbed := folder / "undisturbed", flags)
    lasted = time.monotonic() - before

    stages, identical = Counter(), 0
    dice = random.Random(1)
    files = SHARDS + 2 * UPDATES + 1  # each checkpoint comes with the metrics; and the LoRA
    over = dice.sample(range(1, files + 1), max(points // 4, 1))
    for i, half_written in enumerate([*[0] * points, *over]):
        process = start(out := folder / f"run-{i}", flags, half_written)
        if not half_written:  # at a random moment of the i-th part of the run
            time.sleep((i + dice.random()) / points * lasted)
            process.kill()
        process.join(600)
        assert process.exitcode == -signal.SIGKILL or not half_written, out.with_suffix(".log").read_text()
        stages[stage(out)] += 1
        finish(out, [*flags, "--resume"])
        identical += same_result(out, undisturbed)
    where = ", ".join(f"{count} {name}" for name, count in stages.items())
    print(f"{stages.total()} points tried ({where}), {identical} runs resumed identical")
    return stages.total(), identical


@pytest.mark.parametrize("points", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment(points: int, tmp_path: Path):
    tried, identical = main(tmp_path, points)
    assert tried > points and tried == identical


def test_a_file_is_renamed_only_after_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So a power cut leaves the old contents or the new. Some disks report only at fsync that they are full."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    message = f"No space left on device: '{tmp_path}/file'"
    with pytest.raises(OSError, match=message), atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_an_unfinished_folder_of_a_killed_process_is_replaced(tmp_path: Path):
    (tmp_path / "student.tmp/half").mkdir(parents=True)
    with atomic_folder(tmp_path / "student") as temporary:
        (temporary / "whole").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["student", "whole"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder), int(sys.argv[1]))
