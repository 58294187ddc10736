"""training/students.py: which flags choose which student, what a full copy leaves, and styled teachers."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY_UNET, fill_up, listing, losses, tiny_unet

from minidistill import inject_lora, load, save_lora
from minidistill.data.prompts import prompt_split
from minidistill.data.trajectories import generate
from minidistill.formats.lora_formats import read_lora
from minidistill.formats.lora_io import merge_file
from minidistill.formats.tensor_files import read_tensors

# Flags


@pytest.mark.parametrize(
    "flags, student, source, method",
    [
        ("", "lora", "trajectories", "trajectories"),
        ("--student lora", "lora", "trajectories", "trajectories"),
        ("--student full", "full", "trajectories", "full"),
        ("--source trajectories", "lora", "trajectories", "trajectories"),
        ("--source noised", "lora", "noised", "noised"),
        ("--student lora --source noised", "lora", "noised", "noised"),
        ("--student full --source noised", "full", "noised", "full noised"),
        ("--method trajectories", "lora", "trajectories", "trajectories"),
        ("--method noised", "lora", "noised", "noised"),
        ("--method full", "full", "trajectories", "full"),
        ("--images I", "lora", "images", "noised"),
        ("--images I --source images", "lora", "images", "noised"),
        ("--images I --method noised", "lora", "images", "noised"),
        ("--images I --student full", "full", "images", "full noised"),
        ("--images I --student full --source images", "full", "images", "full noised"),
    ],
)
def test_flags_choose_student_and_source(flags: str, student: str, source: str, method: str, train):
    args = train.parse(flags.split())
    assert (args.student, args.source, args.method) == (student, source, method)


@pytest.mark.parametrize(
    "contradiction, named",
    [
        ("--method noised --source noised", "--method"),
        ("--method full --student full", "--method"),
        ("--method trajectories --student lora --source trajectories", "--method"),
        ("--source images", "--images"),
        ("--student full --source images", "--images"),
        ("--images I --source trajectories", "--source"),
        ("--images I --method trajectories", "--method"),
        ("--images I --method full", "--method"),
        ("--images I --prompts P", "--prompts"),
        ("--images I --trajectories 8", "--trajectories"),
        ("--images I --stride 1", "--stride"),
        ("--student full --alpha 4", "--alpha"),
        ("--method full --targets conv_in", "--targets"),
        ("--batched-teacher", "--batched-teacher"),
    ],
)
def test_contradicting_flags_are_refused(contradiction: str, named: str, command, tmp_path: Path):
    result = command("train.py", *contradiction.split(), "--out", tmp_path / "run")
    assert len(result.lines) == 1 and result.complaint.startswith("train.py: ") and named in result.complaint
    assert not list(tmp_path.iterdir())


# A full copy


def test_a_full_copy_becomes_a_model_of_its_own(command, flags, tiny_model: Path, tmp_path: Path):
    """Nothing but the UNet has changed, and it cannot be mistaken for the result of another run."""
    out = tmp_path / "run"
    result = command("train.py", *flags(out, method="full"))
    assert result.code == 0, result.err
    assert not (out / "lora.safetensors").exists() and "student" in (out / "report.md").read_text()
    teacher, student = load(tiny_model), load(out / "student")
    assert all(torch.equal(a, b) for a, b in zip(teacher.vae.parameters(), student.vae.parameters(), strict=True))
    again = command("train.py", *flags(out, method="full"))
    assert "already holds a run" in again.complaint
    assert command("train.py", *flags(out, method="full"), "--resume").code == 0  # as after a stop in the report
    for file in (out / "checkpoints").iterdir():
        file.write_bytes(b"")
    before = listing(out)
    with pytest.warns(UserWarning, match="is damaged and passed over"):
        afresh = command("train.py", *flags(out, method="full", guidance=5.0), "--resume")
    assert "holds a result, and no checkpoint" in afresh.complaint
    assert listing(out) == before
    for file in (out / "checkpoints").iterdir():
        file.unlink()
    before = listing(out)
    another = command("train.py", *flags(out), "--resume")  # a LoRA: the folder would hold the results of two runs
    assert "holds a result, and no checkpoint" in another.complaint
    assert listing(out) == before


@pytest.mark.parametrize("source, method", [("trajectories", "full"), ("noised", "full noised")])
def test_a_full_copy_learns_what_the_teacher_predicts(
    source: str, method: str, command, flags, tiny_model: Path, tmp_path: Path
):
    """Its first loss is the LoRA's, whose student equals the teacher without guidance too; then every weight learns."""
    for student in ("lora", "full"):
        run = flags(tmp_path / student, student=student, source=source, steps=1, save_every=1)
        assert command("train.py", *run, "--no-report").code == 0
    assert losses(tmp_path / "lora") == pytest.approx(losses(tmp_path / "full"), rel=1e-4)
    assert losses(tmp_path / "lora")[0] > 0
    student = tmp_path / "full/student"
    pairs = zip(load(tiny_model).unet.parameters(), load(student).unet.parameters(), strict=True)
    assert all(not torch.equal(before, after) for before, after in pairs)
    header = read_tensors(student / "unet/diffusion_pytorch_model.safetensors")[1]
    assert (header["method"], header["guidance"]) == (method, "4")


