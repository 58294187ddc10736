"""Dial, spectrum, sweeps, the summary, and make.sh, which makes results/."""

import json
import os
import shlex
import shutil
import signal
import subprocess
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import ROOT, fill_up, randn

from minidistill import CheckpointError, StableDiffusion, inject_lora, load, load_lora, save_lora
from minidistill.bench.__main__ import COMMANDS as BENCH_COMMANDS
from minidistill.bench.output import save_so_far
from minidistill.config import ScheduleConfig
from minidistill.data.prompts import prompt_split, spread
from minidistill.data.trajectories import generate
from minidistill.distill import few_step_weight
from minidistill.evaluate import dial, few_step_ways, noise_error_share, spectrum, sweeps
from minidistill.evaluate.__main__ import COMMANDS, main
from minidistill.evaluate.few_step_ways import Lesson
from minidistill.evaluate.metrics import EVALUATION_SEED, psnr
from minidistill.evaluate.summary import MEASURES, summary
from minidistill.formats.lora_formats import read_lora
from minidistill.formats.lora_io import merge_file
from minidistill.formats.merged_checkpoint import replaced_by, write_checkpoint
from minidistill.formats.tensor_files import read_tensors, write_tensors
from minidistill.lora import lora_layers, lora_parameters
from minidistill.schedule import Schedule, add_noise

LEARNED = dict(base="tiny", guidance="3", negative_prompt="a cat", method="trajectories")


@pytest.fixture
def lora(sd: StableDiffusion, tmp_path: Path) -> Path:
    """A LoRA that leads a little towards the guided prediction; with the other sign it leads away."""
    torch.manual_seed(1)  # of lora_down: with other seeds it leads away
    unet = fill_up(inject_lora(sd.unet, rank=2))
    for layer in lora_layers(unet).values():
        layer.lora_up.data.neg_()
    save_lora(unet, tmp_path / "lora.safetensors", LEARNED)
    return tmp_path / "lora.safetensors"


def test_the_dial(lora: Path, tiny_model: Path, tmp_path: Path):
    before = read_tensors(lora)
    flags = f"--write --model {tiny_model} --guidance 2.5 2 --prompts 3 --steps 2 --out {tmp_path}/dial"
    main(["dial", str(lora), *flags.split()])
    row, other = json.loads((tmp_path / "dial/dial.json").read_text())["rows"]
    assert [(x["guidance"], x["nominal"]["strength"]) for x in (row, other)] == [(2, 0.5), (2.5, 0.75)]

    def share(strength: float, prompts: list[str], guidance: float = 2) -> float:
        sd = load(tiny_model)
        sd.unet = load_lora(sd.unet, lora, strength)
        return noise_error_share(sd, spread(prompts, 3), guidance=guidance, steps=2, negative_prompt="a cat").pooled

    training, held_out = prompt_split(tiny_model)
    for measured in (row["nominal"], row["measured"], other["nominal"]):
        expected = share(measured["strength"], held_out, 2.5 if measured is other["nominal"] else 2)
        assert measured["noise error share"]["value"] == pytest.approx(expected, rel=1e-4)
    # Measured on the training prompts: better there than the nominal strength, and than a little more or less.
    strength = row["measured"]["strength"]
    assert share(strength, training) < min(share(x, training) for x in (0.5, strength - 0.05, strength + 0.05))
    assert all(Image.open(tmp_path / "dial" / name).size[0] > 0 for name in ("dial.png", "dial-pictures.png"))

    tensors, metadata = read_tensors(lora)
    assert metadata == before[1] | {"dial": f"2:{strength:.4g} 2.5:{other['measured']['strength']:.4g}"}
    assert tensors.keys() == before[0].keys() and all(torch.equal(tensors[name], before[0][name]) for name in tensors)


