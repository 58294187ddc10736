"""training/sources.py: what each source gives the student to learn, with guidance everywhere or in an interval."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import losses, same_result

from minidistill import StableDiffusion
from minidistill.data.prompts import prompt_split
from minidistill.data.shards import read_shard
from minidistill.evaluate import run_report
from minidistill.formats.lora_formats import read_lora
from minidistill.guidance import Interval
from minidistill.training.bookkeeping import Progress
from minidistill.training.distributed import Ranks
from minidistill.training.sources import SOURCES


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list:
    """(batch, target) of every part of a batch that a run learns from."""
    pairs, remember = [], Progress.remember

    def record(self, batch, target):
        pairs.append((batch, target))
        remember(self, batch, target)

    monkeypatch.setattr(Progress, "remember", record)
    return pairs


def guided_everywhere(sd: StableDiffusion, batch, negative: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """The prediction of W without guidance, and with guidance 4."""
    with torch.no_grad():
        eps = sd.unet(batch.z_t, batch.t, batch.cond)
        eps_uncond = sd.unet(batch.z_t, batch.t, sd.encode_prompt([negative]).expand(len(batch)))
    return eps, eps_uncond + 4 * (eps - eps_uncond)


def test_an_interval_between_the_stored_steps_is_refused(command, flags, tmp_path: Path):
    """The teacher guides at t = 41, but only every third shard keeps that step. In the loop, every t is learned."""
    settings = dict(sample_steps=25, trajectories=4, batch=4, steps=1)
    complaint = command("train.py", *flags(tmp_path / "run", **settings), "--interval", 40, 50, "--no-report").complaint
    assert "--interval: none of the DDIM steps" in complaint and "widen it, or take more steps" in complaint
    assert not list((tmp_path / "run").rglob("*.safetensors"))  # nor has the teacher sampled
    three_shards = flags(tmp_path / "shards", **settings | dict(trajectories=12))
    assert command("train.py", *three_shards, "--interval", 40, 50, "--no-report").code == 0
    noised = flags(tmp_path / "noised", **settings, source="noised")
    assert command("train.py", *noised, "--interval", 40, 50, "--no-report").code == 0
    few = flags(tmp_path / "few", **settings | dict(sample_steps=24, student_steps=2))
    assert command("train.py", *few, "--interval", 40, 50, "--no-report").code == 0


@pytest.mark.parametrize("source", ["trajectories", "noised"])
def test_targets_are_guided_within_the_interval(source: str, seen: list, command, flags, sd, tmp_path: Path):
    """And the plain prediction elsewhere, for each example of a batch: computed again for every state learned from."""
    # At this learning rate the LoRA would show if it were on.
    run = flags(tmp_path / "run", source=source, guidance=4, steps=12, save_every=12, lr=0.003)
    assert command("train.py", *run, "--interval", 300, 600, "--no-report").code == 0
    counts = {True: 0, False: 0}
    for batch, target in seen:
        eps, guided = guided_everywhere(sd, batch)
        inside = (batch.t >= 300) & (batch.t <= 600)
        expected = torch.where(inside[:, None, None, None], guided, eps)
        assert (target - expected).abs().max() < 5e-3 * expected.abs().max()  # trajectories are stored as float16
        assert ((guided - eps).abs().amax((1, 2, 3)) > 0.02 * expected.abs().max()).all()  # so guidance would show
        for value in inside.tolist():
            counts[value] += 1
    assert min(counts.values()) >= 8


@pytest.mark.parametrize("negative", ["", "a rocket"])
@pytest.mark.parametrize("source", ["trajectories", "noised"])
def test_targets_are_guided_everywhere_without_an_interval(
    source: str, negative: str, seen: list, command, flags, sd, tmp_path: Path
):
    run = flags(tmp_path / "run", source=source, guidance=4, negative_prompt=negative)
    assert command("train.py", *run, "--no-report").code == 0
    for batch, target in seen:
        _, guided = guided_everywhere(sd, batch, negative)
        assert (target - guided).abs().max() < 5e-3 * guided.abs().max()
    _, other = guided_everywhere(sd, seen[0][0], "a cat")
    assert (seen[0][1] - other).abs().max() > 2e-2 * other.abs().max()


def test_the_interval_is_recorded(whole_run, command, flags, tmp_path: Path):
    """In the student's header and in the shards; without an interval there is no such entry."""
    assert command("train.py", *flags(tmp_path / "run"), "--interval", 300, 700.5, "--no-report").code == 0
    file = read_lora(tmp_path / "run/lora.safetensors")
    assert file.metadata["interval"] == "300 700.5" and file.interval == Interval(300, 700.5)
    shards = list((tmp_path / "run/states").glob("*.safetensors"))
    assert shards and all(json.loads(read_shard(shard)[1])["interval"] == [300, 700.5] for shard in shards)
    assert "interval" not in read_lora(whole_run[0] / "lora.safetensors").metadata


