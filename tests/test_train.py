"""train.py as a user runs it: what a run leaves, that it is the same every time, and how it refuses bad input."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import UPDATES, losses, same_result
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from minidistill import load, load_lora
from minidistill.data.prompts import prompt_split
from minidistill.formats.lora_formats import read_lora
from minidistill.lora import lora_parameters
from minidistill.training import students
from minidistill.training.recompute import LOW_MEMORY, recompute

# What a run leaves


def test_a_run_succeeds(whole_run):
    _, run = whole_run
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr


def test_a_run_leaves_lora_images_and_report(whole_run):
    out, _ = whole_run
    wanted = {"lora.safetensors", "report.md", "teacher_vs_student.png", "loss.png", "metrics.jsonl", "checkpoints"}
    assert wanted <= {path.name for path in out.iterdir()}
    assert not list(out.rglob("*.tmp"))
    assert all(min(Image.open(out / f"{name}.png").size) > 100 for name in ("teacher_vs_student", "loss"))


def test_the_lora_is_that_of_this_run(whole_run, tiny_model: Path):
    out, _ = whole_run
    file = read_lora(out / "lora.safetensors")
    wanted = dict(base=tiny_model.name, guidance="4", rank="2", alpha="2", method="trajectories", negative_prompt="")
    assert file.metadata.items() >= wanted.items()
    unet = load_lora(load(tiny_model).unet, out / "lora.safetensors")
    assert all(p.isfinite().all() for p in lora_parameters(unet))
    assert all(pair.up.abs().max() > 0 for pair in file.layers.values())


def test_metrics_have_a_line_per_update(whole_run):
    out, _ = whole_run
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, UPDATES + 1))
    assert all(0 < line["loss"] < 1e3 for line in lines)


def test_the_table_is_on_the_screen_and_in_the_report(whole_run):
    out, run = whole_run
    report = (out / "report.md").read_text()
    table = [line for line in report.splitlines() if line.startswith("|")]
    assert all(line in run.stdout for line in table)
    rows = {cells[1]: cells for cells in ([cell.strip() for cell in line.split("|")] for line in table)}
    assert rows["teacher"][2] == "6" and rows["student"][2] == "3"  # UNet calls of 3 steps
    assert "teacher_vs_student.png" in report and "loss.png" in report


def test_preview_images_are_saved_with_each_checkpoint(whole_run):
    out, _ = whole_run
    assert len(list(out.glob("pictures/*.png"))) == 3  # every second update


def test_learning_lowers_the_loss(command, flags, tmp_path: Path):
    command("train.py", *flags(tmp_path / "run", steps=60, save_every=60, lr=0.003), "--no-report")
    found = losses(tmp_path / "run")
    assert sum(found[-6:]) < 0.8 * sum(found[:6])


def test_settings_reach_the_lora(command, flags, tmp_path: Path):
    changes = dict(rank=3, alpha=1.5, guidance=2.5, negative_prompt="a cat", method="noised")
    command("train.py", *flags(tmp_path / "run", **changes), "--no-report")
    file = read_lora(tmp_path / "run/lora.safetensors")
    assert file.metadata.items() >= {name: str(value) for name, value in changes.items()}.items()
    assert {(pair.rank, pair.alpha) for pair in file.layers.values()} == {(3, 1.5)}


# The same every time


def test_equal_runs_give_equal_bytes(whole_run, command, flags, tmp_path: Path):
    """One run with a report, in a fork; the other without, in this process and another folder."""
    assert command("train.py", *flags(tmp_path / "other name"), "--no-report").code == 0
    assert same_result(tmp_path / "other name", whole_run[0])
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".png", ".md")]


def test_an_unavailable_kernel_changes_nothing(whole_run, command, flags, tmp_path: Path):
    result = command("train.py", *flags(tmp_path / "run", kernel="fused"), "--no-report")
    assert result.code == 0 and sum(line.startswith("LoRA layers run in plain PyTorch: ") for line in result.lines) == 1
    assert same_result(tmp_path / "run", whole_run[0])


def test_low_memory_changes_nothing(whole_run, command, flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """But what is kept for the backward pass."""
    thresholds = []
    monkeypatch.setattr(students, "recompute", lambda *how: thresholds.append(how[1]) or recompute(*how))
    result = command("train.py", *flags(tmp_path / "run", memory="low"), "--no-report")
    assert "Memory low: " in result.out and same_result(tmp_path / "run", whole_run[0])
    assert thresholds == [LOW_MEMORY]


@pytest.mark.parametrize("method", ["trajectories", "noised"])
def test_accumulated_gradients_are_those_of_the_batch(
    method: str, command, flags, unet_calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Parts of 2 and 1 examples; the second counts half. The weights are float64, the loss float32."""
    monkeypatch.setattr("minidistill.load", lambda path, **how: load(path, **how | dict(dtype=torch.float64)))
    by_parts: dict[int, list[torch.Tensor]] = {1: [], 2: []}
    each = 3 if method == "noised" else 1  # calls of the UNet for a part: the teacher's two, and the student's
    for parts in by_parts:
        run = flags(tmp_path / str(parts), method=method, accumulate=parts, batch=3, steps=1)

        def note(optimizer: torch.optim.Optimizer, *_, parts: int = parts) -> None:
            assert unet_calls[-each * parts :] == [
                size for size in ([2, 1] if parts == 2 else [3]) for _ in range(each)
            ]
            by_parts[parts] += [p.grad.clone() for p in optimizer.param_groups[0]["params"]]

        handle = register_optimizer_step_pre_hook(note)
        assert command("train.py", *run, "--no-report").code == 0
        handle.remove()
    assert by_parts[1] and sum(g.abs().sum() for g in by_parts[1]) > 0
    largest = max(g.abs().max() for g in by_parts[1])
    assert max((a - b).abs().max() for a, b in zip(*by_parts.values(), strict=True)) < 1e-6 * largest


