"""The quality command: its measures agree with known values, and it measures every method."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ROOT, error, tiny_student
from torch import Tensor, nn

from minidistill import CheckpointError, StableDiffusion, inject_lora, load, load_lora, save_lora
from minidistill.conditioning import Conditioning
from minidistill.config import ScheduleConfig
from minidistill.evaluate import ClipScore, comparison_grid, draw, estimate, metrics, noise_error_share, psnr
from minidistill.evaluate.__main__ import main
from minidistill.evaluate.metrics import EVALUATION_SEED, frechet_distance, frechet_interval, ssim
from minidistill.evaluate.quality import model_stamp
from minidistill.evaluate.tables import markdown_table
from minidistill.formats.merged_checkpoint import replaced_by, write_checkpoint
from minidistill.guidance import Interval
from minidistill.schedule import Schedule

PROMPTS = ["a red apple", "a green pear", "a rocket on a purple background"]
GUIDANCE = 4.0
ALWAYS = Interval(0, 1000)


class Imitation(nn.Module):
    """A UNet whose student learned the share ``learned`` of the guidance away from ``uncond``, inside ``interval``."""

    def __init__(self, sd: StableDiffusion, learned: float, negative_prompt: str = "", interval: Interval = ALWAYS):
        super().__init__()
        self.config, self.learned, self.interval = sd.unet_config, learned, interval
        self.uncond = nn.Parameter(sd.encode_prompt([negative_prompt]).tokens, requires_grad=False)

    def forward(self, z_t: Tensor, t: Tensor, cond: Conditioning, lora_enabled: bool = False) -> Tensor:
        def eps(c: Tensor) -> Tensor:
            return 0.3 * torch.tanh(z_t * c.flatten(1).std(1)[:, None, None, None] + c[:, -1, :4, None, None])

        eps_cond, eps_uncond = eps(cond.tokens), eps(self.uncond.expand_as(cond.tokens))
        learned = self.learned * self.interval.includes(t)[:, None, None, None]
        return eps_cond + learned * (GUIDANCE - 1) * (eps_cond - eps_uncond) if lora_enabled else eps_cond


@pytest.mark.parametrize("learned, expected", [(1.0, 0.0), (0.0, 1.0), (0.5, 0.25), (-1.0, 4.0)])
def test_noise_error_share(learned: float, expected: float, sd: StableDiffusion):
    sd.unet = Imitation(sd, learned)
    share = noise_error_share(sd, PROMPTS, steps=4, guidance=GUIDANCE, batch=2)
    assert abs(share.pooled - expected) < 1e-5
    assert share.errors.shape == share.gaps.shape == (len(PROMPTS), 4)
    assert ((share.errors / share.gaps - expected).abs() < 1e-4).all() and share.per_step.shape == (4,)
    assert ((share.along / share.gaps - learned).abs() < 1e-4).all()


def test_noise_error_share_of_a_negative_prompt(sd: StableDiffusion):
    sd.unet = Imitation(sd, 1.0, "a cat")
    share = noise_error_share(sd, PROMPTS, steps=2, guidance=GUIDANCE, negative_prompt="a cat")
    assert share.pooled < 1e-5


@pytest.mark.parametrize("noised", [False, True])
def test_noise_error_share_of_a_teacher_guided_in_an_interval(noised: bool, sd: StableDiffusion):
    """Steps at t = 751, 501, 251 and 1: outside the interval no guidance is missing, and any guidance is an error."""
    interval, options = Interval(251, 600), dict(steps=4, guidance=GUIDANCE, noised=noised)
    sd.unet = Imitation(sd, 0.5, interval=interval)
    share = noise_error_share(sd, PROMPTS, interval=interval, **options)
    assert share.gaps[:, [0, 3]].max() == 0 and share.per_step.isnan().tolist() == [True, False, False, True]
    assert ((share.per_step[1:3] - 0.25).abs() < 1e-4).all() and abs(share.pooled - 0.25) < 1e-4
    sd.unet = Imitation(sd, 1.0)
    share = noise_error_share(sd, PROMPTS, interval=interval, **options)
    assert share.errors[:, 1:3].max() < 1e-4 < share.errors[:, [0, 3]].min()


def test_ends_are_noised_with_fresh_noise(sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch):
    """At each step anew, and not with the noise that the trajectory started from."""
    sd.unet = inject_lora(sd.unet, rank=2)
    noises, add_noise = [sd.starting_noise([EVALUATION_SEED])], metrics.add_noise
    monkeypatch.setattr(metrics, "add_noise", lambda *args: noises.append(args[2]) or add_noise(*args))
    noise_error_share(sd, PROMPTS[:1], steps=3, guidance=GUIDANCE, noised=True)
    assert len(noises) == 4 and (torch.corrcoef(torch.cat(noises).flatten(1)) - torch.eye(4)).abs().max() < 0.3


def test_noise_error_share_does_not_depend_on_the_batch(sd: StableDiffusion):
    sd.unet = inject_lora(sd.unet, rank=2)
    one, three = (noise_error_share(sd, PROMPTS, steps=2, guidance=GUIDANCE, batch=batch) for batch in (1, 3))
    assert error(one.errors, three.errors) < 1e-4 and error(one.gaps, three.gaps) < 1e-4


def flat(level: int) -> Image.Image:
    return Image.new("RGB", (8, 6), (level, level, level))


def test_psnr():
    found = psnr([flat(100), flat(110), flat(0)], [flat(100), flat(100), flat(255)])
    assert found[0] >= 99  # identical images
    assert math.isclose(found[1], 20 * math.log10(255 / 10), abs_tol=1e-3)
    assert math.isclose(found[2], 0, abs_tol=1e-3)


def test_psnr_sees_every_pixel_and_channel():
    image = np.zeros((6, 8, 3), dtype=np.uint8)
    image[5, 7, 2] = 255
    expected = 10 * math.log10(6 * 8 * 3)
    assert math.isclose(psnr([Image.fromarray(image)], [flat(0)])[0], expected, abs_tol=1e-3)


def test_ssim():
    """1 for identical images. Two flat images differ only in their means ("SSIM", eq. 6)."""
    c1 = (0.01 * 255) ** 2
    dark, light = (flat(level).resize((8, 8)) for level in (100, 110))  # its window is 7 wide
    found = ssim([dark, light], [dark, dark])
    assert math.isclose(found[0], 1, abs_tol=1e-6)
    assert math.isclose(found[1], (2 * 100 * 110 + c1) / (100**2 + 110**2 + c1), abs_tol=1e-4)


def test_a_cell_with_a_bar_stays_one_cell():
    assert markdown_table([["a|b", "c"]]).splitlines()[0] == "| a\\|b | c |"


def test_frechet_distance():
    """For Gaussians whose covariances commute it is |m1 - m2|^2 + |s1 - s2|^2."""
    torch.manual_seed(0)
    x = torch.randn(20_000, 3, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.cholesky(torch.linalg.inv(x.T.cov()))  # mean 0 and covariance 1, exactly
    turned = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    s1, s2, shift = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.5, 3.0]), torch.tensor([0.0, 1.0, -2.0])
    expected = shift.square().sum() + (s1 - s2).square().sum()
    assert math.isclose(frechet_distance(x * s1 @ turned, (x * s2 + shift) @ turned), expected, rel_tol=1e-9)
    assert abs(frechet_distance(x, x)) < 1e-9
    few = torch.randn(4, 64)
    assert 0 <= frechet_distance(few, few) < 1e-3  # rounding must not make it negative


def test_the_interval_of_a_distance_lies_around_it():
    """Resamples lack some prompts, which raises their distances: their mean is moved to the distance itself."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 60, 4) + torch.tensor([0.0, 2.0])[:, None, None]
    value, low, high = frechet_interval(x, y, each=1)
    resampled = torch.tensor([frechet_distance(x[i], y[i]) for i in metrics.resample(60, 200)])
    moved = resampled - resampled.mean() + value
    assert value == frechet_distance(x, y) < resampled.mean()
    assert (low, high) == pytest.approx(moved.quantile(torch.tensor([0.025, 0.975])).tolist(), rel=1e-4)


