"""training/command_line.py: a readable --help, and likely mistakes that end in one line with advice."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from minidistill import CheckpointError, load
from minidistill.training.command_line import one_line_errors

SCRIPTS = ["train.py", "sample.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_a_short_usage_and_groups(script: str, command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = command(script, "--help").out
    assert re.fullmatch(rf"usage: {script}( PROMPT \.\.\.)? \[flags\]", text.splitlines()[0])
    groups = ["which Stable Diffusion, and how it is loaded:"]
    if script == "train.py":
        groups += ["the teacher, two UNet calls a step, samples images:"]
        groups += ["the student, one UNet call a step, learns from them:", "the run itself:"]
    else:
        groups = ["what to sample:", *groups, "how to sample:"]
    places = [text.index(f"\n{heading}\n") for heading in groups]
    assert places == sorted(places)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help_and_a_default(script: str, command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "500")
    flags = re.findall(r"^  (--[\w-]+.*(?:\n {30}.*)?)$", command(script, "--help").out, re.MULTILINE)
    assert len(flags) > 15
    for flag in flags:
        assert re.match(r"--[\w-]+( \S+)*?(  |\n) *\w", flag), flag  # followed by words
        assert "default: )" not in flag and "None" not in flag, flag


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("mistake", ["--seed 18446744073709551616", "--seed -1e3", "--guidance nan", "--guidance inf"])
def test_impossible_numbers_name_their_flag(script: str, mistake: str, command):
    flag, value = mistake.split()
    prompt = ["a rocket"] if script == "sample.py" else []
    result = command(script, *prompt, f"{flag}={value}")
    assert flag in result.complaint and value in result.complaint and "Traceback" not in result.err


@pytest.mark.parametrize("script", SCRIPTS)
def test_out_of_memory_names_existing_flags(script: str, command, monkeypatch, tmp_path: Path):
    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr("minidistill.load", full)
    monkeypatch.chdir(tmp_path)
    complaint = command(script, *(["a rocket"] if script == "sample.py" else [])).complaint
    assert complaint.startswith(f"{script}: out of memory. Try, in this order: --")
    named = re.findall(r"--[\w-]+", complaint)
    text = command(script, "--help").out
    assert len(named) >= 2 and all(f"  {flag} " in text for flag in named)


def test_out_of_memory_on_a_cpu():
    with pytest.raises(SystemExit, match="s: out of memory. less"), one_line_errors("s", "stopped", "less"):
        torch.empty(2**50)


def test_an_error_starts_a_new_line(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit, match="s: the mistake"), one_line_errors("s", "stopped"):
        bar = tqdm(total=2)
        bar.update()
        raise ValueError("the mistake")
    assert re.search(r"1/2 .*\n$", capsys.readouterr().err)


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="shapes"), one_line_errors("s", "stopped", "less"):
        raise RuntimeError("shapes")


def test_folders_near_a_model_get_advice(tiny_model: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=f"Name the whole folder, {tiny_model}"):
        load(tiny_model / "unet")
    shutil.copytree(tiny_model, tmp_path / "models/tiny")
    (tmp_path / "models/tiny/model_index.json").write_text('{"unet": []}')
    with pytest.raises(CheckpointError, match=f"Name the folder in it, {tmp_path}/models/tiny"):
        load(tmp_path / "models")
    (tmp_path / "files").mkdir()
    (tmp_path / "files/v1-5.safetensors").touch()
    with pytest.raises(CheckpointError, match=f"single file in it, name that file: {tmp_path}/files/v1-5.safetensors"):
        load(tmp_path / "files")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="It should hold unet, vae"):
        load(tmp_path / "empty")


def test_no_tokenizer_names_the_flag(tiny_model: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(CheckpointError, match="holds no tokenizer.*--tokenizer FOLDER"):
        load(folder).encode_prompt(["a rocket"])


def test_a_missing_model_names_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minidistill.formats.hub.snapshot_download", lambda *args, **options: 1 / 0)
    with pytest.raises(CheckpointError, match=f"weights/pocket-emoji is neither a folder or file in {tmp_path}"):
        load("weights/pocket-emoji")