@pytest.mark.parametrize("student, rate", [("lora", 0.128 / 32), ("full", 0.0064 / 32)])
def test_the_optimizer(student: str, rate: float, command, flags, tmp_path: Path):
    """The peak learning rate for the first width, 32; AdamW's constants; the norm to which gradients are cut."""
    seen = []

    def note(optimizer: torch.optim.Optimizer, *_) -> None:
        (group,) = optimizer.param_groups
        norm = torch.stack([p.grad.norm() for p in group["params"]]).norm().item()
        seen.append((group["lr"], group["betas"], group["weight_decay"], norm))

    handle = register_optimizer_step_pre_hook(note)
    command(
        "train.py", *flags(tmp_path / "run", student=student, guidance=1000, steps=20, save_every=50), "--no-report"
    )
    handle.remove()
    assert [rate for rate, *_ in seen][:3] == pytest.approx([rate / 2, rate * 0.99384417, rate * 0.97552826])
    assert all(how[1:3] == ((0.9, 0.99), 0) and how[3] < 1 + 1e-5 for how in seen)
    assert max(norm for *_, norm in seen) > 1 - 1e-3


def test_images_sampled_at_once(command, flags, tmp_path: Path):
    """--sample-batch decides how many trajectories a shard has."""
    run = flags(tmp_path / "run", trajectories=6, batch=2, sample_batch=4, steps=1)
    assert command("train.py", *run, "--no-report").code == 0
    files = sorted((tmp_path / "run/states").glob("*.safetensors"))
    assert [len(load_file(file)["prompt"]) for file in files] == [4, 2]


