"""training/run_folder.py: one run at a time in a folder; interrupted and resumed, it ends as if undisturbed."""

import hashlib
import io
import os
import re
import shutil
import signal
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ROOT, UPDATES, edit_json, fork, listing, losses, run_script, same_result
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from minidistill.data import shards
from minidistill.evaluate.dial import write_dial
from minidistill.formats.files import read_json, write_json
from minidistill.formats.lora_formats import read_lora
from minidistill.training.run_folder import fixed_settings, lock, resume, save_checkpoint

# Interrupted and resumed


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


@pytest.fixture
def finished(whole_run, flags, tmp_path: Path) -> list[str]:
    """The flags of a copy of the whole run."""
    shutil.copytree(whole_run[0], tmp_path / "run")
    return [*flags(tmp_path / "run"), "--no-report"]


@pytest.mark.parametrize("when, update", [("before", 1), ("before", 4), ("after", 3)])
def test_interrupted_and_resumed_is_uninterrupted(when: str, update: int, whole_run, command, flags, tmp_path: Path):
    run = [*flags(tmp_path / "run"), "--no-report"]
    with ctrl_c(when, update):
        stopped = command("train.py", *run)
    assert "--resume" in stopped.complaint and not (tmp_path / "run/lora.safetensors").exists()
    assert len(losses(tmp_path / "run")) == update
    assert command("train.py", *run, "--resume").code == 0
    assert same_result(tmp_path / "run", whole_run[0])


def test_interrupted_and_resumed_with_the_teacher_in_the_loop(command, flags, tmp_path: Path):
    one, other = ([*flags(tmp_path / name, method="noised"), "--no-report"] for name in ("one", "other"))
    command("train.py", *one)
    with ctrl_c("before", 3):
        assert command("train.py", *other).code != 0
    command("train.py", *other, "--resume")
    assert same_result(tmp_path / "one", tmp_path / "other")


def test_a_run_that_is_stopped_draws_no_preview(command, flags, tmp_path: Path):
    """So that it ends soon."""
    with ctrl_c("after", 1):
        assert "Saved after 1 of 6" in command("train.py", *flags(tmp_path / "run")).complaint
    assert not list((tmp_path / "run").glob("pictures/*"))


def test_killed_and_resumed_is_uninterrupted(whole_run, command, finished, tmp_path: Path):
    """As after a power cut: only an older checkpoint is left, and half of the newest."""
    checkpoints = sorted((tmp_path / "run/checkpoints").iterdir())
    assert len(checkpoints) == 2
    (tmp_path / "run/lora.safetensors").unlink()
    checkpoints[-1].rename(checkpoints[-1].with_name(checkpoints[-1].name + ".tmp"))
    command("train.py", *finished, "--resume")
    assert same_result(tmp_path / "run", whole_run[0])


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_the_teacher_samples(asked: int, whole_run, command, flags, tmp_path: Path, monkeypatch):
    run, save = [*flags(tmp_path / "run"), "--no-report"], shards.save

    def save_and_interrupt(*args):
        os.kill(os.getpid(), asked)
        return save(*args)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "save", save_and_interrupt)
        assert "--resume" in command("train.py", *run).complaint
    assert command("train.py", *run, "--resume").code == 0
    assert same_result(tmp_path / "run", whole_run[0])


def test_ctrl_c_from_outside(flags, tmp_path: Path):
    """A process gets a signal from another: it saves, says how to continue, and ends soon."""
    run, log = flags(tmp_path / "run", steps=100_000, save_every=100_000), tmp_path / "log.txt"

    def script() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored when the tests run in the background
        run_script(ROOT / "train.py", [*run, "--no-report"])

    process, deadline = fork(script, log), time.monotonic() + 300
    while not re.search(r"distilling.* [1-9]\d*/100000", log.read_text()):
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(timeout=300)
    assert process.exitcode and "Traceback" not in log.read_text()
    done = re.search(r"after (\d+) of 100000.*--resume", log.read_text().splitlines()[-1])[1]
    assert len(losses(tmp_path / "run")) == int(done) > 0


def test_resume_without_a_checkpoint_starts_a_run(whole_run, command, flags, tmp_path: Path):
    assert command("train.py", *flags(tmp_path / "run"), "--no-report", "--resume").code == 0
    assert same_result(tmp_path / "run", whole_run[0])


