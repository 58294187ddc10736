"""training/bookkeeping.py: a student that diverges is stopped before a checkpoint of it is written."""

import re
from pathlib import Path

import torch
from tiny import UPDATES
from torch.optim.optimizer import register_optimizer_step_post_hook


def test_a_loss_that_is_not_finite_stops_the_run(command, flags, tmp_path: Path):
    result = command("train.py", *flags(tmp_path / "run", lr=1e30, save_every=100), "--no-report")
    assert re.search("loss is (nan|inf).*--lr", result.complaint)
    assert not (tmp_path / "run/lora.safetensors").exists() and not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_student_that_diverges_slowly_is_not_saved(command, flags, tmp_path: Path):
    """Its loss stays finite; the run stops before a checkpoint is written."""
    run = flags(tmp_path / "run", lr=0.3, steps=50, save_every=20)
    result = command("train.py", *run, "--no-report")
    assert re.search(
        r"After update 20 the student's squared error is 0\.\d+, .* lower --lr \(it is 0\.3\)", result.complaint
    )
    assert not (tmp_path / "run/lora.safetensors").exists() and not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_student_that_diverges_at_once_is_not_saved(command, flags, tmp_path: Path):
    """A checkpoint holds the student after the update, which no loss has measured yet."""
    result = command("train.py", *flags(tmp_path / "run", lr=10, save_every=1), "--no-report")
    assert re.search(
        r"After update 1 the student's squared error is \d.*, .* lower --lr \(it is 10\)", result.complaint
    )
    assert not list((tmp_path / "run").glob("checkpoints/*"))


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
