"""pocket/judge.py: it recognises colours and emoji in rendered images, degraded ones too, and its totals are right."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from minidistill.config import ScheduleConfig
from minidistill.pocket import judge
from minidistill.pocket.compositions import COLOURS, EMOJI, all_compositions, write_compositions
from minidistill.pocket.images import find_font, render
from minidistill.schedule import Schedule

FEW = all_compositions()[::131]  # 12 emoji on various colours


@pytest.fixture
def font():
    try:
        return find_font()
    except FileNotFoundError as error:
        pytest.skip(f"drawing emoji needs their font. {error}")


def flat(colours, side=64):
    """uint8 [N, 3, side, side], one flat colour each."""
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].repeat(1, 1, side, side)


def test_background_is_the_named_colour_nearest_to_the_border():
    images = flat(list(COLOURS.values()))
    images[:, :, 1:-1, 1:-1] = 128
    images[:, :, 0, :20] = 77  # an object that touches the border
    noise = torch.randint(-15, 16, images.shape, generator=torch.Generator().manual_seed(0))
    images = (images.int() + noise).clamp(0, 255).to(torch.uint8)
    assert judge.background(images).tolist() == list(range(len(COLOURS)))


def test_identity_is_the_template_with_the_least_squared_error(monkeypatch):
    """The expanded sum agrees with the squares themselves, for made-up stamps, shifted, on a background."""
    generator, side, shift = torch.Generator().manual_seed(1), judge.TEMPLATE_SIDE, judge.TEMPLATE_SHIFT
    stamps = torch.rand(6 * judge.TEMPLATE_SIZES, 4, side, side, generator=generator)
    stamps[:, :3] *= stamps[:, 3:]
    stamps *= torch.nn.functional.pad(torch.ones(side - 8, side - 8), [4] * 4)  # empty in the outer four pixels
    monkeypatch.setattr(judge, "templates", lambda font: stamps)
    monkeypatch.setattr(judge, "find_font", lambda font: font)

    images = torch.randint(256, (8, 3, side, side), generator=generator, dtype=torch.uint8)
    images[:, :, :3], images[:, :, -3:], images[..., :3], images[..., -3:] = 60, 60, 60, 60
    x, b = images.double() / 255, 60 / 255
    errors = []
    for dy in range(-shift, shift + 1):
        for dx in range(-shift, shift + 1):
            moved = stamps.double().roll((dy, dx), (2, 3))
            drawn = moved[:, :3] + (1 - moved[:, 3:]) * b
            errors.append((x[:, None] - drawn).square().flatten(2).sum(2))
    nearest = torch.stack(errors).amin(0).argmin(1) // judge.TEMPLATE_SIZES
    assert torch.equal(judge.identity_by_template(images), nearest)


def test_templates_recognise_rendered_and_degraded_emoji(font):
    images, index = render(FEW, 1, seed=7, font=font)
    for name, version in judge.degraded(images).items():
        found = [EMOJI[i] for i in judge.identity_by_template(version, font)]
        assert found == [c.emoji for c in FEW], name
        if "contrast" not in name:
            assert [list(COLOURS)[i] for i in judge.background(version)] == [c.colour for c in FEW], name


def test_templates_do_not_see_an_absent_emoji(font):
    """Another emoji, a flat image and noise are not mistaken for the emoji in the caption."""
    others = all_compositions()[8::131]
    drawn = render(others[: len(FEW)], 1, seed=8, font=font)[0]
    noise = torch.randint(256, drawn.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for images in (drawn, noise, flat([c.rgb for c in FEW])):
        found = [EMOJI[i] for i in judge.identity_by_template(images, font)]
        assert sum(f == c.emoji for f, c in zip(found, FEW)) <= 1


def test_classifier_is_trained_once_and_stored(tmp_path, monkeypatch):
    made = []

    def train(font):
        made.append(judge.build_classifier().eval())
        return made[-1]

    monkeypatch.setattr(judge, "train_classifier", train)
    first = judge.load_classifier(tmp_path / "work")
    again = judge.load_classifier(tmp_path / "work")
    assert len(made) == 1
    x = flat([(10, 200, 30), (0, 0, 0)])
    assert judge.identity_by_classifier(x, again).shape == (2,)
    for model in (first, again):
        assert torch.equal(model(x / 255), made[0](x / 255))
    assert not list((tmp_path / "work").glob("*.tmp"))


def test_classifier_learns(font, monkeypatch):
    monkeypatch.setattr(judge, "EMOJI", EMOJI[:4])
    model = judge.train_classifier(font, renders=16, steps=30, batch=32)
    some = [c for c in all_compositions() if c.emoji in EMOJI[:4]]
    right = judge.identity_by_classifier(render(some, 1, seed=9, font=font)[0], model)
    expected = torch.arange(4).repeat_interleave(len(COLOURS))
    assert (right == expected).float().mean() > 0.6


def test_mean_distance_is_within_compositions():
    images = flat([(0, 0, 0), (51, 51, 51), (255, 255, 255), (255, 255, 255)], side=8)
    assert judge.mean_distance(images, each=2) == pytest.approx(0.1)


def test_held_out(tmp_path):
    path = tmp_path / "new/compositions.json"
    write_compositions(path)
    every = [c for c in all_compositions() if c.held_out]
    assert judge.held_out(path) == every
    assert len(set(judge.held_out(path, 10))) == 10
    assert judge.held_out(path, 10_000) == every
    path.write_text(json.dumps([{"caption": "a unicorn fish on a red background", "held_out": True}]))
    with pytest.raises(ValueError, match="unicorn fish"):
        judge.held_out(path)


def test_blur_keeps_flat_images_and_smooths_others():
    assert torch.allclose(judge.blur(torch.full((1, 3, 9, 9), 0.3), 1.5), torch.full((1, 3, 9, 9), 0.3))
    dot = torch.zeros(1, 3, 9, 9)
    dot[..., 4, 4] = 1
    assert torch.allclose(judge.blur(dot, 0.0), dot)
    assert judge.blur(dot, 1.0)[0, 0, 4, 4].item() == pytest.approx(1 / (2 * torch.pi), rel=0.02)


class Painter:
    """In place of StableDiffusion: paints the caption's background, red with no guidance."""

    unet, schedule, device = object(), Schedule.from_config(ScheduleConfig()), torch.device("cpu")
    text_encoder = vae = torch.nn.Linear(1, 1)

    def __init__(self):
        self.calls = []

    def sample(
        self,
        prompts,
        steps,
        guidance,
        seed,
        lora_enabled,
        negative_prompt,
        selective,
        interval,
        spacing,
        batch,
        progress,
        clock,
    ):
        self.calls.append((len(prompts), steps, guidance, lora_enabled, negative_prompt))
        known = {c.caption: c.rgb for c in all_compositions()}
        red = guidance == 1 and not lora_enabled
        return [Image.new("RGB", (64, 64), (215, 45, 45) if red else known[p]) for p in prompts]