def test_resume_of_a_finished_run_changes_nothing(whole_run, command, finished, tmp_path: Path):
    assert command("train.py", *finished, "--resume").code == 0
    assert same_result(tmp_path / "run", whole_run[0])
    write_dial(read_lora(tmp_path / "run"), [(2, 0.4)])  # it is kept, too
    assert command("train.py", *finished, "--resume").code == 0
    assert (2, 0.4) in read_lora(tmp_path / "run").dial.points


# What is refused


@pytest.mark.usefixtures("finished")
def test_a_result_without_its_checkpoints_is_refused(command, flags, tmp_path: Path):
    shutil.rmtree(tmp_path / "run/checkpoints")
    before = (tmp_path / "run/lora.safetensors").read_bytes()
    result = command("train.py", *flags(tmp_path / "run", rank=3), "--no-report", "--resume")
    assert "no checkpoint to continue from" in result.complaint
    assert (tmp_path / "run/lora.safetensors").read_bytes() == before


def test_what_a_resumed_run_lacks_is_named(whole_run, command, flags):
    complaint = command("train.py", *flags(whole_run[0], lr=1), "--resume").complaint
    assert "None is a flag that was left out" in complaint


def test_a_resumed_run_cannot_learn_from_other_states(command, flags, tmp_path: Path):
    """The teacher's batch decides at which times its trajectories are stored."""
    command("train.py", *flags(tmp_path / "run", states=tmp_path / "a", steps=2, save_every=1), "--no-report")
    others = flags(tmp_path / "run", states=tmp_path / "b", steps=2, sample_batch=1)
    assert "--sample-batch None" in command("train.py", *others, "--no-report", "--resume").complaint
    same = flags(tmp_path / "run", states=tmp_path / "a", steps=2, sample_batch=4)  # as many as --batch
    assert command("train.py", *same, "--no-report", "--resume").code == 0


def test_a_second_run_in_the_same_folder_is_refused(whole_run, command, flags):
    before = listing(whole_run[0])
    complaint = command("train.py", *flags(whole_run[0])).complaint
    assert str(whole_run[0]) in complaint and "--resume" in complaint and "--out" in complaint
    assert listing(whole_run[0]) == before


@pytest.mark.parametrize(
    "changes",
    [dict(rank=3), dict(guidance=2), dict(seed=1), dict(batch=2), dict(method="noised"), dict(alpha=1)]
    + [dict(weighting="min-snr"), dict(targets="*.attn?.to_*"), dict(steps=7), dict(lr=0.1), dict(weights="float8")],
    ids=str,
)
def test_resume_with_other_settings_is_refused(changes: dict, whole_run, command, flags):
    before = listing(whole_run[0])
    result = command("train.py", *flags(whole_run[0], **changes), "--resume")
    assert "settings" in result.complaint or f"--{next(iter(changes))}" in result.complaint
    assert listing(whole_run[0]) == before


LEARNED = ["--sample-steps 4", "--stride 2", "--trajectories 9", "--interval 1 900", "--negative-prompt x"]
LEARNED += ["--sample-batch 2", "--prediction v", "--dtype float64", "--ema", "--variant fp16", "--height 8"]
FREE = ["--save-every 9", "--memory low", "--accumulate 2", "--kernel torch", "--compile", "--no-graph", "--no-report"]
FREE += ["--states x", "--device meta"]


@pytest.mark.parametrize("flag", LEARNED + FREE)
def test_a_flag_is_recorded_if_it_changes_what_is_learned(flag: str, train, flags, sd, tmp_path: Path):
    without, with_it = (
        fixed_settings(train.parse([*flags(tmp_path), *more]), sd, "the teacher", {}, {}) for more in ([], flag.split())
    )
    differing = [f"--{name.replace('_', '-')}" for name in without if without[name] != with_it[name]]
    assert differing == ([flag.split()[0]] if flag in LEARNED else [])


def test_a_resumed_run_may_ask_the_teacher_in_another_way(train, flags, sd, tmp_path: Path):
    """``--batched-teacher`` changes the calls, not what is learned. It needs the teacher in the loop."""
    in_the_loop = flags(tmp_path, source="noised")
    two_calls, one_call = (
        fixed_settings(train.parse([*in_the_loop, *more]), sd, "the teacher", {}, {})
        for more in ([], ["--batched-teacher"])
    )
    assert two_calls == one_call