# A styled teacher


@pytest.fixture(scope="module")
def style(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("style") / "style.safetensors"
    save_lora(fill_up(inject_lora(load(tiny_model).unet, rank=1)), file)
    return file


def test_the_student_learns_from_the_styled_teacher(
    whole_run, command, flags, style: Path, tiny_model: Path, prompts_file: Path, tmp_path: Path
):
    """Its trajectories come from W + BA of the style, which is merged into W and not part of the student's file."""
    run = flags(tmp_path / "run", teacher_lora=f"{style}:0.5")
    assert command("train.py", *run, "--no-report").code == 0
    assert read_lora(tmp_path / "run/lora.safetensors").metadata["teacher_lora"] == "style.safetensors:0.5"
    assert "teacher_lora" not in read_lora(whole_run[0] / "lora.safetensors").metadata
    sd = load(tiny_model)
    merge_file(sd.unet, read_lora(style, 0.5))
    captions, _ = prompt_split(tiny_model, prompts_file)
    generate(sd, captions, tmp_path / "expected", count=8, steps=3, guidance=4.0, batch=4)
    expected = {file.name: load_file(file) for file in (tmp_path / "expected").iterdir()}
    for name, tensors in expected.items():
        actual = load_file(tmp_path / "run/states" / name)
        assert all(torch.equal(actual[key], tensors[key]) for key in tensors)
        assert not torch.equal(actual["z_0"], load_file(whole_run[0] / "states" / name)["z_0"])


def test_trajectories_of_another_style_are_not_used(whole_run, command, flags, style: Path, tmp_path: Path):
    command("train.py", *flags(tmp_path / "run", teacher_lora=style), "--no-report")
    (tmp_path / "run/lora.safetensors").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints")
    for changes in [{}, dict(teacher_lora=f"{style}:0.5")]:
        assert "other settings" in command("train.py", *flags(tmp_path / "run", **changes), "--no-report").complaint
    other = fill_up(inject_lora(tiny_unet(), rank=1), seed=70)
    save_lora(other, tmp_path / "style.safetensors")  # a style of the same name
    changed = flags(tmp_path / "run", teacher_lora=tmp_path / "style.safetensors")
    assert "other settings" in command("train.py", *changed, "--no-report").complaint


def test_resuming_with_another_style_is_refused(command, flags, style: Path, tmp_path: Path):
    command("train.py", *flags(tmp_path / "run", teacher_lora=style), "--no-report")
    shutil.rmtree(tmp_path / "run/states")
    other = flags(tmp_path / "run", teacher_lora=f"{style}:0.5")
    assert f"--teacher-lora {style}:1" in command("train.py", *other, "--no-report", "--resume").complaint
    (tmp_path / "moved").mkdir()
    same = flags(tmp_path / "run", teacher_lora=shutil.copy(style, tmp_path / "moved"))
    assert command("train.py", *same, "--no-report", "--resume").code == 0


def test_a_student_is_refused_as_a_style(whole_run, command, flags, tmp_path: Path):
    result = command("train.py", *flags(tmp_path / "run", teacher_lora=whole_run[0] / "lora.safetensors"))
    assert "has learned guidance" in result.complaint and not (tmp_path / "run").exists()


def test_a_style_for_another_model_is_refused(command, flags, tmp_path: Path):
    save_lora(inject_lora(tiny_unet(config=replace(TINY_UNET, context_width=48)), rank=1), tmp_path / "style")
    result = command("train.py", *flags(tmp_path / "run", teacher_lora=tmp_path / "style"))
    assert result.code != 0 and "another model" in result.err and not (tmp_path / "run").exists()