def test_the_report_is_of_the_interval_and_the_negative_prompt(command, flags, tmp_path: Path, monkeypatch):
    """t = 667, 334, 1, of which one is guided: four calls of the UNet for the teacher, three for the student."""
    negative, draw = [], run_report.draw
    monkeypatch.setattr(
        run_report, "draw", lambda *x, **how: negative.append(how["negative_prompt"]) or draw(*x, **how)
    )
    result = command("train.py", *flags(tmp_path / "run"), "--interval", 300, 600, "--negative-prompt", "a rocket")
    assert result.code == 0, result.err
    report = (tmp_path / "run/report.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in report.splitlines() if line.startswith("|")]
    assert rows[2:] == [["teacher", "4"], ["no guidance", "3"], ["student", "3"]]
    assert "300 <= t <= 600" in report and set(negative) == {"a rocket"}


def test_resuming_with_another_interval_is_refused(whole_run, command, flags, tmp_path: Path):
    run = [*flags(tmp_path / "run"), "--no-report"]
    assert command("train.py", *run, "--interval", 300, 700).code == 0
    complaint = command("train.py", *run, "--interval", 300, 800, "--resume").complaint
    assert "--interval 300 700" in complaint
    assert "--interval 300 700" in command("train.py", *run, "--resume").complaint
    complaint = command("train.py", *flags(whole_run[0]), "--interval", 300, 800, "--resume").complaint
    assert "--interval None" in complaint and "(" not in complaint.split("--interval")[1]


def test_an_interval_with_swapped_ends_is_refused(command, flags, tmp_path: Path):
    for script, more in [("train.py", flags(tmp_path / "run")), ("sample.py", ["a red apple"])]:
        complaint = command(script, *more, "--interval", 700, 300).complaint
        assert complaint.startswith(f"{script}: ") and "--interval 700 300" in complaint
    assert not (tmp_path / "run").exists()


def test_an_interval_without_any_ddim_step_is_refused(command, flags, tmp_path: Path):
    """There would be nothing to learn: t = 667, 334, 1."""
    complaint = command("train.py", *flags(tmp_path / "run"), "--interval", 700, 900).complaint
    assert "--interval" in complaint and "667, 334, 1" in complaint and not (tmp_path / "run").exists()


def test_the_teacher_is_asked_in_one_call_or_two(command, flags, unet_calls: list[int], tmp_path: Path):
    """--batched-teacher changes the loss by rounding alone."""
    for name, more in [("two", []), ("one", ["--batched-teacher"])]:
        run = flags(tmp_path / name, source="noised")
        assert command("train.py", *run, "--interval", 300, 700, *more, "--no-report").code == 0
        assert (8 in unet_calls) == (name == "one")  # of a batch of 4
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-3)


def test_trajectories_that_another_run_made_are_used(whole_run, command, flags, tmp_path: Path):
    """--states shares them: nothing is sampled again, and the student is the same."""
    shards = {file: file.stat().st_mtime_ns for file in (whole_run[0] / "states").glob("*.safetensors")}
    assert command("train.py", *flags(tmp_path / "run", states=whole_run[0] / "states"), "--no-report").code == 0
    assert same_result(tmp_path / "run", whole_run[0]) and not (tmp_path / "run/states").exists()
    assert shards == {file: file.stat().st_mtime_ns for file in shards}


@pytest.mark.parametrize("source", ["trajectories", "noised"])
def test_the_examples_are_those_of_the_flags(source: str, train, flags, sd, tmp_path: Path):
    changes = dict(source=source, seed=5, sample_batch=2, weighting="min-snr", guidance=3)
    args = train.parse(flags(tmp_path, **changes))
    examples = SOURCES[source](args).prepare(sd, tmp_path, "the teacher", Ranks())
    assert (examples.seed, examples.weighting, examples.batch_size) == (5, "min-snr", 4)
    shards = list(tmp_path.glob("*.safetensors"))
    made_with = [json.loads(read_shard(shard)[1]) for shard in shards]
    assert len(shards) == 8 / 2 and all((x["seed"], x["guidance"], x["steps"]) == (5, 3, 3) for x in made_with)


@pytest.mark.parametrize("source, states", [("trajectories", {"z_t", "target"}), ("noised", set())])
def test_shards_hold_states_or_ends_alone(
    source: str, states: set[str], command, flags, tiny_model: Path, prompts_file: Path, tmp_path: Path
):
    """And no shard holds a held-out prompt."""
    assert command("train.py", *flags(tmp_path / "run", source=source, steps=1), "--no-report").code == 0
    shards = [load_file(file) for file in (tmp_path / "run/states").glob("*.safetensors")]
    assert shards and all(set(shard) == {"z_0", "prompt", "t"} | states for shard in shards)
    captions, held_out = prompt_split(tiny_model, prompts_file)
    learned = {captions[i] for shard in shards for i in shard["prompt"]}
    assert len(learned) == 8 and not learned & set(held_out)