def test_the_loss_is_weighted_over_t(command, flags, tiny_model: Path, prompts_file: Path, tmp_path: Path):
    """The first loss, of a LoRA that does nothing yet, on all states at once: computed again from the shards."""
    every = dict(trajectories=8, stride=1, batch=24, accumulate=2, steps=1)
    command("train.py", *flags(tmp_path / "run", **every, weighting="min-snr"), "--no-report")
    sd, captions = load(tiny_model), prompt_split(tiny_model, prompts_file)[0]
    errors = []
    for shard in (tmp_path / "run/states").glob("*.safetensors"):
        states = load_file(shard)
        for prompt, z_t, target in zip(states["prompt"], states["z_t"], states["target"], strict=True):
            cond = sd.encode_prompt([captions[prompt]]).expand(len(z_t))
            squared = (sd.unet(z_t.float(), states["t"], cond) - target.float()).square().mean(dim=(1, 2, 3))
            alpha_bar = sd.schedule.alphas_cumprod[states["t"]]
            errors.append((squared * (5 * (1 - alpha_bar) / alpha_bar).clamp(max=1)).detach())
    assert len(torch.cat(errors)) == 24
    assert losses(tmp_path / "run") == pytest.approx([torch.cat(errors).mean().item()], rel=1e-4)


def test_another_seed_gives_another_student(whole_run, command, flags, tmp_path: Path):
    command("train.py", *flags(tmp_path / "run", seed=1), "--no-report")
    assert not same_result(tmp_path / "run", whole_run[0])


def test_the_loop_uses_no_global_random_numbers(whole_run, command, flags, tmp_path: Path):
    """So checkpoints need not hold the state of the global generator."""
    handle = register_optimizer_step_post_hook(lambda *_: torch.seed())
    command("train.py", *flags(tmp_path / "run"), "--no-report")
    handle.remove()
    assert same_result(tmp_path / "run", whole_run[0])


# Bad input


BAD = {
    "unknown flag": (dict(rnak=4), "--rnak"),
    "flag without a number": (dict(rank="many"), "many"),
    "unknown method": (dict(method="magic"), "magic"),
    "unknown student": (dict(student="magic"), "magic"),
    "unknown source": (dict(source="magic"), "magic"),
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
def test_bad_input_gets_one_line_and_leaves_nothing(case: str, command, flags, tmp_path: Path):
    changes, named = BAD[case]
    result = command("train.py", *flags(tmp_path / "run", **changes))
    assert named in result.complaint
    assert len(result.lines) == 1 or "usage: " in result.err
    assert not list(tmp_path.iterdir())


def test_resume_takes_no_value(command, flags, tmp_path: Path):
    assert "some-folder" in command("train.py", *flags(tmp_path / "run"), "--resume", "some-folder").complaint


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_model_without_a_part_leaves_nothing(part: str, tiny_model: Path, command, flags, tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_model.iterdir():
        if path.name != part:
            (model / path.name).symlink_to(path)
    assert part in command("train.py", *flags(tmp_path / "run", model=model)).complaint
    assert not (tmp_path / "run").exists()


def test_an_empty_prompts_file(command, flags, tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n\n")
    result = command("train.py", *flags(tmp_path / "run", prompts=tmp_path / "empty.txt"))
    assert "empty.txt has no prompts" in result.complaint


@pytest.mark.parametrize("flag", ["--out", "--states"])
def test_a_folder_below_a_file(flag: str, command, flags, tmp_path: Path):
    (tmp_path / "file").write_text("")
    complaint = command("train.py", *flags(tmp_path / "run"), flag, tmp_path / "file/run").complaint
    assert f"argument {flag}: {tmp_path / 'file'} is not a folder that can be written into" in complaint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_out(command, flags, tmp_path: Path):
    tmp_path.chmod(0o500)
    assert str(tmp_path) in command("train.py", *flags(tmp_path / "run")).complaint
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("room", [4_000, 100_000], ids=["for trajectories", "for a checkpoint"])
def test_a_full_disk(room: int, whole_run, command, flags, tmp_path: Path):
    """No file may exceed ``room`` bytes: one line, no half-written file; with more room the run continues."""
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
    assert same_result(tmp_path / "run", whole_run[0])


def test_help_shows_every_setting(command):
    text = command("train.py", "--help").out
    names = "model prompts rank guidance interval negative-prompt student source method steps sample-steps batch"
    names += " trajectories seed device dtype out resume no-report"
    assert all(f"--{name} " in text for name in names.split())
    assert "for large models (default: 4)" in " ".join(text.split())