def test_interval_resamples_prompts():
    assert estimate(torch.ones(10, 4)) == (1, 1, 1)
    values = torch.tensor([[1.0] * 4, [0.0] * 4]).repeat(50, 1)  # all images of a prompt agree
    value, low, high = estimate(values)
    assert value == 0.5 and abs(high - low - 2 * 1.96 * 0.05) < 0.03  # the width for 100 independent values, not 400


def test_interval_of_a_ratio_pools():
    """It is a ratio of sums: prompts with a large gap weigh more."""
    errors, gaps = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    value, low, high = estimate(errors, gaps)
    assert value == 0.25 and low == 0 and high == 1


INTERVALS = [((0, 1000), 10), ((401, 601), 7), ((402, 600), 5), ((1, 1), 6)]
DRAWN = [("teacher", {}, 10), ("no guidance", {}, 5), ("student", {}, 5)]
DRAWN += [("teacher", dict(selective=share), calls) for share, calls in ((0.2, 9), (0.5, 8), (1.0, 5))]
DRAWN += [("teacher", dict(interval=Interval(*ends)), calls) for ends, calls in INTERVALS]
DRAWN += [("no guidance", dict(interval=Interval(*ends)), 5) for ends, _ in INTERVALS]


@pytest.mark.parametrize("method, options, calls", DRAWN, ids=str)
def test_draw_counts_unet_calls(method: str, options: dict, calls: int, sd: StableDiffusion):
    """Of five DDIM steps, at t = 801, 601, 401, 201 and 1."""
    sd.unet = inject_lora(sd.unet, rank=2)
    counted = []
    sd.unet.get_submodule("conv_in").register_forward_hook(lambda *_: counted.append(1))
    drawn = draw(sd, method, PROMPTS[:2], steps=5, guidance=GUIDANCE, **options)
    assert drawn.unet_calls == len(counted) == calls
    assert drawn.method == method and len(drawn.images) == 2 and drawn.seconds > 0


