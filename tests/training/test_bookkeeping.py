"""training/bookkeeping.py: signals stop a run between updates, and no checkpoint is written of a diverged student."""

import math
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import UPDATES
from torch.optim.optimizer import register_optimizer_step_post_hook

from minidistill.conditioning import Conditioning
from minidistill.distill import ENOUGH_EXAMPLES, Batch
from minidistill.evaluate import run_report
from minidistill.training.bookkeeping import Progress, stop_signals
from minidistill.training.distributed import Ranks


def test_a_loss_that_is_not_finite_stops_the_run(command, flags, tmp_path: Path):
    result = command("train.py", *flags(tmp_path / "run", lr=1e30, save_every=100), "--no-report")
    assert re.search("loss is (nan|inf).*--lr", result.complaint)
    assert not (tmp_path / "run/lora.safetensors").exists() and not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_gradient_that_is_not_finite_is_noticed(tmp_path: Path):
    """Although the loss is finite."""
    progress = new_progress(tmp_path)
    progress.unread = [torch.tensor([0.5, float("inf")])]
    with pytest.raises(ValueError, match="loss is 0.5 and its gradient's norm inf: lower --lr"):
        progress.read_losses()


@pytest.mark.parametrize("lr, save_every, squared", [(0.3, 20, r"0\.\d+"), (10, 1, r"\d.*")], ids=["slowly", "at once"])
def test_a_student_that_diverges_is_not_saved(lr, save_every: int, squared: str, command, flags, tmp_path: Path):
    """Its loss stays finite, and no loss has measured the student after the update, which a checkpoint would hold."""
    result = command("train.py", *flags(tmp_path / "run", lr=lr, steps=50, save_every=save_every), "--no-report")
    message = rf"After update {save_every} the student's squared error is {squared}, .* lower --lr \(it is {lr}\)"
    assert re.search(message, result.complaint)
    assert not (tmp_path / "run/lora.safetensors").exists() and not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_last_update_that_is_not_finite_is_not_saved(command, flags, tmp_path: Path):
    updates = []

    def poison(optimizer: torch.optim.Optimizer, *_) -> None:
        updates.append(1)
        if len(updates) == UPDATES:
            optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))

    handle = register_optimizer_step_post_hook(poison)
    result = command("train.py", *flags(tmp_path / "run"), "--no-report")
    handle.remove()
    assert f"After update {UPDATES} the student's squared error is nan" in result.complaint
    assert not (tmp_path / "run/lora.safetensors").exists()
    assert sorted(file.name for file in (tmp_path / "run/checkpoints").iterdir())[-1] == "step-000004.pt"


def test_signals_are_collected_and_handlers_restored():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_signals() as caught:
        assert not caught
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert caught == [signal.SIGTERM, signal.SIGINT]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_during_the_last_preview_stops_the_run(command, flags, tmp_path: Path, monkeypatch):
    """Before the report; --resume writes what is missing."""
    run = flags(tmp_path / "run", save_every=UPDATES)
    with monkeypatch.context() as patch:
        patch.setattr(run_report, "write_preview", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        result = command("train.py", *run)
    assert result.complaint == "Stopped after the last update. Finish with the same command and --resume."
    assert not (tmp_path / "run/report.md").exists()
    assert command("train.py", *run, "--resume").code == 0
    assert (tmp_path / "run/report.md").exists() and (tmp_path / "run/lora.safetensors").exists()


@pytest.mark.parametrize("done", [0, 1, 25])
def test_a_resumed_run_has_the_learning_rates_of_a_whole_one(done: int, tmp_path: Path):
    """A warm-up over a tenth of all updates, then a cosine over all of them."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    progress = replace(new_progress(tmp_path), losses=[0.5] * done, optimizer=optimizer, total=40)
    rates = [(step, optimizer.param_groups[0]["lr"]) for step in progress.steps()]
    whole = [min((step + 1) / 4, (1 + math.cos(math.pi * step / 40)) / 2) for step in range(40)]
    assert rates == [(step, pytest.approx(whole[step])) for step in range(done, 40)]


def new_progress(out: Path, parts: int = 1) -> Progress:
    return Progress(
        out, [], None, [], None, {}, Ranks(), parts=parts, total=9, peak=1, save_every=9, interval=None,
        preview=None, before_saving=print,
    )  # fmt: skip


def remembered(sizes: list[int], out: Path, parts: int = 1) -> Iterator[list[Batch]]:
    """What is kept after each of some batches of one pixel, whose z_t is the batch's number and t counts from 0."""
    progress = new_progress(out, parts)
    for i, size in enumerate(sizes):
        z_t, weight = torch.full((size, 1), float(i)), torch.ones(size, 1)
        progress.remember(Batch(z_t, torch.arange(size), Conditioning(torch.zeros(size, 1)), weight), z_t + 1)
        yield list(progress.recent)


def test_the_student_is_judged_by_its_last_examples(tmp_path: Path):
    """By as few batches as have ENOUGH_EXAMPLES together, the newest last, each with its target."""
    for i, batches in enumerate(remembered([4, 4, 4, 2, 1, 20, 2], tmp_path)):
        sizes = [len(batch) for batch in batches]
        assert sum(sizes[1:]) < ENOUGH_EXAMPLES and (sum(sizes) >= ENOUGH_EXAMPLES or i < 2)
        assert all(torch.equal(batch.target, batch.z_t + 1) for batch in batches)
        assert batches[-1].z_t[0] == i


def test_the_last_examples_are_judged_in_parts_as_they_were_learned(tmp_path: Path):
    """A card that has room for one example at a time has none for the whole batch."""
    *_, batches = remembered([8, 8, 8], tmp_path, parts=4)
    assert {len(batch) for batch in batches} == {2} and sum(map(len, batches)) >= ENOUGH_EXAMPLES


def test_an_interval_run_is_saved_while_its_last_examples_are_unguided(command, flags, tmp_path: Path):
    run = flags(tmp_path / "run", sample_steps=25, trajectories=12, batch=12, steps=12, save_every=1)
    assert command("train.py", *run, "--interval", 420, 540, "--no-report").code == 0
    assert (tmp_path / "run/lora.safetensors").exists()
