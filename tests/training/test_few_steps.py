"""train.py --student-steps and what sample.py makes of its LoRA: guidance and few steps in one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import levels, losses

from minidistill import CheckpointError, StableDiffusion, inject_lora, load, load_lora, save_lora
from minidistill.data.prompts import prompt_split
from minidistill.data.trajectories import generate, teacher_trajectory
from minidistill.distill import few_step_states
from minidistill.evaluate import noise_error_share
from minidistill.evaluate.__main__ import main as evaluate
from minidistill.evaluate.metrics import EVALUATION_SEED, pixels
from minidistill.export.__main__ import main as export
from minidistill.formats.lora_formats import read_lora
from minidistill.formats.tensor_files import read_tensors, write_tensors


@pytest.fixture(scope="module")
def few_step_run(flags, distil, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "few"
    distil(flags(out, student_steps=2, sample_steps=4, save_every=6))
    return out


def test_the_states_that_the_student_visits_are_stored(few_step_run: Path, sd: StableDiffusion, prompts_file: Path):
    """With what leads from each to the next, computed again from the teacher's fine trajectory."""
    captions, _ = prompt_split(sd.path, prompts_file)
    shard = load_file(sorted((few_step_run / "states").glob("*.safetensors"))[0])
    assert shard["t"].tolist() == [999, 499]
    cond = sd.encode_prompt([captions[i] for i in shard["prompt"]])
    z_T, uncond = sd.starting_noise(range(len(cond))), sd.encode_prompt([""]).expand(len(cond))
    with torch.no_grad():
        z_t, _, z_0 = teacher_trajectory(sd, cond, uncond, 4.0, z_T, sd.schedule.timesteps(4, "trailing"))
    expected = few_step_states(sd.schedule, z_t, z_0, 2)
    for name, tensor in zip(("z_t", "target"), expected):
        assert (shard[name] - tensor).abs().max() < 2e-3 * tensor.abs().max()  # stored in half precision


def test_header_and_report_say_how_many_steps(few_step_run: Path):
    assert read_lora(few_step_run / "lora.safetensors").few_steps == (2, 4)
    report = (few_step_run / "report.md").read_text()
    assert "4 DDIM steps, the student 2," in report
    calls = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in report.splitlines() if "|" in line}
    assert (calls["teacher"], calls["no guidance"], calls["student"]) == ("8", "4", "2")


def test_sampling_follows_the_header(few_step_run: Path, command, unet_calls, tiny_model: Path, tmp_path: Path):
    alone = ("sample.py", "a red apple", "--model", tiny_model, "--device", "cpu", "--lora", few_step_run)
    assert command(*alone, "--out", tmp_path / "one.png").code == 0
    assert len(unet_calls) == 2
    assert command(*alone, "--out", tmp_path / "four.png", "--steps", 4).code == 0
    assert len(unet_calls) == 2 + 4
    assert command(*alone, "--out", tmp_path / "both.png", "--compare").code == 0
    assert len(unet_calls) == 2 + 4 + (2 + 8 + 2)  # an untimed step, the teacher, the student

    sd = load(tiny_model)
    sd.unet = load_lora(sd.unet, few_step_run / "lora.safetensors")
    (expected,) = sd.sample("a red apple", steps=2, spacing="trailing", lora_enabled=True)
    drawn = Image.open(tmp_path / "one.png")
    assert np.abs(levels([drawn]) - levels([expected])).max() <= 1  # merged or beside


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_the_spacing_can_be_chosen(spacing: str, command, tiny_model: Path, tmp_path: Path):
    flags = ("--model", tiny_model, "--device", "cpu", "--steps", 2, "--spacing", spacing)
    assert command("sample.py", "a red apple", *flags, "--out", tmp_path / "one.png").code == 0
    (expected,) = load(tiny_model).sample("a red apple", steps=2, guidance=4.0, spacing=spacing)
    with Image.open(tmp_path / "one.png") as image:
        assert image.tobytes() == expected.tobytes()