def test_the_time_of_an_image_is_without_moves_and_prompts(sd: StableDiffusion, monkeypatch):
    """By a clock on which a call of the UNet takes a second, one of the decoder 10, and everything else 1000."""
    time = 0.0

    def pass_time(seconds: float, *_: object) -> None:
        nonlocal time
        time += seconds

    @contextmanager
    def slow_move(*_: object) -> Iterator[None]:
        pass_time(1000)
        yield
        pass_time(1000)

    monkeypatch.setattr("minidistill.evaluate.sampling.time", SimpleNamespace(perf_counter=lambda: time))
    monkeypatch.setattr("minidistill.pipeline.on_device", slow_move)
    for network, seconds in ((sd.unet, 1), (sd.vae.decoder, 10), (sd.text_encoder, 1000)):
        network.register_forward_pre_hook(partial(pass_time, seconds))
    assert draw(sd, "teacher", PROMPTS[:3], steps=3, guidance=GUIDANCE, batch=2).seconds == (2 * 6 + 3 * 10) / 3


@pytest.mark.parametrize("student_steps, spacing", [(None, "leading"), (2, "trailing")])
def test_methods_start_from_the_same_noise(student_steps: int | None, spacing: str, sd: StableDiffusion):
    """An untrained student is the teacher without guidance, pixel by pixel; the negative prompt is its teacher's."""
    sd.unet = inject_lora(sd.unet, rank=2)
    options = dict(steps=2, guidance=GUIDANCE, negative_prompt="a cat", student_steps=student_steps)
    expected = sd.sample(PROMPTS, steps=2, guidance=1, spacing=spacing, seed=EVALUATION_SEED)
    for method in ("student", "no guidance"):
        assert all(map(np.array_equal, draw(sd, method, PROMPTS, **options).images, expected))


