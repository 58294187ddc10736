"""Run every measurement that needs a GPU, the most valuable first, within a budget of time.

  python tests/gpu/quarter_hour.py --out DIR                      the stages that fit into --budget seconds
  python tests/gpu/quarter_hour.py --out DIR --only facts table
  python tests/gpu/quarter_hour.py --out DIR --dry                the same lines on a CPU, with tiny networks

DIR/gpu.json is written again after every figure, DIR/logs.tar.gz after every stage. docs/on-a-gpu.md says more.

This file only keeps time. The stages, in gpu_measurements.py, gpu_training.py and gpu_experiments.py, run one after the
other in a process of their own. One that fails, hangs or kills its process costs its own results only: the next has a
new process, because an error of CUDA stays until the process ends.
"""

import argparse
import faulthandler
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAGES = {  # the seconds that each takes on an H200, roughly
    "facts": 20,  # with the imports
    "forward": 15,
    "retrain": 390,  # 54 of them in reserve
    "from_nothing": 390,  # 30 of them in reserve; not measured yet, as the next, "compiled" and "experiments"
    "distil": 70,
    "images": 30,
    "profile": 12,
    "kernel": 90,
    "updates": 80,
    "table": 45,
    "memory": 60,
    "end_to_end": 140,
    "compiled": 90,
    "experiments": 240,
}
USE_THE_KERNEL = {"kernel", "updates", "table"}
PATIENCE = 2  # a stage may take so many times its seconds, if the budget allows it
DRY_SECONDS = 120  # for each stage


@dataclass
class Task:
    """What a stage needs to know."""

    out: Path  # for the results: at most eight files, of 16 MiB each
    logs: Path  # packed into one of them
    scratch: Path
    dry: bool
    ends: float = 0.0  # time.monotonic() at which the stage will be stopped

    @property
    def extensions(self) -> Path:
        """Where the compiled kernel lies."""
        return self.scratch / "extensions"


Stage = Callable[[Task], Iterator[tuple[str, object]]]  # yields (name of a figure, figure)


# In the process of the stages.


def work(pipe: Connection, task: Task) -> None:
    """Run the stages that are asked for through ``pipe``; what they print goes into the log."""
    if task.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(task.extensions)
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
    with (task.logs / "stages.txt").open("a") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    sys.stdout.reconfigure(line_buffering=True)
    faulthandler.enable()
    import gpu_experiments
    import gpu_measurements
    import gpu_training

    serve(pipe, task, gpu_measurements.STAGES | gpu_training.STAGES | gpu_experiments.STAGES)


def serve(pipe: Connection, task: Task, stages: Mapping[str, Stage]) -> None:
    """Receive (stage, when it ends), send its figures one by one, and None after the last; until None is received."""
    os.setpgid(0, 0)  # so that this process can be killed together with those it has started
    for name, task.ends in iter(pipe.recv, None):
        print(f"\n== {name}", flush=True)
        faulthandler.dump_traceback_later(max(task.ends - time.monotonic() - 1, 0.1))  # where it hangs, into the log
        try:
            for figure in stages[name](task):
                pipe.send(figure)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            pipe.send(("failed", repr(error)[:300]))
        faulthandler.cancel_dump_traceback_later()
        pipe.send(None)


# In the process that keeps time. It must not import torch: a worker starts by importing this file again.