def test_resume_with_other_prompts_in_the_file_is_refused(command, flags, prompts_file: Path, tmp_path: Path):
    own = Path(shutil.copy(prompts_file, tmp_path / "prompts.txt"))
    run = [*flags(tmp_path / "run", prompts=own, steps=1), "--no-report"]
    command("train.py", *run)
    shutil.rmtree(tmp_path / "run/states")
    own.write_text(prompts_file.read_text() + "\na blue boat\na red boat\n")
    assert f"--prompts {own}" in command("train.py", *run, "--resume").complaint


def test_resume_with_another_vocabulary_is_refused(command, flags, tiny_model: Path, tmp_path: Path):
    tokenizer = shutil.copytree(tiny_model / "tokenizer", tmp_path / "tokenizer")
    run = [*flags(tmp_path / "run", tokenizer=tokenizer, steps=1), "--no-report"]
    command("train.py", *run)
    vocabulary = read_json(tokenizer / "vocab.json")
    first, second = list(vocabulary)[300:302]
    write_json(tokenizer / "vocab.json", vocabulary | {first: vocabulary[second], second: vocabulary[first]})
    assert f"--tokenizer {tokenizer} (" in command("train.py", *run, "--resume").complaint


SETTINGS = [
    ("scheduler/scheduler_config.json", dict(prediction_type="v_prediction")),
    ("unet/config.json", dict(attention_head_dim=4)),
    ("text_encoder/config.json", dict(hidden_act="gelu")),
    ("vae/config.json", dict(scaling_factor=0.5)),
    ("vae/diffusion_pytorch_model.safetensors", None),
]


@pytest.mark.parametrize("file, setting", SETTINGS)
def test_resume_with_another_model_is_refused(
    file: str, setting: dict | None, command, flags, tiny_model: Path, tmp_path: Path
):
    """Other weights, or the same, which compute something else."""
    file, model = tmp_path / "model" / file, shutil.copytree(tiny_model, tmp_path / "model")
    run = [*flags(tmp_path / "run", model=model, steps=1), "--no-report"]
    command("train.py", *run)
    if setting:
        edit_json(file, setting)
    else:
        save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    assert f"--model {model}" in command("train.py", *run, "--resume").complaint


def test_a_second_run_beside_the_first_is_refused(whole_run, command, flags, tmp_path: Path):
    run = [*flags(tmp_path / "run"), "--no-report", "--resume"]
    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run"):
        assert f"Another run is at work in {tmp_path}/run" in command("train.py", *run).complaint
        assert [file.name for file in (tmp_path / "run").iterdir()] == ["lock"]
    assert command("train.py", *run).code == 0
    assert same_result(tmp_path / "run", whole_run[0])


def test_runs_that_share_states_take_turns(whole_run, command, flags, tmp_path: Path, monkeypatch):
    """One samples while the other waits; both learn at the same time."""
    fcntl = pytest.importorskip("fcntl")
    states, flock = tmp_path / "states", fcntl.flock
    other = lock(states, wait=True)

    def let_the_other_end(file: IO[str], how: int) -> None:
        if not how & fcntl.LOCK_NB:
            other.close()
        flock(file, how)

    def can_lock(*_) -> None:
        with (states / "filling").open("a") as file:
            flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if the lock is still held

    monkeypatch.setattr(fcntl, "flock", let_the_other_end)
    handle = register_optimizer_step_pre_hook(can_lock)
    result = command("train.py", *flags(tmp_path / "run", states=states), "--no-report")
    handle.remove()
    assert result.out.count(f"Another run is at work in {states}: waiting") == 1
    assert same_result(tmp_path / "run", whole_run[0])


def test_states_may_lie_in_the_runs_own_folder(whole_run, command, flags, tmp_path: Path):
    """The two locks do not wait for each other."""
    assert command("train.py", *flags(tmp_path / "run", states=tmp_path / "run"), "--no-report").code == 0
    assert same_result(tmp_path / "run", whole_run[0])


# Damaged checkpoints