def test_grid_shows_every_image(sd: StableDiffusion):
    sd.unet = inject_lora(sd.unet, rank=2)
    rows = [draw(sd, method, PROMPTS, steps=1, guidance=GUIDANCE) for method in ("teacher", "student")]
    for i, row in enumerate(rows):
        row.images = [Image.new("RGB", (16, 16), (10 * i + 50, 10 * j + 50, 200)) for j in range(3)]
    sheet = np.asarray(comparison_grid(rows, PROMPTS, side=64)).reshape(-1, 3)
    found = {tuple(pixel) for pixel in sheet[(sheet[:, 2] == 200)].tolist()}
    assert found >= {(10 * i + 50, 10 * j + 50, 200) for i in range(2) for j in range(3)}


def test_grid_takes_any_prompt(sd: StableDiffusion):
    rows = [draw(sd, "teacher", PROMPTS[:1], steps=1, guidance=1.0)]
    for prompt in ("", "x" * 500, "a prompt of many words " * 30, "苹果\n\t"):
        comparison_grid(rows, [prompt])


CLIP = ROOT / "weights/pocket-emoji/clip"


@pytest.mark.skipif(not (CLIP / "model.safetensors").is_file(), reason="weights/pocket-emoji has no clip")
def test_clip_score_is_transformers_logit(sd: StableDiffusion):
    score = ClipScore(CLIP, sd.tokenizer)
    images = [flat(0), flat(255), Image.linear_gradient("L").convert("RGB")]
    inputs = score.preprocess(images, return_tensors="pt") | dict(
        score.tokenizer(PROMPTS, padding="max_length", return_tensors="pt")
    )
    with torch.no_grad():
        reference = score.model(**inputs).logits_per_image.diagonal() / score.model.logit_scale.exp() * 100
    assert error(score(images, PROMPTS), reference) < 1e-4


def test_a_missing_clip_is_an_error(sd: StableDiffusion, tmp_path: Path):
    with pytest.raises(OSError):
        ClipScore(tmp_path / "nowhere", sd.tokenizer)


LEARNED = dict(base="tiny", guidance="4", negative_prompt="", method="trajectories")


