"""train.py as a user runs it: what a run leaves, that it is the same every time, and what it says when it cannot."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import ROOT, TINY_UNET, fill_up, tiny_unet
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from minidistill import inject_lora, load, load_lora, save_lora
from minidistill.data import trajectories as data
from minidistill.formats.lora_files import merge_file
from minidistill.formats.lora_formats import read_lora
from minidistill.formats.tensor_files import read_tensors
from minidistill.lora import lora_parameters
from minidistill.training.run_folder import lock, resume, save_checkpoint

UPDATES = 6
Flags = Callable[..., list[str]]


@pytest.fixture(scope="module")
def flags(tiny_model: Path, prompts_file: Path) -> Flags:
    """``flags(out, rank=4)``: a short run's flags, some of them changed."""

    def flags(out: Path, **changes: object) -> list[str]:
        settings = dict(model=tiny_model, prompts=prompts_file, out=out, steps=UPDATES, sample_steps=3, trajectories=8)
        settings |= dict(batch=4, rank=2, save_every=2, device="cpu") | changes
        return [x for name, value in settings.items() for x in (f"--{name.replace('_', '-')}", str(value))]

    return flags


@pytest.fixture(scope="module")
def full(flags: Flags, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """A whole run with its report, in a process of its own."""
    out = tmp_path_factory.mktemp("runs") / "full"
    command = [sys.executable, str(ROOT / "train.py"), *flags(out)]
    return out, subprocess.run(command, cwd=out.parent, env=environment(), capture_output=True, text=True)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def same_result(one: Path, other: Path) -> bool:
    return all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in ("lora.safetensors", "metrics.jsonl")
    )


# What a run leaves


def test_a_run_succeeds(full):
    _, run = full
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr


def test_a_run_leaves_lora_pictures_and_report(full):
    out, _ = full
    wanted = {"lora.safetensors", "report.md", "teacher_vs_student.png", "loss.png", "metrics.jsonl", "checkpoints"}
    assert wanted <= {path.name for path in out.iterdir()}
    assert not list(out.rglob("*.tmp"))
    assert all(min(Image.open(out / f"{name}.png").size) > 100 for name in ("teacher_vs_student", "loss"))


def test_the_lora_is_of_this_run(full, tiny_model: Path):
    out, _ = full
    file = read_lora(out / "lora.safetensors")
    wanted = dict(base=tiny_model.name, guidance="2.5", rank="2", alpha="2", method="trajectories", negative_prompt="")
    assert file.metadata.items() >= wanted.items()
    unet = load_lora(load(tiny_model).unet, out / "lora.safetensors")
    assert all(p.isfinite().all() for p in lora_parameters(unet))
    assert all(pair.up.abs().max() > 0 for pair in file.layers.values())


def test_metrics_have_a_line_an_update(full):
    out, _ = full
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, UPDATES + 1))
    assert all(0 < line["loss"] < 1e3 for line in lines)


def test_the_table_is_on_the_screen_and_in_the_report(full):
    out, run = full
    report = (out / "report.md").read_text()
    table = [line for line in report.splitlines() if line.startswith("|")]
    assert all(line in run.stdout for line in table)
    rows = {cells[1]: cells for cells in ([cell.strip() for cell in line.split("|")] for line in table)}
    assert rows["teacher"][2] == "6" and rows["student"][2] == "3"  # UNet calls of 3 steps
    assert "teacher_vs_student.png" in report and "loss.png" in report


def test_pictures_as_it_goes(full):
    out, _ = full
    assert len(list(out.glob("pictures/*.png"))) == 3  # every second update


def test_no_report(command, flags: Flags, tmp_path: Path):
    result = command("train.py", *flags(tmp_path / "run"), "--no-report")
    assert result.code == 0
    assert not list((tmp_path / "run").rglob("*.png")) and not list((tmp_path / "run").rglob("*.md"))


