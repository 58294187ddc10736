"""Fixtures: the tiny model's folder, the loaded model, prompts for it, the scripts run in this process, a whole run."""

import gc
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import ROOT, UPDATES, fork, run_script, write_tiny, write_tiny_xl

from minidistill import StableDiffusion, load
from minidistill.training.distributed import process_group
from minidistill.unet import UNet


def pytest_configure(config: pytest.Config) -> None:
    """With ``pytest -n 2`` each worker has one core, and so have the processes it starts.

    Only tests/gpu, named on the command line, sees a GPU: the other tests compare with float32, and it has TF32.
    """
    if not any("tests/gpu" in Path(word.partition("::")[0]).resolve().as_posix() for word in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from walking through all imported modules again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the official layout."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for an SDXL."""
    return write_tiny_xl(tmp_path_factory.mktemp("models") / "tiny-xl")


@pytest.fixture
def sd(tiny_model: Path) -> StableDiffusion:
    return load(tiny_model)


@pytest.fixture
def unet_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch size of every call of a UNet."""
    sizes, forward = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda unet, z_t, *more: sizes.append(len(z_t)) or forward(unet, z_t, *more))
    return sizes


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty prompts, of which train.py keeps two for evaluation."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    colours = ("red", "green", "blue", "purple")
    things = ("apple", "rocket", "cat", "dog", "pizza")
    file.write_text("\n".join(f"a {thing} on a {colour} background" for thing in things for colour in colours))
    return file


@pytest.fixture(scope="session")
def flags(tiny_model: Path, prompts_file: Path) -> Callable[..., list[str]]:
    """``flags(out, rank=4)``: the flags of a short run of train.py, some of them changed."""

    def flags(out: Path, **changes: object) -> list[str]:
        settings = dict(model=tiny_model, prompts=prompts_file, out=out, steps=UPDATES, sample_steps=3, trajectories=8)
        settings |= dict(batch=4, rank=2, save_every=2, device="cpu") | changes
        return [x for name, value in settings.items() for x in (f"--{name.replace('_', '-')}", str(value))]

    return flags


@pytest.fixture(scope="session")
def train() -> SimpleNamespace:
    """The functions of train.py: ``train.parse([...])``, ``train.main(args, ranks, resources)``."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "train.py")))


@pytest.fixture(scope="session")
def distil(train: SimpleNamespace) -> Callable[[list[str]], None]:
    """``distil(flags)``: train.py in this process, for fixtures that outlive ``command``."""

    def distil(flags: list[str]) -> None:
        args = train.parse(flags)
        with process_group(args.device) as ranks, ExitStack() as resources:
            train.main(args, ranks, resources)

    return distil


@pytest.fixture(scope="session")
def whole_run(flags, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """A whole run of train.py with its report, in a fork of this process. What it printed is in both outputs."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    log = out.with_suffix(".log")
    (process := fork(partial(run_script, ROOT / "train.py", flags(out)), log)).join(600)
    printed = log.read_text()
    return out, subprocess.CompletedProcess(flags(out), process.exitcode, printed, printed)


BAR = re.compile(r"\[\d\d:\d\d")  # every progress bar shows the time taken


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines on stderr that are no progress bars."""
        return [line for line in self.err.splitlines() if line and not BAR.search(line)]

    @property
    def complaint(self) -> str:
        """The last line of a command that failed."""
        assert self.code != 0, "the command succeeded"
        return self.lines[-1]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Result]:
    """``command("train.py", "--rank", 4)``: as from a shell, but in this process, which starts faster.

    Any exception but SystemExit would be a traceback in the shell, and fails the test; so does a global setting that
    the script leaves changed.
    """
    handler = signal.getsignal(signal.SIGINT)  # SIGINT is ignored when the tests run in the background

    def settings() -> tuple:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return handlers, torch.get_default_dtype(), torch.is_grad_enabled()

    def run(script: str, *args: object) -> Result:
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        monkeypatch.syspath_prepend(ROOT)
        capsys.readouterr()
        code = 0
        signal.signal(signal.SIGINT, signal.default_int_handler)
        before = settings()
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        except KeyboardInterrupt:
            pytest.fail(f"{script} let Ctrl-C through, with a traceback")
        finally:
            assert settings() == before
            signal.signal(signal.SIGINT, handler)
        out, err = capsys.readouterr()
        return Result(1, out, f"{err}{code}\n") if isinstance(code, str) else Result(code, out, err)

    return run