def write_student(file: Path, strength: float = 1.0, **header: str) -> Path:
    """A LoRA for the tiny model, which is all of a run that evaluation reads."""
    save_lora(tiny_student(alpha=2 * strength), file, LEARNED | header)
    return file


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder."""
    return write_student(tmp_path / "a run/lora.safetensors").parent


@pytest.fixture
def evaluate(tiny_model: Path, prompts_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """``evaluate(run, "--flag", ...)`` on four prompts, in two steps."""
    prompts = tmp_path / "four.txt"
    prompts.write_text("\n".join(f"{line}, a photo" for line in prompts_file.read_text().splitlines()[:4]))
    same = ["--model", tiny_model, "--prompts", prompts, "--steps", 2, "--pictures", 7]
    same += ["--out", tmp_path / "out", "--work", tmp_path / "work"]

    def evaluate(*args: object) -> Path:
        main([str(arg) for arg in (*args, *same)])
        return tmp_path / "out"

    return evaluate


def test_the_command_measures_every_method(run: Path, evaluate: Callable[..., Path], tiny_model: Path):
    out = evaluate(run, "--selective", 0.5)
    found = json.loads((out / "results.json").read_text())
    rows = {row["method"]: row for row in found["rows"]}
    assert [(name, row["unet_calls"]) for name, row in rows.items()] == [
        ("teacher", 4),
        ("no guidance", 2),
        ("guided but for the last 50%", 3),
        ("a run", 2),
    ]
    assert (found["prompts"], found["each"]) == (4, 2)  # for --pictures 7
    sd = load(tiny_model)
    sd.unet = load_lora(sd.unet, run / "lora.safetensors")
    prompts = (out.parent / "four.txt").read_text().splitlines()
    for name, noised in (("noise error share", False), ("on noised latents", True)):
        share = noise_error_share(sd, prompts, steps=2, guidance=4.0, noised=noised)
        assert math.isclose(rows["a run"][name]["value"], share.pooled, rel_tol=1e-4)
        assert rows["a run"][name]["low"] <= share.pooled <= rows["a run"][name]["high"]
        assert found["by step"]["a run"][name] == pytest.approx(share.per_step.tolist(), rel=1e-4)
    assert found["t"] == sd.schedule.timesteps(2)
    twice = [prompt for prompt in prompts for _ in range(2)]
    teacher, student = (draw(sd, method, twice, steps=2, guidance=4.0).images for method in ("teacher", "student"))
    assert math.isclose(
        rows["a run"]["PSNR"]["value"], psnr(student, teacher).mean(), rel_tol=1e-2
    )  # there the LoRA is merged
    table = (out / "table.md").read_text()
    assert "a run" in table and found["command"] in table
    assert found["command"].startswith("python -m minidistill.evaluate quality ")
    assert Image.open(out / "pictures.png").size[0] > 4 * 128 and Image.open(out / "error_by_step.png").size[0] > 0


def test_intervals_add_teachers(run: Path, evaluate: Callable[..., Path], tiny_model: Path):
    out = evaluate(run, "--interval", 0, 400, "--interval", 2, 501)
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [(row["method"], row["unet_calls"]) for row in rows[2:]] == [
        ("guided at t from 0 to 400", 3),
        ("guided at t from 2 to 501", 3),
        ("a run", 2),
    ]
    prompts = [line for line in (out.parent / "four.txt").read_text().splitlines() for _ in range(2)]
    sd = load(tiny_model)
    images, teacher = (
        draw(sd, "teacher", prompts, steps=2, guidance=4.0, interval=part).images for part in (Interval(2, 501), None)
    )
    assert math.isclose(rows[3]["PSNR"]["value"], psnr(images, teacher).mean(), rel_tol=1e-4)


def test_a_student_of_a_teacher_guided_in_an_interval(run: Path, evaluate: Callable[..., Path], tiny_model: Path):
    """The interval is in the LoRA's header, and the teacher in the comparison is guided there only."""
    write_student(run / "lora.safetensors", interval="2 501")
    out = evaluate(run, "--selective", 1)
    results = json.loads((out / "results.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert [row["unet_calls"] for row in results["rows"]] == [3, 2, 2, 2]
    sd = load(tiny_model)
    sd.unet = load_lora(sd.unet, run / "lora.safetensors")
    prompts = (out.parent / "four.txt").read_text().splitlines()
    share = noise_error_share(sd, prompts, steps=2, guidance=4.0, interval=Interval(2, 501))
    assert math.isclose(results["rows"][3]["noise error share"]["value"], share.pooled, rel_tol=1e-4)
    first, last = results["by step"]["a run"]["noise error share"]
    assert math.isclose(first, share.per_step[0], rel_tol=1e-4) and last is None  # at t = 1 there is no guidance


def test_a_student_of_few_steps(run: Path, evaluate: Callable[..., Path], tiny_model: Path):
    """It takes the steps in its header, with trailing spacing; the dial is not for it."""
    write_student(run / "lora.safetensors", student_steps="1", teacher_steps="2")
    out = evaluate(run)
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["unet_calls"] for row in rows] == [4, 2, 4, 1]
    assert "noise error share" not in rows[3]
    twice = [line for line in (out.parent / "four.txt").read_text().splitlines() for _ in range(2)]
    sd = load(tiny_model)
    sd.unet = load_lora(sd.unet, run / "lora.safetensors")
    student = sd.sample(twice, steps=1, spacing="trailing", lora_enabled=True, seed=EVALUATION_SEED)
    teacher = draw(sd, "teacher", twice, steps=2, guidance=4.0, spacing="trailing").images  # it learned from this one
    assert math.isclose(rows[3]["PSNR"]["value"], psnr(student, teacher).mean(), rel_tol=1e-2)
    with pytest.raises(ValueError, match="and not few steps"):
        main(["dial", str(run), "--model", str(tiny_model)])


def test_the_folder_one_is_in_has_its_name(run: Path, evaluate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(run)
    assert json.loads((evaluate(".") / "results.json").read_text())["rows"][2]["method"] == "a run"


def test_one_image_has_no_distance_between_distributions(run: Path, evaluate: Callable[..., Path]):
    rows = json.loads((evaluate(run, "--pictures", 1) / "results.json").read_text())["rows"]
    assert "PSNR" in rows[1] and not any(name.startswith("Fréchet") for row in rows for name in row)


def test_a_prompt_that_is_listed_twice_is_one_prompt(run: Path, evaluate: Callable[..., Path], tmp_path: Path):
    """Its images are alike, so they are resampled together."""
    out = evaluate(run)
    once, file = json.loads((out / "results.json").read_text()), tmp_path / "four.txt"
    file.write_text("".join(f"{line}\n{line}\n" for line in file.read_text().splitlines()))
    twice = json.loads((evaluate(run) / "results.json").read_text())
    assert (twice["prompts"], twice["each"], twice["rows"]) == (4, 2, once["rows"])


def test_a_plot_of_other_students_does_not_stay(run: Path, evaluate: Callable[..., Path]):
    assert (evaluate(run) / "error_by_step.png").exists()
    assert not (evaluate() / "error_by_step.png").exists()  # no student, no error


def test_a_judge_that_is_none(run: Path, evaluate: Callable[..., Path]):
    with pytest.raises(ValueError, match="--judge minidistill.pocket: .*measures"):
        evaluate(run, "--judge", "minidistill.pocket")


def test_images_keep_their_shape_in_the_grid():
    """A wide image gets white above and below."""
    wide = Image.new("RGB", (64, 32), "black")
    cell = np.asarray(
        comparison_grid([SimpleNamespace(method="wide", images=[wide], unet_calls=1, seconds=0.0)], ["x"], side=64)
    )[52:116, 128:192]
    assert (cell[:15] == 255).all() and (cell[17:47] == 0).all() and (cell[49:] == 255).all()


def test_images_are_cached(run: Path, evaluate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    results = [(evaluate(run) / "results.json").read_text()]
    with monkeypatch.context() as patched:
        patched.setattr(StableDiffusion, "sample", lambda *_, **__: pytest.fail("sampled again"))
        results.append((evaluate(run) / "results.json").read_text())
    assert results[0] == results[1]
    write_student(run / "lora.safetensors", strength=4)
    results.append((evaluate(run) / "results.json").read_text())
    before, after = (json.loads(text)["rows"] for text in results[1:])
    assert before[:2] == after[:2] and before[2]["PSNR"] != after[2]["PSNR"]


def test_images_of_another_model_are_not_reused(sd: StableDiffusion):
    """Whatever they depend on is in the stamp of the cache: these changes, one upon the other."""
    args = SimpleNamespace(device="cpu", dtype="float32")
    stamps = [model_stamp(sd, args, prompts) for prompts in (PROMPTS, PROMPTS[:2])]
    for name, value in dict(device="cuda", dtype="bfloat16").items():
        setattr(args, name, value)
        stamps.append(model_stamp(sd, args, PROMPTS))
    other = Schedule.from_config(ScheduleConfig(steps_offset=0))
    padded = deepcopy(sd.tokenizer)
    padded.pad_token = padded.bos_token
    for name, value in dict(width=8, height=8, force_zeros=True, schedule=other, tokenizer=padded).items():
        setattr(sd, name, value)
        stamps.append(model_stamp(sd, args, PROMPTS))
    for network in (sd.unet, sd.text_encoder, sd.vae):
        next(network.parameters()).data += 1
        stamps.append(model_stamp(sd, args, PROMPTS))
    assert len(set(map(json.dumps, stamps))) == len(stamps) == 12


def test_a_full_student_is_measured(
    sd: StableDiffusion, tiny_model: Path, evaluate: Callable[..., Path], tmp_path: Path
):
    """This one has learned nothing: it misses all of the guidance, and samples as no guidance does."""
    write_checkpoint(tiny_model, replaced_by(sd.unet), tmp_path / "a run/student", LEARNED | dict(method="full"))
    rows = json.loads((evaluate(tmp_path / "a run") / "results.json").read_text())["rows"]
    assert rows[2]["noise error share"]["value"] == pytest.approx(1, rel=1e-5)
    assert rows[2]["PSNR"] == rows[1]["PSNR"]


def test_a_student_of_another_model_is_refused_before_sampling(
    sd: StableDiffusion, tiny_model: Path, tiny_xl: Path, evaluate: Callable[..., Path], tmp_path: Path, monkeypatch
):
    """Full or a LoRA: one whose teacher predicts v where this model predicts eps, and one of other shapes."""
    monkeypatch.setattr(StableDiffusion, "sample", lambda *_, **__: pytest.fail("sampled"))
    learned = LEARNED | dict(method="full", prediction="v")
    write_checkpoint(tiny_model, replaced_by(sd.unet), tmp_path / "v/student", learned, prediction="v")
    with pytest.raises(CheckpointError, match="student learned from a model that predicts v"):
        evaluate(tmp_path / "v")
    write_checkpoint(tiny_xl, replaced_by(load(tiny_xl).unet), tmp_path / "xl/student", LEARNED | dict(method="full"))
    with pytest.raises(CheckpointError, match="xl/student is a copy of another UNet"):
        evaluate(tmp_path / "xl")
    with pytest.raises(CheckpointError, match="v.safetensors learned from a model that predicts v"):
        evaluate(write_student(tmp_path / "v.safetensors", prediction="v"))
    unet = inject_lora(load(tiny_xl).unet, rank=2)
    save_lora(unet, tmp_path / "xl.safetensors", LEARNED)
    with pytest.raises(CheckpointError, match="xl.safetensors"):
        evaluate(tmp_path / "xl.safetensors")


def test_a_scaled_lora_is_compared_with_the_teacher_of_its_nominal_guidance(
    run: Path, evaluate: Callable[..., Path], tiny_model: Path
):
    out = evaluate(f"{run}:0.5")
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert rows[2]["method"] == "a run x 0.5"
    sd = load(tiny_model)
    sd.unet = load_lora(sd.unet, run / "lora.safetensors", scale=0.5)
    share = noise_error_share(sd, (out.parent / "four.txt").read_text().splitlines(), steps=2, guidance=1 + 0.5 * 3)
    assert math.isclose(rows[2]["noise error share"]["value"], share.pooled, rel_tol=1e-4)


def test_bad_input_is_refused_before_sampling(
    run: Path, evaluate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(StableDiffusion, "sample", lambda *_, **__: pytest.fail("sampled"))
    for judge, why in (("nonsense", "No module named"), ("./nonsense.py", "is not the name of a module")):
        with pytest.raises(ValueError, match=f"--judge {judge}:? {why}"):
            evaluate(run, "--judge", judge)
    with pytest.raises(ValueError, match="embedded model's captions"):
        evaluate(run, "--judge", "minidistill.pocket.judge")
    with pytest.raises(ValueError, match="ink.safetensors"):
        evaluate(write_student(run / "styled.safetensors", teacher_lora="ink.safetensors:1"))
    with pytest.raises(CheckpointError, match="odd.safetensors"):
        evaluate(write_student(run / "odd.safetensors", interval="all"))


def test_the_teachers_predictions_are_made_once_for_all_students(
    run: Path, evaluate: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    batches = []
    found = metrics.teacher_states
    monkeypatch.setattr(metrics, "teacher_states", lambda *args, **how: batches.append(how) or found(*args, **how))
    other = write_student(tmp_path / "other.safetensors", strength=4)
    rows = json.loads((evaluate(run, other) / "results.json").read_text())["rows"]
    assert [how["noised"] for how in batches] == [False, True]  # four prompts are one batch
    assert rows[2]["noise error share"] != rows[3]["noise error share"]


def test_students_of_several_teachers_are_refused(run: Path, evaluate: Callable[..., Path]):
    with pytest.raises(ValueError, match="one teacher"):
        evaluate(run, "--guidance", 3)
    with pytest.raises(ValueError, match="one teacher"):
        evaluate(run, write_student(run / "other.safetensors", guidance="3"))
    with pytest.raises(ValueError, match="one teacher.* for 0 <= t <= 400"):
        evaluate(run, write_student(run / "other.safetensors", interval="0 400"))
    with pytest.raises(ValueError, match='called "a run"'):
        evaluate(run, run)