def test_a_dial_that_is_stopped_keeps_its_rows(
    lora: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stopped(*_: object, guidance: float, **__: object) -> float:
        if guidance > 2:
            raise KeyboardInterrupt
        return 0.5

    monkeypatch.setattr(dial, "nearest_strength", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(f"dial {lora} --model {tiny_model} --guidance 2 2.5 --prompts 2 --steps 2 --out {tmp_path}".split())
    (row,) = json.loads((tmp_path / "dial.json").read_text())["rows"]
    assert row["guidance"] == 2
    assert all(Image.open(tmp_path / name).size[0] > 0 for name in ("dial.png", "dial-pictures.png"))  # of these rows


def test_a_dial_that_goes_back_is_not_written(lora: Path):
    before = lora.read_bytes()
    for points in ([(2, -0.1)], [(1.5, 0.4), (2, 0.3)], [(2, 1.1)]):
        with pytest.raises(ValueError, match="do not grow with guidance"):
            dial.write_dial(read_lora(lora), points)
    assert lora.read_bytes() == before


def test_progressive_distillation_ends_at_the_students_steps(monkeypatch: pytest.MonkeyPatch):
    taught = []
    monkeypatch.setattr(few_step_ways, "fit", lambda unet, stage, loss: taught.append(loss.args[0]))
    lesson = Lesson(Schedule.from_config(ScheduleConfig()), torch.zeros(2, 4, 1, 1, 1), None, None, 4.0, 300)
    few_step_ways.learn_progressively(None, lesson)
    assert taught == [12, 6, 3]


def learn_from(lora: Path, **teacher: str) -> None:
    """Let the header name this teacher, as train.py does: by default with the empty prompt."""
    tensors, metadata = read_tensors(lora)
    write_tensors(lora, tensors, metadata | dict(negative_prompt="") | teacher)


def merged(model: Path, *loras: tuple[Path, float]) -> StableDiffusion:
    """The model with these LoRAs in W, each at its strength."""
    sd = load(model)
    for path, strength in loras:
        merge_file(sd.unet, read_lora(path, strength))
    return sd


ON_TOP = "on-top-of-the-one-pass-student"
SAMPLED = dict(seed=EVALUATION_SEED, spacing="trailing")


@pytest.mark.parametrize(
    "change",
    [
        dict(guidance="3"),
        dict(negative_prompt="a cat"),
        dict(interval="2 501"),
        dict(teacher_lora="ink:1"),
        dict(prediction="v"),
    ],
)
@pytest.mark.parametrize("command", ["few-steps", "steering"])
def test_few_steps_of_another_teacher_are_refused(
    command: str, change: dict, lora: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The students would be compared with a teacher that they did not learn from."""
    learn_from(lora, **dict(guidance="4") | change)
    monkeypatch.setattr(few_step_ways, "generate", lambda *_, **__: pytest.fail("the teacher samples"))
    with pytest.raises(ValueError, match="lora.safetensors( learned from a| was distilled from a)"):
        main([command, "--model", str(tiny_model), "--one-pass", str(lora), "--out", str(tmp_path)])


def test_ways_to_learn_few_steps(lora: Path, tiny_model: Path, tmp_path: Path, capsys):
    """Each learns something of its own from the same trajectories; none that is finished is repeated."""
    learn_from(lora, guidance="4")
    ways = ["train.py", "on top of the one-pass student", "own states", "consistency distillation"]
    ways += ["through all steps", "begun from the one-pass student", "progressive distillation"]
    ways += ["one LoRA for 1, 2, 4 and 8 steps", "no guidance"]
    flags = f"few-steps --model {tiny_model} --one-pass {lora} --out {tmp_path} --teacher-steps 8 --trajectories 8"
    flags = f"{flags} --updates 2 --rank 2 --prompts 2 --each 2".split()
    main([*flags, "--ways", *ways])
    report = json.loads((tmp_path / "few-steps-2.json").read_text())
    rows = {row["way"]: row for row in report["rows"]}
    assert list(rows) == ["teacher, 8 steps", "teacher", "one-pass student", *ways]
    assert [row["calls"] for row in rows.values()] == [16, 4, 2, *[2] * len(ways)]
    assert list(rows["teacher, 8 steps"]["measures"]["sharpness"].values()) == [1, 1, 1]  # whichever prompts are drawn
    files = sorted(tmp_path.glob("*-*.safetensors"))
    assert len({file.read_bytes() for file in files}) == len(files) == len(ways) - 1  # no guidance learns nothing
    assert [file.name for file in files if file.name[0] != "2"] == ["8-one-lora-for-1-2-4-and-8-steps.safetensors"]
    assert Image.open(tmp_path / "few-steps-2.png").size[0] > 0

    prompts = [prompt for prompt in spread(prompt_split(tiny_model)[1], 2) for _ in range(2)]
    teacher = load(tiny_model).sample(prompts, steps=8, guidance=4, **SAMPLED)
    on_top, consistent = (tmp_path / f"2-{way}.safetensors" for way in (ON_TOP, "consistency-distillation"))
    sampled = {  # two LoRAs at once, and z_0 noised afresh
        ways[1]: merged(tiny_model, (lora, 1), (on_top, 1)).sample(prompts, steps=2, guidance=1, **SAMPLED),
        ways[3]: few_step_ways.sample_renoised(merged(tiny_model, (consistent, 1)), prompts, 2),
    }
    for way, images in sampled.items():
        expected = psnr(images, teacher).mean().item()
        assert rows[way]["measures"]["PSNR"]["value"] == pytest.approx(expected, rel=1e-3)

    before = [file.stat().st_mtime_ns for file in files]
    tensors, metadata = read_tensors(tmp_path / "2-train-py.safetensors")
    taught = dict(guidance="4", student_steps="2", teacher_steps="8")
    write_tensors(tmp_path / "taught.safetensors", tensors, metadata | taught)
    more = ["--loras", str(tmp_path / "taught.safetensors")]
    main([*flags, *more, "--ways", "train.py", "consistency distillation"])
    assert [file.stat().st_mtime_ns for file in files] == before
    again = json.loads((tmp_path / "few-steps-2.json").read_text())["rows"]
    assert again[4:] == [rows["train.py"], rows["consistency distillation"]]
    assert again[3]["way"] == "taught" and again[3]["measures"] == rows["train.py"]["measures"]
    measured = (tmp_path / "few-steps-2.json").read_bytes()
    with pytest.raises(ValueError, match="2-train-py.safetensors was trained with other settings"):
        main([*flags, "--updates", "3", "--ways", "train.py"])
    assert (tmp_path / "few-steps-2.json").read_bytes() == measured
    with pytest.raises(ValueError, match="two would have the same name in the table \\(taught, taught\\)"):
        main([*flags, *more, str(tmp_path / "taught.safetensors")])
    with pytest.raises(ValueError, match="taught.safetensors is no student that takes as many steps as its teacher"):
        main([*flags, "--one-pass", str(tmp_path / "taught.safetensors")])
    with pytest.raises(ValueError, match="taught.safetensors has not learned 4 steps at guidance 4"):
        main([*flags, *more, "--student-steps", "4", "--ways", "train.py"])
    with pytest.raises(ValueError, match="--weights float8"):
        main([*flags, "--weights", "float8"])
    with pytest.raises(ValueError, match="3 steps must divide both 8"):
        main([*flags, "--student-steps", "3", "4", "--ways", "one LoRA for 1, 2, 4 and 8 steps"])


def test_steering_few_steps(lora: Path, tiny_model: Path, tmp_path: Path):
    """At the guidance that was learned, "coupled" is the way as it is; LoRAs that add differ from it at another."""
    learn_from(lora, guidance="3", dial="2:0.3")
    flags = f"--model {tiny_model} --one-pass {lora} --out {tmp_path} --student-steps 2 --teacher-steps 4 --guidance 3"
    flags = f"{flags} --trajectories 8 --updates 2 --rank 2 --prompts 2 --each 2".split()
    with pytest.raises(ValueError, match="--scales: each must be above 1"):
        main(["steering", *flags, "--scales", "1", "3"])
    main(["steering", *flags, "--scales", "2", "3"])
    rows = json.loads((tmp_path / "steering-2.json").read_text())["rows"]
    names = ["teacher, 4 steps", "teacher", "coupled", "added", "one-pass student"]
    assert [row["way"] for row in rows] == [f"w = {w}: {name}" for w in (2, 3) for name in names]
    assert [row["calls"] for row in rows] == 2 * [8, 4, 2, 2, 2]
    main(["few-steps", *flags, "--ways", "train.py", "on top of the one-pass student"])
    unsteered = {row["way"]: row for row in json.loads((tmp_path / "few-steps-2.json").read_text())["rows"]}
    assert rows[7]["measures"] == unsteered["train.py"]["measures"]
    assert rows[8]["measures"] == unsteered["on top of the one-pass student"]["measures"]
    coupled, on_top = (tmp_path / f"2-{way}.safetensors" for way in ("train-py", ON_TOP))
    steered = [], [(coupled, 0.5)], [(lora, 0.3), (on_top, 1)], [(lora, 0.3)]  # at w = 2, by the dial
    prompts = [prompt for prompt in spread(prompt_split(tiny_model)[1], 2) for _ in range(2)]
    teacher = load(tiny_model).sample(prompts, steps=4, guidance=2, **SAMPLED)
    for row, loras in zip(rows[1:5], steered, strict=True):
        images = merged(tiny_model, *loras).sample(prompts, steps=2, guidance=1 if loras else 2, **SAMPLED)
        assert row["measures"]["PSNR"]["value"] == pytest.approx(psnr(images, teacher).mean().item(), rel=1e-3)
    assert Image.open(tmp_path / "steering-2.png").size[0] > 0


def test_steering_starts_from_a_student_that_has_a_dial(lora: Path, tiny_model: Path, tmp_path: Path):
    learn_from(lora, guidance="4", student_steps="2", teacher_steps="4")
    with pytest.raises(ValueError, match="lora.safetensors: it must be a one-pass student that has learned guidance 4"):
        main(["steering", "--model", str(tiny_model), "--one-pass", str(lora), "--out", str(tmp_path)])


def test_the_first_way_is_train_pys(sd: StableDiffusion, tmp_path: Path):
    """From z_t to the stored z_s: its gradient is that of the loss in train.py, but for a factor."""
    captions, steps = ["a cat", "a dog"], torch.tensor([0, 1])
    args = Namespace(trajectories=2, teacher_steps=4, guidance=3.0, updates=1, rank=2, weights=None, out=tmp_path)
    lesson = few_step_ways.read_lesson(sd, captions, args, steps=2)
    unet = fill_up(inject_lora(sd.unet, rank=2))
    stored = generate(sd, captions, tmp_path / "states-2", count=2, steps=4, guidance=3.0, student_steps=2)
    z_t, target, t = stored.states(torch.arange(2), steps)
    weight = few_step_weight(sd.schedule, 2)[steps].view(-1, 1, 1, 1)
    (weight * (unet(z_t, t, lesson.cond, lora_enabled=True) - target).square()).mean().backward()
    expected = [p.grad.clone() for p in lora_parameters(unet)]
    unet.zero_grad()
    z_s = lesson.k[steps] * z_t + lesson.q[steps] * target
    assert (z_s - lesson.z[torch.arange(2), steps + 1]).abs().max() < 2e-3 * z_s.abs().max()  # stored in half precision
    F.mse_loss(lesson.step(unet, z_t, lesson.cond, steps), z_s).backward()
    for p, grad in zip(lora_parameters(unet), expected):
        assert (p.grad / lesson.q.square().mean() - grad).abs().max() < 1e-4 * grad.abs().max()


def test_a_constant_prediction_is_perfect_in_every_way(sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch):
    """From wherever DDIM starts, it then leads to the same place in steps of any number and length."""
    unet, z_0, cond = inject_lora(sd.unet, rank=2), randn(3, 4, 8, 8), sd.encode_prompt(["a cat", "a dog", "a pear"])
    torch.nn.init.zeros_(unet.conv_out.weight)
    eps = torch.nn.init.normal_(unet.conv_out.bias).view(4, 1, 1).expand_as(z_0)
    times = [*sd.schedule.timesteps(8, "trailing"), -1]
    z = torch.stack([add_noise(sd.schedule, z_0, eps, torch.tensor([t])) for t in times], 1)
    lesson = Lesson(sd.schedule, z, cond, sd.encode_negative(), guidance=4.0, updates=1)
    losses = [few_step_ways.one_step, few_step_ways.own_states, few_step_ways.through_all_steps]
    losses += [few_step_ways.any_number_of_steps]
    losses += [partial(few_step_ways.two_steps_in_one, 4, before) for before in (None, unet)]
    monkeypatch.setattr(few_step_ways, "fit", lambda unet, lesson, loss: losses.append(loss))
    few_step_ways.learn_consistency(unet, lesson)
    for loss, seed in product(losses, range(4)):
        assert loss(unet, lesson, z, cond, torch.Generator().manual_seed(seed)) < 1e-6


def test_spectrum_of_a_student_that_is_the_lora(lora: Path, tiny_model: Path, tmp_path: Path):
    """A full student equal to W plus a LoRA of rank 2: its change has two ranks, and is the LoRA's change."""
    learn_from(lora, **LEARNED, alpha="1")
    unet, file = load(tiny_model).unet, read_lora(lora)
    merge_file(unet, file)
    write_checkpoint(tiny_model, replaced_by(unet), tmp_path / "full/student", LEARNED)
    flags = [tmp_path / "full", lora, "--model", tiny_model, "--out", tmp_path / "out"]
    main(["spectrum", *map(str, flags)])
    rows = json.loads((tmp_path / "out/spectrum.json").read_text())["rows"]
    assert {row["layer"] for row in rows} == set(file.layers)
    for row in rows:
        assert row["held"]["full"][1] > 1 - 1e-6 > row["held"]["full"][0] and row["cosine"] > 1 - 1e-6
        assert row["norm"]["full"] == pytest.approx(row["norm"]["lora"], rel=1e-4)
    assert Image.open(tmp_path / "out/spectrum.png").size[0] > 0
    with pytest.raises(ValueError, match="no run of --method full"):
        main(["spectrum", *map(str, [tmp_path, *flags[1:]])])
    other = LEARNED | dict(prediction="v")
    write_checkpoint(tiny_model, replaced_by(unet), tmp_path / "v/student", other, prediction="v")
    with pytest.raises(CheckpointError, match="v/student learned from a model that predicts v"):
        main(["spectrum", *map(str, [tmp_path / "v", *flags[1:]])])
    learn_from(lora, **other)
    with pytest.raises(CheckpointError, match="lora.safetensors learned from a model that predicts v"):
        main(["spectrum", *map(str, flags)])
    learn_from(lora, **other | dict(guidance="2"))
    with pytest.raises(ValueError, match="from one teacher"):
        main(["spectrum", *map(str, flags)])


def test_the_table_of_spectra():
    held = {"full": [0.1, 0.3], "lora": [0.5, 1.0]}
    rows = [dict(held={name: [x] * 8 for name, x in zip(held, pair)}, cosine=pair[0]) for pair in zip(*held.values())]
    text = spectrum.table(rows)
    assert "20% (12% to 28%) |" in text and text.index("20%") < text.index("75% (55% to 95%)")
    assert "0.20 (0.12 to 0.28)" in text


def test_share_by_rank_is_the_square_of_the_best_approximation():
    change = randn(6, 9, dtype=torch.float64)
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    for rank in (1, 3, 6):
        best = u[:, :rank] * s[:rank] @ v[:rank]
        missed = (change - best).square().sum() / change.square().sum()
        assert spectrum.share_by_rank(change)[rank - 1] == pytest.approx(1 - missed.item(), abs=1e-9)


def test_a_sweep(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sweeps, "VALUES", {"layers": ("attention",)})
    flags = f"sweeps layers --model {tiny_model} --trajectories 16 --updates 2 --prompts 2 --rank 1 --guidance 3"
    flags = [*flags.split(), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    main(flags)
    (row,) = json.loads((tmp_path / "out/sweeps.json").read_text())["layers"]["rows"]
    run = next((tmp_path / "runs").glob("rank 1*/lora.safetensors"))
    sd = load(tiny_model)
    unet = load_lora(sd.unet, run)
    assert all(".attn" in name for name in lora_layers(unet)) and row["value"] == "attention"
    assert row["parameters"] == sum(p.numel() for p in unet.parameters() if p.requires_grad)
    sd.unet, prompts = unet, spread(prompt_split(tiny_model)[1], 2)
    share = noise_error_share(sd, prompts, steps=25, guidance=3).pooled
    assert row["noise error share"]["value"] == pytest.approx(share, rel=1e-4)
    assert Image.open(tmp_path / "out/sweep-layers.png").size[0] > 0
    monkeypatch.setattr(sweeps, "train_and_measure", lambda *_: pytest.fail("done again"))
    main(flags)
    with pytest.raises(pytest.fail.Exception, match="done again"):
        main([*flags, "--prompts", "3"])
    monkeypatch.setattr(sweeps, "teacher_fingerprint", lambda sd: "other weights, of the same name")
    with pytest.raises(pytest.fail.Exception, match="done again"):
        main(flags)
    with pytest.raises(ValueError, match="no sweep called colour"):
        main(["sweeps", "colour"])


STOPPED = """
import os, pathlib, signal, sys, time
def save(*_):
    time.sleep(0.5)
    pathlib.Path(sys.argv[1]).touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, save)
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""


def test_a_sweep_that_is_stopped_lets_its_run_save(tmp_path: Path):
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as in one_line_errors
    try:
        with pytest.raises(KeyboardInterrupt):
            sweeps.train_and_measure(Namespace(), ["-c", STOPPED, str(tmp_path / "checkpoint")])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "checkpoint").exists()


def test_equal_settings_give_equal_commands(train):
    parser = ArgumentParser()
    sweeps.add_flags(parser)
    args = parser.parse_args([])
    default = sweeps.train_command(args)
    assert sweeps.train_command(args, rank=args.rank) == sweeps.train_command(args, updates=args.updates) == default
    assert sweeps.train_command(args, rank=args.rank + 1) != default
    names = dict(layers="targets", updates="steps")  # in train.py
    for sweep, value in [(sweep, value) for sweep, values in sweeps.VALUES.items() for value in values]:
        learned = vars(train.parse(sweeps.train_command(args, **{sweep: value})[1:]))
        assert learned[names.get(sweep, sweep)] == (sweeps.LAYERS[value] if sweep == "layers" else value)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """results/make.sh in a separate folder, with a fake python that only records its arguments.

    ``make(fails="dial")`` fails in commands that contain the word. ``make.ran()`` lists the commands so far.
    """
    (tmp_path / "bin").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "weights/pocket-emoji").mkdir(parents=True)
    for name in ("guidance", "fewstep"):
        (tmp_path / f"weights/pocket-emoji/{name}-lora.safetensors").write_bytes(b"one")
    shutil.copy(ROOT / "results/make.sh", tmp_path / "results")
    fake = tmp_path / "bin/python"
    fake.write_text('#!/bin/sh\necho "$*" >> ran\ncase "$*" in *"$FAILS"*) exit 1;; esac\n')
    fake.chmod(0o755)

    def run(fails: str = "nothing at all") -> subprocess.CompletedProcess:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        command = ["bash", "results/make.sh"]
        environment = os.environ | {"PATH": path, "FAILS": fails}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    run.ran = lambda: (tmp_path / "ran").read_text().splitlines()
    return run


needs_bash = pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")


@needs_bash
def test_make_resumes_where_it_stopped(make: Callable[..., subprocess.CompletedProcess], tmp_path: Path):
    stopped = make(fails="evaluate dial")
    before = len(make.ran())
    assert stopped.returncode and "the dial" in stopped.stdout and "evaluate dial" in make.ran()[-1]
    assert make().returncode == 0
    again = make.ran()[before:]
    assert not any("train.py" in line or "evaluate quality" in line for line in again)
    assert any("evaluate dial" in line for line in again) and again[-1] == "-m minidistill.evaluate summary"
    checks = [line for line in again if line.startswith("-c")]
    before = len(make.ran())
    assert make().returncode == 0
    assert make.ran()[before:] == [*checks, "-m minidistill.evaluate summary"]  # every step is done
    for name in ("guidance", "fewstep"):
        (tmp_path / f"weights/pocket-emoji/{name}-lora.safetensors").write_bytes(b"another")
        before = len(make.ran())
        make()
        assert len(make.ran()) - before > 10


@needs_bash
@pytest.mark.parametrize("missing", ["diffusers", "find_emoji"])
def test_make_checks_requirements_before_hours_of_work(missing: str, make: Callable[..., subprocess.CompletedProcess]):
    assert make(fails=missing).returncode and missing in make.ran()[-1]
    assert all(line.startswith("-c") for line in make.ran())


@needs_bash
def test_make_runs_existing_commands(make: Callable[..., subprocess.CompletedProcess]):
    """The evaluate and bench commands in make.sh exist, with their flags."""
    make()
    commands = {"minidistill.evaluate": COMMANDS, "minidistill.bench": BENCH_COMMANDS}
    modules = [shlex.split(line)[1:] for line in make.ran() if line.startswith("-m ")]
    assert {name for _, name, *_ in modules} == {"quality", "dial", "spectrum", "summary", "memory", "speed"}
    for module, name, *words in modules:
        parser = ArgumentParser()
        commands[module][name].add_flags(parser)
        parser.parse_args(words)


def interval(value: float) -> dict[str, float]:
    return dict(value=value, low=value - 0.1, high=value + 0.1)


def write(folder: Path, name: str, report: dict) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(report | {"command": f"makes {name}", "commit": "abc"}))


def test_the_summary(tmp_path: Path):
    """Where each figure comes from, on small made-up files."""
    measures = {title: interval(i) for i, title in enumerate(MEASURES.values())}
    rows = [{"method": name} | measures for name in ("teacher", "no guidance")]
    for row in rows:
        row.pop("noise error share")  # it is not measured for these two
    write(tmp_path, "evaluation/results.json", {"rows": [*rows, {"method": "guidance-lora"} | measures]})
    write(tmp_path, "memory.json", {"sizes": {"sd15": {"batch": 1}}})
    for size in ("pocket", "sd15"):
        write(tmp_path, f"memory-{size}.json", {"sizes": {size: {"batch": 2}}})
    timed = {
        "unet_compiled": {"peer_s": 4.0, "ours_to_peer": 0.5},  # its memory is not measured
        "guided": {"turns_s": {"ours": [3.0, 4.0, 9.0]}, "peer_s": None},
        "merged": {"turns_s": {"ours": [1.0, 2.0, 3.0]}, "to_guided": 0.51, "peer_s": None},
        "trajectories": {"ours_s": 2.0, "ours_bytes": 6, "peer_s": 4.0, "peer_bytes": 8, "ours_to_peer": 0.5},
        "noised": {"ours_s": 5.0, "ours_bytes": 9, "peer_s": 10.0, "peer_bytes": 12, "ours_to_peer": 0.5},
    }
    for size in ("pocket", "sd15"):
        write(tmp_path, f"bench-{size}.json", {"sizes": {size: {"rows": timed}}})

    found = summary(tmp_path)
    source = {"command": "makes evaluation/results.json", "commit": "abc"}
    student = {name: interval(i) for i, name in enumerate(MEASURES)}
    zero, one = (dict(value=x, low=x, high=x) for x in (0.0, 1.0))
    assert found["student"] == student | source
    assert found["teacher"] == student | source | {"noise_error_share": zero}
    assert found["unguided"] == student | source | {"noise_error_share": one}
    assert (found["time"]["unet_ratio"], found["time"]["picture_ratio"]) == (0.5, 0.51)
    assert found["memory"]["sd15"] == {"batch": 1}
    measured = {"batch": 2, "command": "makes memory-pocket.json", "commit": "abc"}
    assert found["memory"]["measured"]["pocket"] == measured
    peers = found["peers"]["sd15"]
    assert peers["unet_compiled"] == {"time": 0.5} and peers["noised"] == {"time": 0.5, "memory": 0.75}
    assert peers["trajectories to the peer's teacher in the loop"] == {"time": 0.2, "memory": 0.5}
    assert all(part["commit"] == "abc" for part in (found["time"], found["memory"], peers))


def test_a_summary_needs_the_student_and_its_measures(tmp_path: Path):
    rows = [{"method": name} for name in ("teacher", "no guidance", "guidance-lora")]
    for name in ("evaluation/results", "memory", "memory-pocket", "memory-sd15", "bench-pocket", "bench-sd15"):
        write(tmp_path, f"{name}.json", {"rows": rows, "sizes": {}})
    with pytest.raises(ValueError, match="guidance-lora with .*identity by template"):
        summary(tmp_path)


@pytest.mark.parametrize("name", ["memory", "memory-sd15", "bench-pocket"])
def test_a_benchmark_that_was_stopped_is_not_summarized(name: str, tmp_path: Path):
    shutil.copytree(ROOT / "results", tmp_path, dirs_exist_ok=True)
    save_so_far(json.loads((tmp_path / f"{name}.json").read_text()), tmp_path / f"{name}.json")
    with pytest.raises(ValueError, match=f"{name}.json was stopped before its end: run python -m minidistill."):
        summary(tmp_path)


def test_summary_json_fits_the_files_beside_it():
    assert json.loads((ROOT / "results/summary.json").read_text()) == summary(ROOT / "results")