def test_plain_distillation_leaves_a_model_of_its_own(command, flags: Flags, tiny_model: Path, tmp_path: Path):
    """Every weight has learned, nothing of the teacher has changed, and one pass of the result is the student."""
    out = tmp_path / "run"
    result = command("train.py", *flags(out, method="full"))
    assert result.code == 0, result.err
    assert not (out / "lora.safetensors").exists() and "student" in (out / "report.md").read_text()
    teacher, student = load(tiny_model), load(out / "student")
    pairs = zip(teacher.unet.parameters(), student.unet.parameters(), strict=True)
    assert all(not torch.equal(before, after) for before, after in pairs)
    assert all(torch.equal(a, b) for a, b in zip(teacher.vae.parameters(), student.vae.parameters(), strict=True))
    header = read_tensors(out / "student/unet/diffusion_pytorch_model.safetensors")[1]
    assert (header["method"], header["guidance"]) == ("full", "2.5")
    again = command("train.py", *flags(out, method="full"))
    assert "holds a run already" in again.complaint
    assert command("train.py", *flags(out, method="full"), "--resume").code == 0  # as after a stop in the report
    for file in (out / "checkpoints").iterdir():
        file.write_bytes(b"")
    before = listing(out)
    with pytest.warns(UserWarning, match="is damaged and passed over"):
        afresh = command("train.py", *flags(out, method="full", guidance=5.0), "--resume")
    assert "holds a result, and no checkpoint" in afresh.complaint
    assert listing(out) == before


def test_learning_lowers_the_loss(command, flags: Flags, tmp_path: Path):
    command("train.py", *flags(tmp_path / "run", steps=60, save_every=60, lr=0.003), "--no-report")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


def test_settings_reach_the_lora(command, flags: Flags, tmp_path: Path):
    changes = dict(rank=3, alpha=1.5, guidance=2.5, negative_prompt="a cat", method="noised")
    command("train.py", *flags(tmp_path / "run", **changes), "--no-report")
    file = read_lora(tmp_path / "run/lora.safetensors")
    assert file.metadata.items() >= {name: str(value) for name, value in changes.items()}.items()
    assert {(pair.rank, pair.alpha) for pair in file.layers.values()} == {(3, 1.5)}


# A styled teacher


@pytest.fixture(scope="module")
def style(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("style") / "style.safetensors"
    save_lora(fill_up(inject_lora(load(tiny_model).unet, rank=1)), file)
    return file


def test_a_styled_teacher_is_what_the_student_learns_from(
    full, command, flags: Flags, style: Path, tiny_model: Path, prompts_file: Path, tmp_path: Path
):
    """It draws with W + BA of the style, which is in the weights of the run and not in the student's file."""
    run = flags(tmp_path / "run", teacher_lora=f"{style}:0.5")
    assert command("train.py", *run, "--no-report").code == 0
    assert read_lora(tmp_path / "run/lora.safetensors").metadata["teacher_lora"] == "style.safetensors:0.5"
    assert "teacher_lora" not in read_lora(full[0] / "lora.safetensors").metadata
    sd = load(tiny_model)
    merge_file(sd.unet, read_lora(style, 0.5))
    captions, _ = data.prompt_split(tiny_model, prompts_file)
    data.generate(sd, captions, tmp_path / "expected", count=8, steps=3, guidance=2.5, batch=4, stride=3)
    expected = {file.name: load_file(file) for file in (tmp_path / "expected").iterdir()}
    for name, tensors in expected.items():
        found = load_file(tmp_path / "run/states" / name)
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)
        assert not torch.equal(found["z_0"], load_file(full[0] / "states" / name)["z_0"])


