"""training/distributed.py: two processes, on the CPU, learn what one process does, and stop together."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, fork, losses, randn, run_script

from minidistill.conditioning import Conditioning
from minidistill.distill import Batch
from minidistill.training.distributed import Ranks, process_group

UPDATES = 20

# Runs train.py. HAPPENS says what happens to which rank after which update, in the first attempt.
WORKER = f"""
import os, runpy, signal, sys, torch
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
if os.environ["RANK"] == "1":  # as a GPU of another kind, which draws other random numbers
    manual_seed = torch.manual_seed
    torch.manual_seed = lambda seed: manual_seed(seed + 1)
if os.environ["RANK"] == rank:
    register_optimizer_step_post_hook(happen)
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def run_flags(flags) -> Callable[..., list[str]]:
    usual = dict(steps=UPDATES, trajectories=12, save_every=4, dtype="float64")
    return lambda out, **changes: [*flags(out, **usual | changes), "--no-report"]


def torchrun(folder: Path, flags: list[str], happens: str) -> subprocess.CompletedProcess:
    (folder / "worker.py").write_text(WORKER)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HAPPENS": happens}
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "worker.py", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def run_rank(folder: Path, flags: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    run_script(folder / "worker.py", flags)


def two_ranks(folder: Path, flags: list[str], happens: str = "9 0 nothing") -> tuple[list[int], str]:
    """Start two forks as torchrun starts processes. Returns their exit codes, and what they printed."""
    (folder / "worker.py").write_text(WORKER)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = dict(MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE="2")
    environment |= dict(TORCHELASTIC_RESTART_COUNT="0", HAPPENS=happens)
    processes = []
    for rank in "01":
        run = partial(run_rank, folder, flags, environment | {"RANK": rank, "LOCAL_RANK": rank})
        processes.append(fork(run, folder / f"rank-{rank}.log"))
    for process in processes:
        process.join(300)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # if it hangs
    printed = "".join((folder / f"rank-{rank}.log").read_text() for rank in "01")
    assert None not in codes, f"A process did not end:\n{printed}"
    return codes, printed


@pytest.fixture(scope="module")
def two(run_flags, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two processes, in float64: the folder of their run, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    codes, printed = two_ranks(folder, run_flags(folder / "run"))
    assert codes == [0, 0], printed
    return folder / "run", printed


def assert_same_student(one: Path, other: Path) -> None:
    pairs, others = load_file(one / "lora.safetensors"), load_file(other / "lora.safetensors")
    assert pairs.keys() == others.keys() and all(x.dtype == torch.float64 for x in pairs.values())
    assert max((pairs[name] - others[name]).abs().max().item() for name in pairs) < 1e-9
    assert max(x.abs().max() for name, x in pairs.items() if name.endswith("lora_up")) > 1e-2


def test_two_processes_learn_what_one_process_does(two, command, run_flags, tmp_path: Path):
    out, _ = two
    assert command("train.py", *run_flags(tmp_path / "one")).code == 0
    assert_same_student(out, tmp_path / "one")
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-6) and len(losses(out)) == UPDATES


def test_each_shard_is_made_once_and_is_the_same(two, command, run_flags, tmp_path: Path):
    out, _ = two
    made = sorted(line.split()[::-1] for line in (out.parent / "shards.txt").read_text().splitlines())
    assert made == [[f"trajectories-{first:06d}.safetensors", str(i % 2)] for i, first in enumerate((0, 4, 8))]
    command("train.py", *run_flags(tmp_path / "one", steps=1))
    for name, _ in made:
        assert (out / "states" / name).read_bytes() == (tmp_path / "one/states" / name).read_bytes()


def test_only_rank_0_prints(two):
    _, printed = two
    assert printed.count("frozen parameters") == printed.count("Wrote ") == 1
    assert printed.count("trajectories:   0%") == printed.count("distilling:   0%") == 1


@pytest.mark.slow
def test_two_processes_with_the_teacher_in_the_loop(command, run_flags, tmp_path: Path):
    one, other = (run_flags(tmp_path / name, method="noised") for name in ("one", "two"))
    codes, printed = two_ranks(tmp_path, other)
    assert codes == [0, 0], printed
    command("train.py", *one)
    assert_same_student(tmp_path / "one", tmp_path / "two")


def test_a_killed_worker_is_restarted_and_continues(two, run_flags, tmp_path: Path):
    """Without rank 1, rank 0 ends too; torchrun starts both again, and they continue from update 8.

    New processes, which hash strings in another way, leave the same bytes.
    """
    out = tmp_path / "run"
    run = torchrun(tmp_path, [*run_flags(out), "--resume"], happens="1 10 SIGKILL")
    assert run.returncode == 0, run.stderr
    assert "another process of this run has stopped" in run.stderr and f"8/{UPDATES}" in run.stderr
    for name in ("lora.safetensors", "metrics.jsonl"):
        assert (out / name).read_bytes() == (two[0] / name).read_bytes()


def test_a_signal_to_one_process_stops_all_after_the_same_update(command, run_flags, tmp_path: Path):
    """And in float32, two processes have the losses of one."""
    one, two = (run_flags(tmp_path / name, dtype="float32") for name in ("one", "two"))
    codes, printed = two_ranks(tmp_path, two, happens="1 7 SIGTERM")
    assert all(codes) and "Saved after 7 of 20 updates" in printed
    assert [file.name for file in (tmp_path / "two/checkpoints").iterdir()].count("step-000007.pt") == 1
    command("train.py", *one)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one")[:7], rel=1e-3)
    # One process continues where two stopped.
    assert command("train.py", *two, "--resume").code == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(run_flags, tmp_path: Path):
    codes, printed = two_ranks(tmp_path, run_flags(tmp_path / "run"), happens="1 5 NaN")
    assert all(codes) and "At update 6 the loss is nan" in printed
    assert [file.name for file in (tmp_path / "run/checkpoints").iterdir()] == ["step-000004.pt"]


# One process


def test_parts_of_a_batch():
    batch = Batch(*(randn(12, 1, seed=seed) for seed in range(2)), Conditioning(randn(12, 2)), torch.ones(12, 1))
    for world in (1, 3):
        parts = [Ranks(rank, world).part(batch) for rank in range(world)]
        assert {len(part) for part in parts} == {12 // world}
        for name in ("z_t", "t", "weight"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
        assert torch.equal(torch.cat([part.cond.tokens for part in parts]), batch.cond.tokens)


def test_a_batch_that_cannot_be_shared_is_refused_before_any_work(run_flags, train, tmp_path: Path):
    args = train.parse(run_flags(tmp_path / "run", batch=4))
    with pytest.raises(ValueError, match="3 processes cannot share a batch of 4 .* --batch a multiple of 3"):
        train.main(args, Ranks(0, 3), ExitStack())
    assert not (tmp_path / "run").exists()


def test_one_process_joins_no_group(command, run_flags, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: 1 / 0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun --nproc-per-node 1
    assert command("train.py", *run_flags(tmp_path / "run", steps=1)).code == 0


@pytest.mark.parametrize("name, value", [("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")])
def test_half_of_torchruns_variables_is_one_process(name: str, value: str, monkeypatch: pytest.MonkeyPatch):
    """A cluster may set either for a job of its own."""
    for variable in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, value)
    with process_group("cpu") as ranks:
        assert ranks == Ranks()