def test_a_student_of_few_steps_is_measured_at_its_own_steps(few_step_run: Path, sd: StableDiffusion):
    """By the formula, from the teacher's states and what leads from each to the next."""
    sd.unet = load_lora(sd.unet, few_step_run / "lora.safetensors")
    share = noise_error_share(sd, ["a red apple"], steps=4, guidance=4.0, student_steps=2)
    cond, z_T = sd.encode_prompt(["a red apple"]), sd.starting_noise([EVALUATION_SEED])
    with torch.no_grad():
        fine = teacher_trajectory(sd, cond, sd.encode_prompt([""]), 4.0, z_T, sd.schedule.timesteps(4, "trailing"))
        z_t, target = few_step_states(sd.schedule, fine[0], fine[2], 2)
        for i, t in enumerate((999, 499)):
            eps = sd.unet(z_t[:, i], torch.tensor([t]), cond, lora_enabled=True)
            assert share.errors[0, i].item() == pytest.approx((eps - target[:, i]).square().sum().item(), rel=1e-4)


def test_learning_leads_closer_to_the_teachers_next_state(command, flags, tmp_path: Path):
    run = flags(tmp_path / "run", student_steps=2, sample_steps=4, steps=60, save_every=60, rank=8, lr=3e-3)
    assert command("train.py", *run, "--no-report").code == 0
    found = losses(tmp_path / "run")
    assert sum(found[-10:]) < 0.8 * sum(found[:10])


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(sample_steps=5), "multiple of --student-steps 2"),
        (dict(sample_steps=4, stride=2), "--stride"),
        (dict(sample_steps=4, weighting="min-snr"), "--weighting"),
        (dict(sample_steps=4, method="noised"), "--method noised"),
        (dict(student_steps=501), "at most 500"),
    ],
)
def test_contradicting_flags_are_refused(changes: dict, named: str, command, flags, tmp_path: Path):
    result = command("train.py", *flags(tmp_path / "run", **{"student_steps": 2} | changes))
    assert named in result.complaint and len(result.lines) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, steps, stride, trajectories",
    [("", 25, 3, 240), ("--student-steps 4", 24, 1, 480), ("--student-steps 5", 25, 1, 480)]
    + [("--student-steps 40", 40, 1, 480), ("--source noised", 25, 3, 480)],
)
def test_defaults(flags: str, steps: int, stride: int, trajectories: int, train):
    args = train.parse(flags.split())
    assert (args.sample_steps, args.stride, args.trajectories) == (steps, stride, trajectories)


@pytest.mark.parametrize("steps", [1, 3, 8, 10, 16, 25, 50])
def test_the_default_stride_leaves_eight_steps(steps: int, train):
    stride = train.parse(["--sample-steps", str(steps)]).stride
    assert len(range(0, steps, stride)) >= min(steps, 8)


def test_a_stride_past_the_end_is_refused(train):
    with pytest.raises(ValueError, match="--stride 4 must be less than --sample-steps"):
        train.parse(["--sample-steps", "4", "--stride", "4"])


@pytest.mark.parametrize("steps, complaint", [("0", "at least 1"), ("two", "two")])
def test_a_damaged_header_is_named(steps: str, complaint: str, sd: StableDiffusion, tmp_path: Path):
    save_lora(inject_lora(sd.unet, rank=2), tmp_path / "lora.safetensors", dict(guidance="4", student_steps=steps))
    with pytest.raises(CheckpointError, match=complaint):
        _ = read_lora(tmp_path / "lora.safetensors").few_steps


@pytest.mark.filterwarnings("error")
def test_without_the_teachers_steps(sd: StableDiffusion, tmp_path: Path):
    """As many as the teacher has: any number will do."""
    save_lora(inject_lora(sd.unet, rank=2), tmp_path / "lora.safetensors", dict(guidance="4", student_steps="3"))
    assert read_lora(tmp_path / "lora.safetensors").few_steps == (3, 3)
    sd = load(sd.path)
    sd.unet = load_lora(sd.unet, tmp_path / "lora.safetensors")
    assert sd.sample(["a cat"], steps=2, lora_enabled=True)


def test_another_strength_is_refused(few_step_run: Path, command, tiny_model: Path, tmp_path: Path):
    flags = ("--model", tiny_model, "--device", "cpu", "--lora", few_step_run, "--out", tmp_path / "one.png")
    assert "full strength" in command("sample.py", "a red apple", *flags, "--lora-scale", 0.5).complaint
    with pytest.raises(ValueError, match="lora.safetensors takes few steps.*full strength") as error:
        export([f"{few_step_run}:0.5", "--to", "kohya", "--out", str(tmp_path / "half.safetensors")])
    assert "damaged" not in str(error.value)