def test_what_another_teacher_drew_is_not_used(full, command, flags: Flags, style: Path, tmp_path: Path):
    command("train.py", *flags(tmp_path / "run", teacher_lora=style), "--no-report")
    (tmp_path / "run/lora.safetensors").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints")
    for changes in [{}, dict(teacher_lora=f"{style}:0.5")]:
        assert "other settings" in command("train.py", *flags(tmp_path / "run", **changes), "--no-report").complaint
    other = fill_up(inject_lora(tiny_unet(), rank=1), seed=70)
    save_lora(other, tmp_path / "style.safetensors")  # a style of the same name
    changed = flags(tmp_path / "run", teacher_lora=tmp_path / "style.safetensors")
    assert "other settings" in command("train.py", *changed, "--no-report").complaint


def test_resuming_with_another_teacher_is_refused(command, flags: Flags, style: Path, tmp_path: Path):
    command("train.py", *flags(tmp_path / "run", teacher_lora=style), "--no-report")
    shutil.rmtree(tmp_path / "run/states")
    other = flags(tmp_path / "run", teacher_lora=f"{style}:0.5")
    assert f"--teacher-lora {style}:1" in command("train.py", *other, "--no-report", "--resume").complaint


def test_a_student_is_no_style(full, command, flags: Flags, tmp_path: Path):
    result = command("train.py", *flags(tmp_path / "run", teacher_lora=full[0] / "lora.safetensors"))
    assert "has learned guidance" in result.complaint and not (tmp_path / "run").exists()


def test_a_style_for_another_model(command, flags: Flags, tmp_path: Path):
    save_lora(inject_lora(tiny_unet(config=replace(TINY_UNET, context_width=48)), rank=1), tmp_path / "style")
    result = command("train.py", *flags(tmp_path / "run", teacher_lora=tmp_path / "style"))
    assert result.code != 0 and "another model" in result.err and not (tmp_path / "run").exists()


# The same every time


def test_equal_runs_give_equal_bytes(full, command, flags: Flags, tmp_path: Path):
    """One with a report, in its own process; one without, here, somewhere else."""
    command("train.py", *flags(tmp_path / "other name"), "--no-report")
    assert same_result(tmp_path / "other name", full[0])


def test_a_kernel_that_cannot_be_had_changes_nothing(full, command, flags: Flags, tmp_path: Path):
    result = command("train.py", *flags(tmp_path / "run", kernel="fused"), "--no-report")
    assert result.code == 0 and sum(line.startswith("LoRA layers run in plain PyTorch: ") for line in result.lines) == 1
    assert same_result(tmp_path / "run", full[0])


def test_low_memory_changes_nothing(full, command, flags: Flags, tmp_path: Path):
    result = command("train.py", *flags(tmp_path / "run", memory="low"), "--no-report")
    assert "Memory low: " in result.out and same_result(tmp_path / "run", full[0])


