"""training/command_line.py: a readable --help, and likely mistakes that end in one line with advice."""

import io
import os
import re
import runpy
import shutil
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tiny import ROOT
from tqdm import tqdm

from minidistill import CheckpointError, load
from minidistill.training.command_line import (
    DEFAULT_DEVICE,
    ScaledFile,
    add_model_flags,
    load_options,
    new_parser,
    one_line_errors,
    out_file,
    out_folder,
    prepare,
)

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


def test_every_model_flag_reaches_load():
    parser = new_parser(None)
    add_model_flags(parser)
    flags = "--ema --variant fp16 --prediction v --tokenizer a --height 64 --width 32 --device meta --weights float8"
    args = parser.parse_args([*flags.split(), "--dtype", "float16"])
    assert load_options(args) | {"model": args.model} == vars(args) | {"dtype": torch.float16}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("mistake", ["--seed 18446744073709551616", "--seed -1e3", "--guidance nan", "--guidance inf"])
def test_impossible_numbers_name_their_flag(script: str, mistake: str, command):
    flag, value = mistake.split()
    prompt = ["a rocket"] if script == "sample.py" else []
    result = command(script, *prompt, f"{flag}={value}")
    assert flag in result.complaint and value in result.complaint and "Traceback" not in result.err


@pytest.mark.parametrize("program", ["bench updates", "bench memory", "evaluate quality", "evaluate dial RUN"])
def test_a_place_that_cannot_be_written_is_refused_at_once(program: str, tmp_path: Path, capsys):
    module, *command = program.split()
    main = import_module(f"minidistill.{module}.__main__").main
    (tmp_path / "file").touch()
    for out in (tmp_path / "file/results", tmp_path if module == "bench" else tmp_path / "file"):
        with pytest.raises(SystemExit):
            main([*command, "--out", str(out)])
        complaint = capsys.readouterr().err.splitlines()[-1]
        assert "error: argument --out: " in complaint and "a folder" in complaint
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("kind", [out_file, out_folder])
def test_a_folder_of_somebody_else(kind: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ArgumentTypeError, match=f"{re.escape(str(tmp_path))} is not a folder that can be written into"):
        kind(str(tmp_path / "new"))


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


def test_the_default_model_is_that_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Elsewhere its path must not look like a hub id, which would be fetched."""
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(ROOT / "minidistill/training/command_line.py"))
    assert names["DEFAULT_MODEL"].resolve() == ROOT / "weights/pocket-emoji"


def test_a_missing_model_names_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minidistill.formats.hub.snapshot_download", lambda *args, **options: 1 / 0)
    with pytest.raises(CheckpointError, match=f"weights/pocket-emoji is neither a folder or file in {tmp_path}"):
        load("weights/pocket-emoji")


# Paths and terminals


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = new_parser(None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lora", type=ScaledFile.parse)
    commands = parser.add_subparsers()
    commands.add_parser("bench").add_argument("--model", type=Path)
    args = parser.parse_args(["--out=~/x", "--lora", "~/y:0.5", "bench", "--model=~no-such-user/z"])
    assert (args.out, args.lora, args.model) == (tmp_path / "x", (tmp_path / "y", 0.5), Path("~no-such-user/z"))


def test_a_model_in_the_home_folder(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tiny_model.parent))
    assert load(f"~/{tiny_model.name}").path == tiny_model


def test_a_colon_in_a_path(tmp_path: Path):
    (tmp_path / "run 12:30").mkdir()
    assert ScaledFile.parse(str(tmp_path / "run 12:30")) == (tmp_path / "run 12:30", 1.0)
    assert ScaledFile.parse(str(tmp_path / "run 12:30:0.5")) == (tmp_path / "run 12:30", 0.5)


@pytest.mark.parametrize(
    "flag", [["\udcff"], *(["x", flag, "\udcff"] for flag in ("--negative-prompt", "--out", "--lora"))]
)
def test_prompts_in_another_encoding(flag: list[str], command):
    result = command("sample.py", *flag)
    assert result.code == 2 and "not text in this terminal's encoding" in result.lines[-1]


def test_letters_that_the_output_lacks(monkeypatch: pytest.MonkeyPatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", output)
    with one_line_errors("script", "stopped."):
        print("猫.png")
    output.flush()
    assert output.buffer.getvalue().strip() == rb"\u732b.png"


def test_no_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    def compiler(function):
        def fail(x):
            raise RuntimeError("InvalidCxxCompiler: none found\nand many more lines")

        return fail

    monkeypatch.setattr(torch, "compile", compiler)
    with pytest.raises(ValueError, match=r"^--compile finds .* \(InvalidCxxCompiler: none found\): install one"):
        prepare(torch.device(DEFAULT_DEVICE), compiled=True)
