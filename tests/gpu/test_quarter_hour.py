"""quarter_hour.py on a CPU: every stage runs, and one that fails in whatever way costs its own results only."""

import json
import os
import subprocess
import sys
import tarfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import quarter_hour
from quarter_hour import ROOT, STAGES, Task, failed, run_stages, serve


def names_in(archive: Path) -> list[str]:
    with tarfile.open(archive) as file:
        return file.getnames()


def test_every_stage_runs_dry(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/gpu/quarter_hour.py"), "--out", str(tmp_path), "--dry"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert list(stages) == list(STAGES)
    for name, figures in stages.items():
        assert len(figures) > 1 and not failed(figures) and "skipped" not in figures, name
    assert stages["table"]["64 x 24 -> 16"][0]["errors"]["fused"] < 1e-5
    assert stages["forward"]["ours, batch 1, graph"] > 0 and "| rendered | two |" in stages["distil"]["judge"]

    files = list(tmp_path.iterdir())
    assert len(files) <= 8 and all(file.stat().st_size < 2**24 for file in files)
    contents = {file.name: names_in(file) for file in files if file.suffix == ".gz"}
    for part in ("unet", "vae"):
        files = [f"{part}/config.json", f"{part}/diffusion_pytorch_model.safetensors"]
        assert contents[f"model-{part}.tar.gz"] == files
    assert {"clip/model.safetensors", "text_encoder/model.safetensors"} <= set(contents["model-clip.tar.gz"])
    assert list(stages["from_nothing"]["seconds until"]) == ["clip", "vae", "unet"]
    assert {"lora.safetensors", "teacher_vs_student.png", "judge.json"} <= set(contents["student.tar.gz"])
    assert {"logs/stages.txt", "logs/profile.txt", "logs/kernel-table.md"} <= set(contents["logs.tar.gz"])


def test_the_model_comes_home() -> None:
    """Its UNet in half precision, the largest file, fits into 16 MiB."""
    import torch  # not above, because each process of stages_that_fail imports this file

    from minidistill.config import POCKET_UNET
    from minidistill.unet import UNet

    with torch.device("meta"):
        assert sum(2 * p.numel() for p in UNet(POCKET_UNET).parameters()) < 2**24


def test_only_and_budget(tmp_path: Path) -> None:
    assert quarter_hour.main(["--out", str(tmp_path), "--only", "memory", "facts", "--dry", "--budget", "0"]) == 0
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert list(stages) == ["facts", "memory"] and all("skipped" in figures for figures in stages.values())


def test_the_first_command_measures_and_trains_no_model() -> None:
    """Of docs/on-a-gpu.md, as fast as the stages before were on an H200."""
    done = json.loads((ROOT / "results/gpu/h200.json").read_text())["stages"]
    left = quarter_hour.parse(["--out", "new"]).budget - done["facts"]["seconds"] - done["forward"]["seconds"]
    assert left < min(STAGES["retrain"], STAGES["from_nothing"])


def stages_that_fail(pipe: Connection, task: Task) -> None:
    def raises(task: Task):
        yield "first", 1
        raise ValueError("broken")

    def hangs(task: Task):
        yield "first", 2
        time.sleep(600)

    def dies(task: Task):
        yield "first", 3
        os._exit(4)

    def works(task: Task):
        yield "process", os.getpid()

    serve(pipe, task, dict(raises=raises, hangs=hangs, dies=dies, works=works, again=works))


def test_a_failing_stage_costs_its_own_results_only(tmp_path: Path) -> None:
    task = Task(tmp_path, tmp_path / "logs", tmp_path, dry=True)
    task.logs.mkdir()
    names = ["raises", "hangs", "dies", "works", "again"]
    seconds = dict.fromkeys(names, 30) | {"hangs": 2}
    stages = run_stages(names, seconds, task, time.monotonic() + 300, stages_that_fail)
    assert [stages[name].get("first") for name in names] == [1, 2, 3, None, None]
    assert [stages[name].get("failed") for name in names] == [
        "ValueError('broken')",
        "out of time",
        "its process ended with exit code 4",
        None,
        None,
    ]
    assert stages["works"]["process"] == stages["again"]["process"] != os.getpid()
    assert json.loads((tmp_path / "gpu.json").read_text())["stages"] == stages


def test_a_model_that_was_not_completed_is_not_distilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_training

    (tmp_path / "from-nothing/tokenizer").mkdir(parents=True)
    monkeypatch.setattr(gpu_training, "run", lambda main, *flags: flags)
    _, flags = next(gpu_training.distil(Task(tmp_path, tmp_path, tmp_path, dry=True)))
    assert flags[:2] == ("--model", ROOT / "weights/pocket-emoji")


def test_a_part_that_failed_counts() -> None:
    assert failed({"batch 1": 3.0, "batch 2": "failed: RuntimeError()"}) and not failed({"note": "not failed"})