def test_other_steps_are_refused_or_warned_of(few_step_run: Path, command, tiny_model: Path, tmp_path: Path):
    flags = ("--model", tiny_model, "--device", "cpu", "--lora", few_step_run, "--out", tmp_path / "one.png")
    assert "trailing" in command("sample.py", "a red apple", *flags, "--spacing", "leading").complaint
    with pytest.warns(UserWarning, match="has learned 2 steps, not 4"):
        command("sample.py", "a red apple", *flags, "--steps", 4)


def test_a_merged_student_takes_its_steps(few_step_run: Path, command, tiny_model: Path, tmp_path: Path):
    """And trailing ones, without being told."""
    merged = tmp_path / "model"
    export([str(few_step_run), "--to", "checkpoint", "--model", str(tiny_model), "--out", str(merged)])
    prompt, one, other = ["a red apple", "--device", "cpu"], tmp_path / "lora.png", tmp_path / "merged.png"
    assert command("sample.py", *prompt, "--model", tiny_model, "--lora", few_step_run, "--out", one).code == 0
    assert command("sample.py", *prompt, "--model", merged, "--guidance", 1, "--out", other).code == 0
    a, b = pixels([Image.open(one), Image.open(other)]).int()
    assert (a - b).abs().max() <= 1
    with pytest.warns(UserWarning, match="has learned 2 steps, not 3"):
        command("sample.py", *prompt, "--model", merged, "--guidance", 1, "--steps", 3, "--out", other)
    leading = command("sample.py", *prompt, "--model", merged, "--guidance", 1, "--spacing", "leading", "--out", other)
    assert "taught with trailing spacing" in leading.complaint


def test_the_export_says_how_to_sample(few_step_run: Path, tmp_path: Path):
    export([str(few_step_run), "--to", "kohya", "--out", str(tmp_path / "lora.safetensors")])
    hint = read_lora(tmp_path / "lora.safetensors").metadata["modelspec.usage_hint"]
    assert hint.endswith("2 steps with trailing spacing")


def test_as_many_steps_as_the_teacher_have_a_dial(few_step_run: Path, command, tiny_model: Path, tmp_path: Path):
    """With N the teacher's own number of steps, the student is one of all steps."""
    tensors, metadata = read_tensors(few_step_run / "lora.safetensors")
    write_tensors(tmp_path / "lora.safetensors", tensors, metadata | dict(student_steps="4"))
    lora, model = str(tmp_path / "lora.safetensors"), ("--model", str(tiny_model), "--device", "cpu")
    evaluate(["dial", lora, "--write", "--guidance", "1.8", "--prompts", "2", *model, "--out", str(tmp_path / "dial")])
    assert dict(read_lora(lora).dial.points).keys() == {1.0, 1.8, 4.0}
    draw = ["sample.py", "a red apple", *model, "--lora", lora, "--guidance", 1.8, "--out"]
    assert command(*draw, tmp_path / "one.png").code == 0
    assert command(*draw, tmp_path / "leading.png", "--spacing", "leading").code == 0  # not refused, and not ignored
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "leading.png").read_bytes()
    for strength, steps in (("0", None), ("0.5", (4, 4))):  # at strength 0 it is the teacher, which takes any steps
        out = tmp_path / f"merged at {strength}"
        export([f"{lora}:{strength}", "--to", "checkpoint", "--model", str(tiny_model), "--out", str(out)])
        assert load(out).few_steps == steps


@pytest.mark.parametrize("changes", [dict(steps=5), dict(stride=2), dict(keep_states=False)])
def test_trajectories_must_be_whole(changes: dict, sd: StableDiffusion, tmp_path: Path):
    settings = dict(count=2, steps=4, guidance=2.0, student_steps=2) | changes
    with pytest.raises(ValueError, match="2 student steps"):
        generate(sd, ["a red apple"], tmp_path / "states", **settings)
    with pytest.raises(ValueError, match="not on noised"):
        noise_error_share(sd, ["a red apple"], steps=4, guidance=2.0, student_steps=2, noised=True)