class Worker:
    """A process that runs stages."""

    def __init__(self, target: Callable[[Connection, Task], None], task: Task):
        context = multiprocessing.get_context("spawn")
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=target, args=(other_end, task))
        self.process.start()
        other_end.close()

    def figures(self, stage: str, ends: float) -> Iterator[tuple[str, object]]:
        """Run a stage; yields its figures as they come. The last is ("failed", reason) if it did not finish."""
        try:
            self.pipe.send((stage, ends))
            while self.pipe.poll(max(ends - time.monotonic(), 0)):
                figure = self.pipe.recv()
                if figure is None:
                    return
                yield figure
            yield "failed", "out of time"
        except (EOFError, ConnectionError):
            self.process.join()
            yield "failed", f"its process ended with exit code {self.process.exitcode}"

    def stop(self) -> None:
        with suppress(ConnectionError):
            self.pipe.send(None)
        self.process.join(timeout=10)
        self.kill()

    def kill(self) -> None:
        """End the process and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def failed(figures: Mapping[str, object]) -> bool:
    """True if a stage, or a part of it, has failed."""
    return "failed" in figures or any(str(value).startswith("failed: ") for value in figures.values())


def write_record(task: Task, record: dict) -> None:
    """Write gpu.json beside the old one, then rename it."""
    beside = task.out / "gpu.json.tmp"
    beside.write_text(json.dumps(record, indent=1, default=str) + "\n")
    beside.replace(task.out / "gpu.json")


def write_logs(task: Task) -> None:
    with tarfile.open(task.out / "logs.tar.gz", "w:gz") as archive:
        archive.add(task.logs, "logs")


def start_build(task: Task) -> subprocess.Popen:
    """Compile the kernel beside the first stages. A stage that uses it waits until it is there."""
    command = [sys.executable, "-m", "minidistill.kernels"]
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(task.extensions)}
    with (task.logs / "build.txt").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment, process_group=0)


def run_stages(
    names: Sequence[str], seconds: Mapping[str, float], task: Task, end: float, target: Callable = work
) -> dict[str, dict]:
    """Stage -> its figures, which are on disk as soon as they are there. ``end``: time.monotonic() at most."""
    stages: dict[str, dict] = {}
    record = {"command": shlex.join(["python", *sys.argv]), "stages": stages}
    worker = None
    try:
        for name in names:
            figures = stages[name] = {}
            start = time.monotonic()
            if end - start < seconds[name]:
                figures["skipped"] = f"it takes {seconds[name]} seconds, and {end - start:.0f} are left"
                write_record(task, record)
                continue
            worker = worker or Worker(target, task)
            for key, value in worker.figures(name, min(start + PATIENCE * seconds[name], end)):
                figures[key] = value
                write_record(task, record)
            figures["seconds"] = round(time.monotonic() - start, 1)
            if failed(figures):
                worker.kill()
                worker = None
            write_record(task, record)
            write_logs(task)
            print(f"{name}: {figures['seconds']} s{', FAILED' if failed(figures) else ''}", flush=True)
    finally:
        if worker:
            worker.stop()
    return stages


def summary(stages: Mapping[str, Mapping[str, object]]) -> str:
    """All figures, one a line."""
    lines = []
    for name, figures in stages.items():
        lines.append(f"== {name}")
        for key, value in figures.items():
            text = f"{value:.3f}" if isinstance(value, float) else str(value).replace("\n", " ")
            lines.append(f"   {key}: {text[:150]}")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    add("--budget", type=float, default=390, metavar="SECONDS", help="for all stages (default: %(default)s)")
    add("--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"only these, of {', '.join(STAGES)}")
    add("--dry", action="store_true", help="the same on a CPU, with tiny networks")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the number of stages that failed."""
    end = time.monotonic()
    args = parse(argv)
    end += args.budget
    args.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in STAGES if not args.only or name in args.only]
    seconds = dict.fromkeys(STAGES, DRY_SECONDS / PATIENCE) if args.dry else STAGES
    with tempfile.TemporaryDirectory() as folder:
        task = Task(args.out.resolve(), Path(folder) / "logs", Path(folder) / "scratch", args.dry)
        task.logs.mkdir()
        task.scratch.mkdir()
        build = start_build(task) if USE_THE_KERNEL & set(names) and not args.dry else None
        try:
            stages = run_stages(names, seconds, task, end)
        finally:
            if build and build.poll() is None:
                os.killpg(build.pid, signal.SIGKILL)
    print(summary(stages))
    return sum(map(failed, stages.values()))


if __name__ == "__main__":
    sys.exit(main())