@pytest.mark.parametrize("method", ["trajectories", "noised"])
def test_accumulated_gradients_are_those_of_the_batch(
    method: str, command, flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In parts of 2 and 1, of which the last counts half. The weights are float64, the loss float32."""
    monkeypatch.setattr("minidistill.load", lambda path, **how: load(path, **how | dict(dtype=torch.float64)))
    found: dict[int, list[torch.Tensor]] = {1: [], 2: []}
    for parts, gradients in found.items():
        run = flags(tmp_path / str(parts), method=method, accumulate=parts, batch=3, steps=1)

        def note(optimizer: torch.optim.Optimizer, *_, gradients: list[torch.Tensor] = gradients) -> None:
            gradients += [p.grad.clone() for p in optimizer.param_groups[0]["params"]]

        handle = register_optimizer_step_pre_hook(note)
        assert command("train.py", *run, "--no-report").code == 0
        handle.remove()
    assert found[1] and sum(g.abs().sum() for g in found[1]) > 0
    largest = max(g.abs().max() for g in found[1])
    assert max((a - b).abs().max() for a, b in zip(found[1], found[2], strict=True)) < 1e-6 * largest


def test_the_loss_is_weighted_over_t(command, flags: Flags, tiny_model: Path, prompts_file: Path, tmp_path: Path):
    """The first loss, of the LoRA that does nothing yet, on all states at once: worked out again from the files."""
    every = dict(trajectories=8, stride=1, batch=24, accumulate=2, steps=1)
    command("train.py", *flags(tmp_path / "run", **every, weighting="min-snr"), "--no-report")
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    sd, captions = load(tiny_model), data.prompt_split(tiny_model, prompts_file)[0]
    counted = []
    for shard in (tmp_path / "run/states").glob("*.safetensors"):
        states = load_file(shard)
        for prompt, z_t, target in zip(states["prompt"], states["z_t"], states["target"], strict=True):
            cond = sd.encode_prompt([captions[prompt]]).expand(len(z_t), -1, -1)
            missed = (sd.unet(z_t.float(), states["t"], cond) - target.float()).square().mean(dim=(1, 2, 3))
            alpha_bar = sd.schedule.alphas_cumprod[states["t"]]
            counted.append((missed * (5 * (1 - alpha_bar) / alpha_bar).clamp(max=1)).detach())
    assert len(torch.cat(counted)) == 24
    assert json.loads(line)["loss"] == pytest.approx(torch.cat(counted).mean().item(), rel=1e-4)


def test_another_seed_gives_another_student(full, command, flags: Flags, tmp_path: Path):
    command("train.py", *flags(tmp_path / "run", seed=1), "--no-report")
    assert not same_result(tmp_path / "run", full[0])


@contextmanager
def ctrl_c(when: str, update: int) -> Iterator[None]:
    """A real SIGINT right before or after the optimizer's given update."""
    updates = []

    def interrupt(*_):
        updates.append(1)
        if len(updates) == update:
            os.kill(os.getpid(), signal.SIGINT)

    register = dict(before=register_optimizer_step_pre_hook, after=register_optimizer_step_post_hook)[when]
    handle = register(interrupt)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("when, update", [("before", 1), ("before", 4), ("after", 3)])
def test_interrupted_and_resumed_is_uninterrupted(when: str, update: int, full, command, flags: Flags, tmp_path: Path):
    run = [*flags(tmp_path / "run"), "--no-report"]
    with ctrl_c(when, update):
        stopped = command("train.py", *run)
    assert "--resume" in stopped.complaint and not (tmp_path / "run/lora.safetensors").exists()
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == update
    assert command("train.py", *run, "--resume").code == 0
    assert same_result(tmp_path / "run", full[0])


def test_interrupted_and_resumed_with_the_teacher_in_the_loop(command, flags: Flags, tmp_path: Path):
    one, other = ([*flags(tmp_path / name, method="noised"), "--no-report"] for name in ("one", "other"))
    command("train.py", *one)
    with ctrl_c("before", 3):
        assert command("train.py", *other).code != 0
    command("train.py", *other, "--resume")
    assert same_result(tmp_path / "one", tmp_path / "other")


def test_killed_and_resumed_is_uninterrupted(full, command, flags: Flags, tmp_path: Path):
    """As after a power cut: only an older checkpoint is there, and half of what was being written."""
    run = [*flags(tmp_path / "run"), "--no-report"]
    command("train.py", *run)
    checkpoints = sorted((tmp_path / "run/checkpoints").iterdir())
    assert len(checkpoints) == 2
    (tmp_path / "run/lora.safetensors").unlink()
    checkpoints[-1].rename(checkpoints[-1].with_name(checkpoints[-1].name + ".tmp"))
    command("train.py", *run, "--resume")
    assert same_result(tmp_path / "run", full[0])


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_the_teacher_draws(asked: int, full, command, flags: Flags, tmp_path: Path, monkeypatch):
    run, save = [*flags(tmp_path / "run"), "--no-report"], data.save

    def save_and_interrupt(*args):
        os.kill(os.getpid(), asked)
        return save(*args)

    with monkeypatch.context() as patched:
        patched.setattr(data, "save", save_and_interrupt)
        assert "--resume" in command("train.py", *run).complaint
    assert command("train.py", *run, "--resume").code == 0
    assert same_result(tmp_path / "run", full[0])


def test_nothing_in_the_loop_is_drawn_from_the_global_generator(full, command, flags: Flags, tmp_path: Path):
    """Which is why no checkpoint holds its state."""
    handle = register_optimizer_step_post_hook(lambda *_: torch.seed())
    command("train.py", *flags(tmp_path / "run"), "--no-report")
    handle.remove()
    assert same_result(tmp_path / "run", full[0])


def test_ctrl_c_from_outside(flags: Flags, tmp_path: Path):
    """A process of its own, a signal from another: it saves, says how to go on, and ends soon."""
    command = [sys.executable, str(ROOT / "train.py"), *flags(tmp_path / "run", steps=100_000, save_every=100_000)]
    process = subprocess.Popen([*command, "--no-report"], env=environment(), stderr=subprocess.PIPE)
    seen = b""
    while not re.search(rb"distilling.* [1-9]\d*/100000", seen):
        seen += (byte := process.stderr.read(1))
        assert byte, seen.decode()
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=300)[1].decode()
    assert process.returncode != 0 and "Traceback" not in rest
    done = re.search(r"after (\d+) of 100000.*--resume", rest.splitlines()[-1])[1]
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == int(done) > 0


