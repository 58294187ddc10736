"""Two processes of torchrun, by gloo on the CPU: they learn what one does, and live and die together."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT

from minidistill.training.ranks import Ranks

UPDATES = 20

# train.py, and what happens to one of its processes in the first attempt, after an update.
WORKER = f"""
import os, runpy, signal, sys
from torch.optim.optimizer import register_optimizer_step_post_hook

rank, update, what = os.environ["HAPPENS"].split()
updates = []

def happen(optimizer, *_):
    updates.append(1)
    if len(updates) == int(update) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if what == "NaN":
            optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))
        else:
            os.kill(os.getpid(), getattr(signal, what))

def record(event, args):
    if event == "os.rename" and "trajectories-" in str(args[1]):
        with open("shards.txt", "a") as file:
            print(os.environ["RANK"], os.path.basename(args[1]), file=file)

sys.addaudithook(record)
if os.environ["RANK"] == rank:
    register_optimizer_step_post_hook(happen)
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def flags(tiny_model: Path, prompts_file: Path) -> Callable[..., list[str]]:
    def flags(out: Path, **changes: object) -> list[str]:
        settings = dict(model=tiny_model, prompts=prompts_file, out=out, steps=UPDATES, sample_steps=3, trajectories=12)
        settings |= dict(batch=4, rank=2, save_every=4, device="cpu") | changes
        found = [x for name, value in settings.items() for x in (f"--{name.replace('_', '-')}", str(value))]
        return [*found, "--no-report"]

    return flags


def torchrun(folder: Path, flags: list[str], happens: str = "9 0 nothing", restarts: int = 0):
    (folder / "worker.py").write_text(WORKER)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HAPPENS": happens}
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "worker.py", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """Two processes, in float64."""
    folder = tmp_path_factory.mktemp("two")
    return folder / "run", torchrun(folder, flags(folder / "run", dtype="float64"))


def assert_same_student(one: Path, other: Path) -> None:
    pairs, others = load_file(one / "lora.safetensors"), load_file(other / "lora.safetensors")
    assert pairs.keys() == others.keys() and all(x.dtype == torch.float64 for x in pairs.values())
    assert max((pairs[name] - others[name]).abs().max().item() for name in pairs) < 1e-9
    assert max(x.abs().max() for name, x in pairs.items() if name.endswith("lora_up")) > 1e-2


def test_two_processes_learn_what_one_does(two, command, flags, tmp_path: Path):
    out, run = two
    assert run.returncode == 0, run.stderr
    assert command("train.py", *flags(tmp_path / "one", dtype="float64")).code == 0
    assert_same_student(out, tmp_path / "one")
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-6) and len(losses(out)) == UPDATES


def test_each_shard_is_made_once_and_is_the_same(two, command, flags, tmp_path: Path):
    out, _ = two
    made = sorted(line.split()[::-1] for line in (out.parent / "shards.txt").read_text().splitlines())
    assert made == [[f"trajectories-{first:06d}.safetensors", str(i % 2)] for i, first in enumerate((0, 4, 8))]
    command("train.py", *flags(tmp_path / "one", dtype="float64", steps=1))
    for name, _ in made:
        assert (out / "states" / name).read_bytes() == (tmp_path / "one/states" / name).read_bytes()


def test_rank_0_alone_speaks(two):
    _, run = two
    assert run.stdout.count("frozen parameters") == run.stdout.count("Wrote ") == 1
    assert run.stderr.count("trajectories:   0%") == run.stderr.count("distilling:   0%") == 1


@pytest.mark.slow
def test_the_teacher_in_the_loop(command, flags, tmp_path: Path):
    one, other = (flags(tmp_path / name, dtype="float64", method="noised") for name in ("one", "two"))
    run = torchrun(tmp_path, other)
    assert run.returncode == 0, run.stderr
    command("train.py", *one)
    assert_same_student(tmp_path / "one", tmp_path / "two")


def test_a_killed_worker_is_started_again_and_goes_on(two, flags, tmp_path: Path):
    """Without its rank 1, rank 0 ends too; torchrun starts both anew, and they go on from update 8."""
    out = tmp_path / "run"
    run = torchrun(tmp_path, [*flags(out, dtype="float64"), "--resume"], happens="1 10 SIGKILL", restarts=3)
    assert run.returncode == 0, run.stderr
    assert "another process of this run has stopped" in run.stderr and f"8/{UPDATES}" in run.stderr
    for name in ("lora.safetensors", "metrics.jsonl"):
        assert (out / name).read_bytes() == (two[0] / name).read_bytes()


@pytest.mark.slow
def test_asked_to_stop_one_process_all_stop_after_the_same_update(command, flags, tmp_path: Path):
    """And in float32 the loss of two processes is that of one."""
    run = torchrun(tmp_path, flags(tmp_path / "two"), happens="1 7 SIGTERM")
    assert run.returncode != 0 and "Saved after 7 of 20 updates" in run.stderr
    assert [file.name for file in (tmp_path / "two/checkpoints").iterdir()].count("step-000007.pt") == 1
    command("train.py", *flags(tmp_path / "one"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one")[:7], rel=1e-3)
    assert command("train.py", *flags(tmp_path / "two"), "--resume").code == 0  # a process goes on where two stopped
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def test_what_is_no_number_on_one_stops_all(flags, tmp_path: Path):
    run = torchrun(tmp_path, flags(tmp_path / "run", dtype="float64"), happens="1 5 NaN")
    assert run.returncode != 0 and "At update 6 the loss is nan" in run.stderr
    assert [file.name for file in (tmp_path / "run/checkpoints").iterdir()] == ["step-000004.pt"]


# By itself


def test_parts_of_a_batch():
    batch = torch.arange(12)
    assert torch.equal(torch.cat([Ranks(rank, 3).part(batch) for rank in range(3)]), batch)
    assert Ranks().part(batch) is batch or torch.equal(Ranks().part(batch), batch)


def test_a_batch_that_cannot_be_shared_is_refused_before_any_work(flags, tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    train = runpy.run_path(str(ROOT / "train.py"))
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(tmp_path / "run", batch=4)])
    with pytest.raises(ValueError, match="3 processes cannot share a batch of 4 .* --batch that is a multiple of 3"):
        train["main"](train["parse"](train["Settings"], ""), Ranks(0, 3), ExitStack())
    assert not (tmp_path / "run").exists()


def test_one_process_joins_no_group(command, flags, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: 1 / 0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun --nproc-per-node 1
    assert command("train.py", *flags(tmp_path / "run", steps=1)).code == 0
