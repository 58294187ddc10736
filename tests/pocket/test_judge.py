"""pocket/judge.py: samples and judges each method, keeps images and captions together, and its totals are right."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import FEW, FEW_PAIRS, flat

from minidistill.config import ScheduleConfig
from minidistill.evaluate.students import Student, Teacher
from minidistill.pocket import judge
from minidistill.pocket.compositions import COLOURS, THINGS, all_compositions, write_compositions
from minidistill.pocket.images import render
from minidistill.schedule import Schedule


def test_a_swapped_pair_is_wrong(renderer, emoji, monkeypatch):
    monkeypatch.setattr(judge, "identity_by_classifier", lambda seen, _: judge.identity_by_template(seen, *rest))
    images = render(renderer, FEW_PAIRS, 2, seed=5)
    for version, right in ((images, 1.0), (torch.cat([images[..., 32:], images[..., :32]], -1), 0.0)):
        rest = judge.border_colour(version).repeat_interleave(2, 0), judge.templates(emoji)
        judged = judge.judge(version, FEW_PAIRS, None, judge.templates(emoji))
        assert judged["background"].mean() == 1
        assert judged["all right"].mean() == judged["identity by template"].mean() == right


def test_mean_distance_is_within_compositions():
    images = flat([(0, 0, 0), (51, 51, 51), (255, 255, 255), (255, 255, 255)], side=8)
    assert judge.mean_distance(images, each=2) == pytest.approx(0.1)


class Sampler:
    """In place of StableDiffusion: takes down how it is asked to sample."""

    unet, schedule, device = object(), Schedule.from_config(ScheduleConfig()), torch.device("cpu")

    def __init__(self):
        self.calls = []

    def sample(self, prompts, **options):
        asked = ("steps", "guidance", "lora_enabled", "negative_prompt", "spacing")
        self.calls.append(tuple(options[name] for name in asked))
        return [Image.new("RGB", (64, 64)) for _ in prompts]


@pytest.fixture
def sampled(monkeypatch):
    """Calls ``sample_all`` with students of one teacher; returns the rows and the calls."""

    def sampled(*few_steps, teacher=None, guidance=None):
        taught = {f"run {i}": Student(Path(), teacher, lambda sd: None, few) for i, few in enumerate(few_steps)}
        sd = Sampler()
        fakes = dict(load=lambda *_, **options: sd, read_students=lambda runs, args: taught, merge_to_sample=id)
        for name, fake in fakes.items():
            monkeypatch.setattr(judge, name, fake)
        args = judge.read_flags(["--batch", "4", *(["--guidance", str(guidance)] if guidance else [])])
        return list(judge.sample_all(args, ["a cat", "a dog"])), sd.calls

    return sampled


def test_teacher_and_students_are_sampled_as_they_were_taught(sampled):
    rows, calls = sampled(None, (2, 24), teacher=Teacher(3.0, "blurry"))
    assert rows == ["teacher, guidance 3", "no guidance", "student, run 0", "student, run 1"]
    # The students have learned to avoid the negative prompt: they are not told again.
    assert calls[:2] == [(25, 3, False, "blurry", None), (25, 1, False, "blurry", None)]
    assert calls[2:] == [(25, None, True, None, None), (2, None, True, None, "trailing")]


def test_guidance_without_a_lora(sampled):
    assert sampled()[0] == ["teacher, guidance 4", "no guidance"]
    assert sampled(guidance=2.0)[0] == ["teacher, guidance 2", "no guidance"]


def test_measures_and_renders_keep_the_order_of_the_captions(emoji, monkeypatch):
    """Single things and pairs in turn."""
    monkeypatch.setattr(judge, "PACKAGE", emoji)
    monkeypatch.setattr(judge, "load_classifier", lambda work, emoji: None)
    monkeypatch.setattr(judge, "identity_by_classifier", lambda seen, _: torch.zeros(len(seen), dtype=torch.int64))
    captions = [c.caption for pair in zip(FEW[:4], FEW_PAIRS) for c in pair]
    images = torch.stack([torch.from_numpy(np.array(x)) for x in judge.rendered(captions, 64)]).permute(0, 3, 1, 2)
    images[2:4] = 0
    assert judge.measures(images, captions)["identity by template"].tolist() == [1, 1, 0, 0, 1, 1, 1, 1]


def test_held_out():
    every = [c for c in all_compositions() if c.held_out]
    assert judge.held_out(all_compositions()) == every
    assert len(set(judge.held_out(all_compositions(), 10))) == 10
    assert judge.held_out(all_compositions(), 10_000) == every
    with pytest.raises(ValueError, match="unicorn fish"):
        judge.compositions_of(["a unicorn fish on a red background"])


def test_main_judges_each_kind_and_writes(tmp_path, monkeypatch, capsys):
    """On flat images: those of the teacher have the caption's background, the others are red."""
    write_compositions(tmp_path / "compositions.json", all_compositions())
    held_out = [c for c in all_compositions() if c.held_out]
    drawn = flat([c.rgb for c in held_out for _ in range(2)])
    red = flat([COLOURS["red"]]).expand_as(drawn)
    rgb = {c.caption: c.rgb for c in held_out}
    fakes = dict(
        sample_all=lambda args, prompts: {"teacher": flat([rgb[p] for p in prompts]), "no guidance": red},
        load_classifier=lambda work, emoji: None,
        templates=lambda emoji: None,
        Renderer=lambda emoji: None,
        identity_by_template=lambda seen, backgrounds, stamps: torch.zeros(len(seen), dtype=torch.int64),
        identity_by_classifier=lambda seen, classifier: torch.ones(len(seen), dtype=torch.int64),
        render=lambda renderer, compositions, each, seed: drawn,
    )
    for name, fake in fakes.items():
        monkeypatch.setattr(judge, name, fake)
    out = tmp_path / "results" / "pocket.json"
    judge.main(["--model", str(tmp_path), "--seeds", "2", "--out", str(out), "--steps", "3"])

    numbers = json.loads(out.read_text())
    rows = {(r["method"], r["things"]): r for r in numbers["rows"]}
    methods = ["teacher", "no guidance", "rendered"]
    assert list(rows) == [(method, things) for things in ("one", "two") for method in methods]
    for length, things in ((1, "one"), (2, "two")):
        some = [c for c in held_out if len(c.emoji) == length]
        assert rows["teacher", things]["background"]["value"] == 1
        share = sum(c.colour == "red" for c in some) / len(some)
        assert rows["no guidance", things]["background"]["value"] == pytest.approx(share)
        rendered = rows["rendered", things]
        first = sum(set(c.emoji) == {list(THINGS)[0]} for c in some) / len(some)
        assert rendered["identity by template"]["value"] == pytest.approx(first)
        assert rendered["all right"]["value"] == 0 and len(rendered["wrong"]) == len(some)
        assert rendered["distance over seeds"] == 0
    assert "--seeds 2" in numbers["command"]
    assert "| rendered | two |" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--steps", "--seeds", "--limit", "--batch"])
def test_a_number_below_one_is_refused_by_its_flag(flag, capsys):
    with pytest.raises(SystemExit):
        judge.main([flag, "0"])
    assert f"argument {flag}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, complaint",
    [("--check --lora runs/a-run", "leave out --lora"), ("--seeds 1", "--seeds must be at least 2")],
)
def test_flags_that_cannot_be_followed_are_refused(flags: str, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        judge.main(flags.split())