def test_main_samples_judges_and_writes(tmp_path, monkeypatch, capsys):
    write_compositions(tmp_path / "compositions.json")
    painter = Painter()
    learned = SimpleNamespace(metadata={"guidance": "4", "negative_prompt": "blurry"}, interval=None, few_steps=None)
    fakes = dict(
        load=lambda path, device: painter,
        read_lora=lambda path: learned,
        load_lora=lambda unet, path: unet,
        merge_lora=lambda unet: None,
        load_classifier=lambda work, font: None,
        identity_by_template=lambda images, font: torch.zeros(len(images), dtype=torch.int64),
        identity_by_classifier=lambda images, classifier: torch.ones(len(images), dtype=torch.int64),
        render=lambda compositions, each, seed, size, font: (flat([c.rgb for c in compositions for _ in range(each)]),),
    )
    for name, fake in fakes.items():
        monkeypatch.setattr(judge, name, fake)
    out = tmp_path / "results" / "pocket.json"
    flags = ["--model", str(tmp_path), "--lora", "some.safetensors", "--seeds", "2", "--out", str(out), "--steps", "3"]
    judge.main(flags)

    held_out = [c for c in all_compositions() if c.held_out]
    n = 2 * len(held_out)
    # The student has learned to avoid the negative prompt: it is not told again.
    assert painter.calls == [(n, 3, 4, False, "blurry"), (n, 3, 1, False, "blurry"), (n, 3, None, True, None)]
    numbers = json.loads(out.read_text())
    rows = {r["method"]: r for r in numbers["rows"]}
    assert list(rows) == ["teacher, guidance 4", "no guidance", "student, one pass", "rendered"]
    assert rows["teacher, guidance 4"]["background"]["value"] == rows["student, one pass"]["background"]["value"] == 1
    red = sum(c.colour == "red" for c in held_out) / len(held_out)
    assert rows["no guidance"]["background"]["value"] == pytest.approx(red)
    assert rows["rendered"]["identity by template"]["value"] == pytest.approx(
        sum(c.emoji == EMOJI[0] for c in held_out) / len(held_out)
    )
    assert rows["rendered"]["all right"]["value"] == 0 and len(rows["rendered"]["wrong"]) == len(held_out)
    assert rows["rendered"]["distance over seeds"] == 0
    assert "--seeds 2" in numbers["command"]
    assert "| student, one pass | " in capsys.readouterr().out


def test_a_student_of_few_steps_is_sampled_as_it_was_taught(monkeypatch):
    taken = []
    lora = SimpleNamespace(metadata={"guidance": "4"}, interval=None, few_steps=(2, 24))
    fakes = dict(
        read_lora=lambda path: lora, load_lora=lambda unet, path: unet, merge_lora=lambda unet: None, pixels=lambda x: x
    )
    for name, fake in fakes.items():
        monkeypatch.setattr(judge, name, fake)

    class Sampler(Painter):
        def sample(self, prompts, steps, spacing, lora_enabled, **options):
            taken.append((lora_enabled, steps, spacing))
            return []

    args = SimpleNamespace(lora="some.safetensors", guidance=None, steps=25, batch=4)
    judge.sample_all(Sampler(), args, ["a cat"])
    assert taken == [(False, 25, "leading"), (False, 25, "leading"), (True, 2, "trailing")]


@pytest.mark.parametrize("flag", ["--steps", "--seeds", "--limit", "--batch"])
def test_a_number_below_one_is_refused_by_its_flag(flag, capsys):
    with pytest.raises(SystemExit):
        judge.main([flag, "0"])
    assert f"argument {flag}" in capsys.readouterr().err


def test_one_seed_is_refused():
    with pytest.raises(ValueError, match="--seeds must be at least 2"):
        judge.main(["--seeds", "1"])
