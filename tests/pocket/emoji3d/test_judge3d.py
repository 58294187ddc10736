"""pocket/emoji3d/judge.py: recognises things and colours in drawn images, degraded ones too; its totals are right."""

import json

import numpy as np
import pytest
import torch

from minidistill.pocket.emoji3d import judge
from minidistill.pocket.emoji3d.compositions import (
    COLOURS,
    THINGS,
    all_compositions,
    pair_compositions,
    single_compositions,
    write_compositions,
)
from minidistill.pocket.emoji3d.images import NOTHING, render

FEW = single_compositions()[::211]  # 13 things on various colours
FEW_PAIRS = pair_compositions()[::211]
KINDS = pytest.mark.parametrize("few", [FEW, FEW_PAIRS], ids=["one", "two"])


def identified(images, few, stamps):
    """The things seen in the images, as the template judge does, [N, 1 or 2]."""
    seen = judge.crops(images, pair=len(few[0].emoji) == 2)
    backgrounds = judge.border_colour(images).repeat_interleave(seen.shape[1], 0)
    found = judge.identity_by_template(seen.flatten(0, 1), backgrounds, stamps).view(-1, seen.shape[1])
    return ["".join(list(THINGS)[i] for i in row) for row in found.tolist()]


def flat(colours, side=64):
    """uint8 [N, 3, side, side], one flat colour each."""
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].repeat(1, 1, side, side)


def test_identity_is_the_template_with_the_least_squared_error():
    """The expanded sum agrees with the squares themselves, for made-up stamps, shifted, on a background."""
    generator, side, shift = torch.Generator().manual_seed(1), judge.CROP_SIDE, judge.TEMPLATE_SHIFT
    stamps = torch.rand(6 * judge.TEMPLATE_SIZES, 4, side, side, generator=generator)
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
    nearest = torch.stack(errors).amin(0).argmin(1) // judge.TEMPLATE_SIZES
    assert torch.equal(judge.identity_by_template(x, b, stamps), nearest)


@KINDS
def test_templates_recognise_drawn_and_degraded_things(few, renderer, emoji):
    images = render(renderer, few, 1, seed=7)
    for name, version in judge.degraded(images).items():
        assert identified(version, few, judge.templates(emoji)) == [c.emoji for c in few], name
        if "contrast" not in name:
            assert [list(COLOURS)[i] for i in judge.background(version)] == [c.colour for c in few], name


@KINDS
def test_templates_do_not_see_an_absent_thing(few, renderer, emoji):
    """Another thing, a flat image and noise are not mistaken for the thing in the caption."""
    kind = single_compositions() if few is FEW else pair_compositions()
    drawn = render(renderer, kind[8::211][: len(few)], 1, seed=8)
    noise = torch.randint(256, drawn.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for images in (drawn, noise, flat([c.rgb for c in few])):
        found = identified(images, few, judge.templates(emoji))
        assert sum(f == c.emoji for f, c in zip(found, few)) <= 1


def test_a_swapped_pair_is_wrong(renderer, emoji, monkeypatch):
    monkeypatch.setattr(judge, "identity_by_classifier", lambda seen, _: judge.identity_by_template(seen, *rest))
    images = render(renderer, FEW_PAIRS, 2, seed=5)
    for version, right in ((images, 1.0), (torch.cat([images[..., 32:], images[..., :32]], -1), 0.0)):
        rest = judge.border_colour(version).repeat_interleave(2, 0), judge.templates(emoji)
        judged = judge.judge(version, FEW_PAIRS, None, judge.templates(emoji))
        assert judged["background"].mean() == 1
        assert judged["all right"].mean() == judged["identity by template"].mean() == right


def test_classifier_is_trained_once_and_stored(tmp_path, monkeypatch, emoji):
    made = []

    def train(renderer):
        made.append(judge.build_classifier().eval())
        return made[-1]

    monkeypatch.setattr(judge, "train_classifier", train)
    first = judge.load_classifier(tmp_path / "work", emoji)
    again = judge.load_classifier(tmp_path / "work", emoji)
    assert len(made) == 1
    x = torch.rand(2, 3, 32, 32)
    assert judge.identity_by_classifier(x, again).shape == (2,)
    for model in (first, again):
        assert torch.equal(model(x), made[0](x))
    assert not list((tmp_path / "work").glob("*.tmp"))


def test_classifier_learns(renderer, monkeypatch):
    monkeypatch.setattr(judge, "THINGS", dict(list(THINGS.items())[:4]))
    model = judge.train_classifier(renderer, steps=60, batch=16)
    for pair, last in ((False, torch.full((4,), NOTHING)), (True, torch.arange(4).flip(0))):
        things = torch.stack([torch.arange(4), last], 1)
        seen = judge.crops(renderer.draw(things, torch.full((4, 3), 90)), pair)
        expected = things[:, : seen.shape[1]].flatten()
        assert (judge.identity_by_classifier(seen.flatten(0, 1), model) == expected).float().mean() > 0.6


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
    fakes = dict(
        load=lambda path, device: None,
        sample_all=lambda sd, args, prompts: {"teacher": drawn, "no guidance": red},
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


def test_one_seed_is_refused():
    with pytest.raises(ValueError, match="--seeds must be at least 2"):
        judge.main(["--seeds", "1"])