def flipped(contents: bytes) -> bytes:
    """One bit in the middle of a weight, which torch.load alone would not notice."""
    middle = len(contents) // 2
    return contents[:middle] + bytes([contents[middle] ^ 4]) + contents[middle + 1 :]


@pytest.mark.parametrize("damage", [lambda contents: contents[:1000], lambda contents: b"", flipped])
def test_a_damaged_checkpoint_is_named_and_passed_over(damage, whole_run, command, finished, tmp_path: Path):
    newest = sorted((tmp_path / "run/checkpoints").iterdir())[-1]
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(UserWarning, match=f"{newest} is damaged and passed over"):
        result = command("train.py", *finished, "--resume")
    assert f"{UPDATES - 2}/{UPDATES}" in result.err  # after the checkpoint before
    assert same_result(tmp_path / "run", whole_run[0])


@pytest.mark.filterwarnings("ignore:.*damaged")
def test_checkpoints_made_after_damaged_ones_are_kept(whole_run, command, finished, tmp_path: Path):
    """Both are damaged, so the run starts again; stopped early, it continues from what it has saved since."""
    (tmp_path / "run/lora.safetensors").unlink()
    for file in (tmp_path / "run/checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    with ctrl_c("after", 3):
        assert "Saved after 3 of 6" in command("train.py", *finished, "--resume").complaint
    assert {file.name for file in (tmp_path / "run/checkpoints").iterdir()} == {"step-000002.pt", "step-000003.pt"}
    result = command("train.py", *finished, "--resume")
    assert f"3/{UPDATES}" in result.err and same_result(tmp_path / "run", whole_run[0])


def test_a_checkpoint_is_in_memory_once(tmp_path: Path):
    """Not counting its tensors. (The checkpoint of a full copy is several times the size of W.)"""
    weight = torch.nn.Parameter(torch.zeros(10**6))
    optimizer = torch.optim.AdamW([weight])
    save_checkpoint(tmp_path, [weight], optimizer, [0.5], {})
    tracemalloc.start()
    assert resume(tmp_path, [weight], optimizer, {}) == [0.5]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 4e6 < most < 6e6


# Checkpoints made before a flag existed


def forget(checkpoint: Path, flag: str) -> None:
    """Make a checkpoint one of an earlier version, which did not have the flag."""
    state = torch.load(checkpoint, weights_only=True)
    del state["settings"][flag]
    contents = io.BytesIO()
    torch.save(state, contents)
    checkpoint.write_bytes(contents.getvalue() + hashlib.sha256(contents.getvalue()).digest())


def test_a_run_from_before_intervals_can_be_resumed(whole_run, command, finished, tmp_path: Path):
    checkpoints = sorted((tmp_path / "run/checkpoints").iterdir())
    checkpoints.pop().unlink()
    for checkpoint in checkpoints:
        forget(checkpoint, "interval")
    assert "--interval None" in command("train.py", *finished, "--interval", 300, 700, "--resume").complaint
    result = command("train.py", *finished, "--resume")
    assert f"{UPDATES - 2}/{UPDATES}" in result.err and same_result(tmp_path / "run", whole_run[0])


def test_the_same_model_and_prompts_under_another_path(
    whole_run, command, flags, tiny_model, prompts_file, tmp_path: Path
):
    shutil.copytree(whole_run[0], tmp_path / "run")
    (tmp_path / "model").symlink_to(tiny_model)
    shutil.copy(prompts_file, tmp_path / "other.txt")
    moved = flags(tmp_path / "run", model=tmp_path / "model", prompts=tmp_path / "other.txt", steps=UPDATES + 1)
    assert "--steps 6" in command("train.py", *moved, "--resume", "--no-report").complaint
    moved = flags(tmp_path / "run", model=tmp_path / "model", prompts=tmp_path / "other.txt")
    assert command("train.py", *moved, "--resume", "--no-report").code == 0


def test_a_run_has_the_name_of_the_link_to_its_model(command, flags, tiny_model: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(tiny_model)
    words = flags(tmp_path, model="my-model", steps=1)
    del words[words.index("--out") : words.index("--out") + 2]
    assert command("train.py", *words, "--no-report").code == 0
    assert read_lora(tmp_path / "runs/my-model").metadata["base"] == "my-model"
