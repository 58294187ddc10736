"""pocket/recognition.py: recognises things and colours in drawn images, degraded ones too."""

import shutil
from pathlib import Path

import pytest
import torch
from scenes import FEW, FEW_PAIRS, flat

from minidistill.pocket import recognition
from minidistill.pocket.compositions import COLOURS, THINGS, pair_compositions, single_compositions
from minidistill.pocket.images import NOTHING, find_emoji, render
from minidistill.pocket.judge import degraded

KINDS = pytest.mark.parametrize("few", [FEW, FEW_PAIRS], ids=["one", "two"])


def identified(images, few, stamps):
    """The things seen in the images, as the template judge does, [N, 1 or 2]."""
    seen = recognition.crops(images, pair=len(few[0].emoji) == 2)
    backgrounds = recognition.border_colour(images).repeat_interleave(seen.shape[1], 0)
    found = recognition.identity_by_template(seen.flatten(0, 1), backgrounds, stamps).view(-1, seen.shape[1])
    return ["".join(list(THINGS)[i] for i in row) for row in found.tolist()]


def test_background_is_the_named_colour_nearest_to_the_border():
    images = flat(list(COLOURS.values()))
    images[:, :, 1:-1, 1:-1] = 128
    images[:, :, 0, :20] = 77  # an object that touches the border
    noise = torch.randint(-15, 16, images.shape, generator=torch.Generator().manual_seed(0))
    images = (images.int() + noise).clamp(0, 255).to(torch.uint8)
    assert recognition.background(images).tolist() == list(range(len(COLOURS)))


def test_identity_is_the_template_with_the_least_squared_error():
    """The expanded sum agrees with the squares themselves, for made-up stamps, shifted, on a background."""
    generator, side, shift = torch.Generator().manual_seed(1), recognition.CROP_SIDE, recognition.TEMPLATE_SHIFT
    stamps = torch.rand(6 * recognition.TEMPLATE_SIZES, 4, side, side, generator=generator)
    stamps[:, :3] *= stamps[:, 3:]
    stamps *= torch.nn.functional.pad(torch.ones(side - 8, side - 8), [4] * 4)  # empty in the outer four pixels

    b = torch.rand(8, 3, generator=generator)
    x = torch.rand(8, 3, side, side, generator=generator)
    x[:, :, :3], x[:, :, -3:] = b[:, :, None, None], b[:, :, None, None]
    x[..., :3], x[..., -3:] = b[:, :, None, None], b[:, :, None, None]
    errors = []
    for dy in range(-shift, shift + 1):
        for dx in range(-shift, shift + 1):
            moved = stamps.double().roll((dy, dx), (2, 3))
            drawn = moved[:, :3] + (1 - moved[:, 3:]) * b[:, None, :, None, None].double()  # [8, K, 3, h, w]
            errors.append((x[:, None] - drawn).square().flatten(2).sum(2))
    nearest = torch.stack(errors).amin(0).argmin(1) // recognition.TEMPLATE_SIZES
    assert torch.equal(recognition.identity_by_template(x, b, stamps), nearest)


@KINDS
def test_templates_recognise_drawn_and_degraded_things(few, renderer, emoji):
    images = render(renderer, few, 1, seed=7)
    for name, version in degraded(images).items():
        assert identified(version, few, recognition.templates(emoji)) == [c.emoji for c in few], name
        if "contrast" not in name:
            assert [list(COLOURS)[i] for i in recognition.background(version)] == [c.colour for c in few], name


@KINDS
def test_templates_do_not_see_an_absent_thing(few, renderer, emoji):
    """Another thing, a flat image and noise are not mistaken for the thing in the caption."""
    kind = single_compositions() if few is FEW else pair_compositions()
    drawn = render(renderer, kind[8::211][: len(few)], 1, seed=8)
    noise = torch.randint(256, drawn.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for images in (drawn, noise, flat([c.rgb for c in few])):
        found = identified(images, few, recognition.templates(emoji))
        assert sum(f == c.emoji for f, c in zip(found, few)) <= 1


def test_classifier_is_trained_once_and_stored(tmp_path, monkeypatch, emoji):
    made = []

    def train(renderer):
        made.append(recognition.build_classifier().eval())
        return made[-1]

    monkeypatch.setattr(recognition, "train_classifier", train)
    first = recognition.load_classifier(tmp_path / "work", emoji)
    again = recognition.load_classifier(tmp_path / "work", emoji)
    assert len(made) == 1
    x = torch.rand(2, 3, 32, 32)
    assert recognition.identity_by_classifier(x, again).shape == (2,)
    for model in (first, again):
        assert torch.equal(model(x), made[0](x))
    assert not list((tmp_path / "work").glob("*.tmp"))
    other = Path(shutil.copytree(emoji, tmp_path / "other package"))
    assert torch.equal(recognition.load_classifier(tmp_path / "work", other)(x), made[0](x)) and len(made) == 1
    one, two, *_ = (find_emoji(thing, other) for thing in THINGS)
    shutil.copy(one, two)  # the same things, in other images
    assert torch.equal(recognition.load_classifier(tmp_path / "work", other)(x), made[1](x))


def test_classifier_learns(renderer, monkeypatch):
    monkeypatch.setattr(recognition, "THINGS", dict(list(THINGS.items())[:4]))
    model = recognition.train_classifier(renderer, steps=60, batch=16)
    for pair, last in ((False, torch.full((4,), NOTHING)), (True, torch.arange(4).flip(0))):
        things = torch.stack([torch.arange(4), last], 1)
        seen = recognition.crops(renderer.draw(things, torch.full((4, 3), 90)), pair)
        expected = things[:, : seen.shape[1]].flatten()
        assert (recognition.identity_by_classifier(seen.flatten(0, 1), model) == expected).float().mean() > 0.6


def test_blur_keeps_flat_images_and_smooths_others():
    assert torch.allclose(recognition.blur(torch.full((1, 3, 9, 9), 0.3), 1.5), torch.full((1, 3, 9, 9), 0.3))
    dot = torch.zeros(1, 3, 9, 9)
    dot[..., 4, 4] = 1
    assert torch.allclose(recognition.blur(dot, 0.0), dot)
    assert recognition.blur(dot, 1.0)[0, 0, 4, 4].item() == pytest.approx(1 / (2 * torch.pi), rel=0.02)