def test_resume_with_nothing_saved_starts_afresh(full, command, flags: Flags, tmp_path: Path):
    assert command("train.py", *flags(tmp_path / "run"), "--no-report", "--resume").code == 0
    assert same_result(tmp_path / "run", full[0])


def test_resume_of_a_finished_run_changes_nothing(full, command, flags: Flags, tmp_path: Path):
    run = [*flags(tmp_path / "run"), "--no-report"]
    command("train.py", *run)
    assert command("train.py", *run, "--resume").code == 0
    assert same_result(tmp_path / "run", full[0])


# What it says when it cannot


def listing(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_second_run_in_the_same_folder_is_refused(full, command, flags: Flags):
    before = listing(full[0])
    complaint = command("train.py", *flags(full[0])).complaint
    assert str(full[0]) in complaint and "--resume" in complaint and "--out" in complaint
    assert listing(full[0]) == before


@pytest.mark.parametrize(
    "changes", [dict(rank=3), dict(guidance=2), dict(seed=1), dict(batch=2), dict(method="noised")]
)
def test_resume_with_other_settings_is_refused(changes: dict, full, command, flags: Flags):
    before = listing(full[0])
    result = command("train.py", *flags(full[0], **changes), "--resume")
    assert "settings" in result.complaint or f"--{next(iter(changes))}" in result.complaint
    assert listing(full[0]) == before


def test_resume_with_other_prompts_in_the_file_is_refused(command, flags: Flags, prompts_file: Path, tmp_path: Path):
    own = tmp_path / "prompts.txt"
    own.write_text(prompts_file.read_text())
    command("train.py", *flags(tmp_path / "run", prompts=own), "--no-report")
    shutil.rmtree(tmp_path / "run/states")
    own.write_text(prompts_file.read_text() + "\na blue boat\na red boat\n")
    result = command("train.py", *flags(tmp_path / "run", prompts=own), "--no-report", "--resume")
    assert f"--prompts {own}" in result.complaint


def truncated(contents: bytes) -> bytes:
    return contents[:1000]


def empty(contents: bytes) -> bytes:
    return b""


def flipped(contents: bytes) -> bytes:
    """One bit in the middle of a weight: torch.load alone would not notice."""
    middle = len(contents) // 2
    return contents[:middle] + bytes([contents[middle] ^ 4]) + contents[middle + 1 :]


@pytest.mark.parametrize("damage", [truncated, empty, flipped])
def test_a_damaged_checkpoint_is_named_and_passed_over(damage, full, command, flags: Flags, tmp_path: Path):
    run = [*flags(tmp_path / "run"), "--no-report"]
    command("train.py", *run)
    newest = sorted((tmp_path / "run/checkpoints").iterdir())[-1]
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(UserWarning, match=f"{newest} is damaged and passed over"):
        result = command("train.py", *run, "--resume")
    assert f"{UPDATES - 2}/{UPDATES}" in result.err  # where the checkpoint before was made
    assert same_result(tmp_path / "run", full[0])


@pytest.mark.filterwarnings("ignore:.*damaged")
def test_checkpoints_made_after_damaged_ones_are_kept(full, command, flags: Flags, tmp_path: Path):
    """Both are damaged, so the run begins again; stopped early, it goes on from what it has saved since."""
    run = [*flags(tmp_path / "run"), "--no-report"]
    command("train.py", *run)
    for file in (tmp_path / "run/checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    with ctrl_c("after", 3):
        assert "Saved after 3 of 6" in command("train.py", *run, "--resume").complaint
    assert {file.name for file in (tmp_path / "run/checkpoints").iterdir()} == {"step-000002.pt", "step-000003.pt"}
    result = command("train.py", *run, "--resume")
    assert f"3/{UPDATES}" in result.err and same_result(tmp_path / "run", full[0])


def test_a_second_run_beside_the_first_is_refused(full, command, flags: Flags, tmp_path: Path):
    run = [*flags(tmp_path / "run"), "--no-report", "--resume"]
    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run"):
        assert f"Another run is at work in {tmp_path}/run" in command("train.py", *run).complaint
        assert [file.name for file in (tmp_path / "run").iterdir()] == ["lock"]
    assert command("train.py", *run).code == 0
    assert same_result(tmp_path / "run", full[0])


def test_runs_that_share_states_take_turns(full, command, flags: Flags, tmp_path: Path, monkeypatch):
    """One draws, the other waits; neither keeps the other from learning."""
    fcntl = pytest.importorskip("fcntl")
    states, flock = tmp_path / "states", fcntl.flock
    other = lock(states, wait=True)

    def let_the_other_end(file: IO[str], how: int) -> None:
        if not how & fcntl.LOCK_NB:
            other.close()
        flock(file, how)

    def have_it(*_) -> None:
        with (states / "filling").open("a") as file:
            flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which raises if it is not let go of

    monkeypatch.setattr(fcntl, "flock", let_the_other_end)
    handle = register_optimizer_step_pre_hook(have_it)
    result = command("train.py", *flags(tmp_path / "run", states=states), "--no-report")
    handle.remove()
    assert result.out.count(f"Another run is at work in {states}: waiting") == 1
    assert same_result(tmp_path / "run", full[0])


def test_a_checkpoint_is_in_memory_once(tmp_path: Path):
    """That of a full copy is several times W. Beside its tensors, which are not counted here."""
    weight = torch.nn.Parameter(torch.zeros(10**6))
    optimizer = torch.optim.AdamW([weight])
    save_checkpoint(tmp_path, [weight], optimizer, [0.5], {})
    tracemalloc.start()
    assert resume(tmp_path, [weight], optimizer, {}) == [0.5]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 4e6 < most < 6e6


BAD = {
    "unknown flag": (dict(rnak=4), "--rnak"),
    "flag without a number": (dict(rank="many"), "many"),
    "unknown method": (dict(method="magic"), "magic"),
    "unknown dtype": (dict(dtype="int8"), "int8"),
    "no such device": (dict(device="abacus"), "abacus"),
    "no such model": (dict(model="nowhere/model"), "nowhere/model"),
    "no such prompts": (dict(prompts="nowhere/prompts.txt"), "nowhere/prompts.txt"),
    "rank": (dict(rank=0), "rank"),
    "no trajectories": (dict(trajectories=0), "trajectories"),
    "no batch": (dict(batch=0), "batch"),
    "no sample steps": (dict(sample_steps=0), "steps"),
    "too many sample steps": (dict(sample_steps=1001), "steps"),
    "never saved": (dict(save_every=0), "save-every"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_leaves_nothing(case: str, command, flags: Flags, tmp_path: Path):
    changes, named = BAD[case]
    result = command("train.py", *flags(tmp_path / "run", **changes))
    assert named in result.complaint
    assert len(result.lines) == 1 or "usage: " in result.err
    assert not list(tmp_path.iterdir())


def test_resume_takes_no_value(command, flags: Flags, tmp_path: Path):
    assert "some-folder" in command("train.py", *flags(tmp_path / "run"), "--resume", "some-folder").complaint


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_model_without_a_part_leaves_nothing(part: str, tiny_model: Path, command, flags: Flags, tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_model.iterdir():
        if path.name != part:
            (model / path.name).symlink_to(path)
    assert part in command("train.py", *flags(tmp_path / "run", model=model)).complaint
    assert not (tmp_path / "run").exists()


def test_an_empty_prompts_file(command, flags: Flags, tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n\n")
    result = command("train.py", *flags(tmp_path / "run", prompts=tmp_path / "empty.txt"))
    assert "empty.txt holds no prompt" in result.complaint


def test_out_below_a_file(command, flags: Flags, tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in command("train.py", *flags(tmp_path / "file/run")).complaint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_out(command, flags: Flags, tmp_path: Path):
    tmp_path.chmod(0o500)
    assert str(tmp_path) in command("train.py", *flags(tmp_path / "run")).complaint
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("room", [4_000, 100_000], ids=["for trajectories", "for a checkpoint"])
def test_a_full_disk(room: int, full, command, flags: Flags, tmp_path: Path):
    """No file may grow beyond ``room`` bytes: one line, no half-written file; and with room again the run goes on."""
    run = [*flags(tmp_path / "run"), "--no-report"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        result = command("train.py", *run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.complaint.startswith("train.py: ") and str(tmp_path / "run") in result.complaint
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert command("train.py", *run, "--resume").code == 0
    assert same_result(tmp_path / "run", full[0])


def test_a_loss_that_is_no_number(command, flags: Flags, tmp_path: Path):
    result = command("train.py", *flags(tmp_path / "run", lr=1e30, save_every=100), "--no-report")
    assert re.search("loss is (nan|inf).*--lr", result.complaint)
    assert not (tmp_path / "run/lora.safetensors").exists() and not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_loss_that_runs_away(command, flags: Flags, tmp_path: Path):
    """It stays a number: stopped before a checkpoint is made of it."""
    run = flags(tmp_path / "run", lr=0.3, steps=50, save_every=20)
    result = command("train.py", *run, "--no-report")
    assert re.search(
        r"After update 20 the student's squared error is 0\.\d+, .* lower --lr \(it is 0\.3\)", result.complaint
    )
    assert not (tmp_path / "run/lora.safetensors").exists() and not list((tmp_path / "run").glob("checkpoints/*"))


def test_what_runs_away_at_once_is_not_saved_either(command, flags: Flags, tmp_path: Path):
    """A checkpoint is of the student as it is after the update, which no loss has seen yet."""
    result = command("train.py", *flags(tmp_path / "run", lr=10, save_every=1), "--no-report")
    assert re.search(
        r"After update 1 the student's squared error is \d.*, .* lower --lr \(it is 10\)", result.complaint
    )
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_last_update_that_is_no_number(command, flags: Flags, tmp_path: Path):
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


def test_help_shows_every_setting(command):
    text = command("train.py", "--help").out
    wanted = "model prompts rank guidance negative-prompt steps sample-steps batch trajectories seed device dtype out"
    assert all(f"--{name} " in text for name in [*wanted.split(), "resume", "no-report"])
    assert "default: 2.5" in text


def test_global_defaults_are_untouched(command, flags: Flags, tmp_path: Path):
    command("train.py", *flags(tmp_path / "run"), "--no-report")
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
