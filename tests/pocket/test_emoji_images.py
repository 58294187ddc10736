"""The composed images, beside ones composed by Pillow."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minidistill.pocket.compositions import COLOURS, THINGS, Composition, all_compositions
from minidistill.pocket.images import NOTHING, Renderer, as_tensors, find_emoji, render, stamp


def test_an_image_is_its_thing_on_its_colour(renderer: Renderer, emoji: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the random changes: the largest size, in the middle, on exactly the colour."""
    monkeypatch.setattr(torch, "rand", lambda n, *shape, **_: torch.full((n, *shape), 0.5))
    for slots in (1, 2):
        characters = list(THINGS)[:slots]
        things = torch.tensor([[0, 1] if slots == 2 else [0, NOTHING]])
        (drawn,) = renderer.draw(things, torch.tensor([COLOURS["purple"]]))
        side = round((0.70 + 0.16 * 4 / 7 if slots == 1 else 0.38 + 0.07 * 4 / 7) * 64)
        want = Image.new("RGB", (64, 64), COLOURS["purple"])
        for character, centre in zip(characters, [32] if slots == 1 else [32 - 15, 32 + 15]):
            image = stamp(character, emoji).resize((side, side), Image.Resampling.LANCZOS)
            want.paste(image, (centre - (side + 1) // 2, 32 - (side + 1) // 2), image)
        difference = drawn.permute(1, 2, 0).int() - torch.from_numpy(np.array(want)).int()
        assert difference.abs().float().mean() < 1.0  # Pillow rounds at other places


def test_images_differ_but_not_by_much(renderer: Renderer) -> None:
    some = all_compositions()[::100]  # of every colour, many times
    images = render(renderer, some, 4, seed=3)
    assert images.shape == (4 * len(some), 3, 64, 64) and images.dtype == torch.uint8
    assert torch.equal(images, render(renderer, some, 4, seed=3))
    assert not torch.equal(images, render(renderer, some, 4, seed=4))
    for composition, four in zip(some, images.split(4)):
        assert len({image.numpy().tobytes() for image in four}) == 4
        rim = four[:, :, [0, -1]].flatten(2).median(-1).values.int()
        assert (rim - torch.tensor(composition.rgb)).abs().max() <= 6


def test_nothing_is_cut_off(renderer: Renderer) -> None:
    """White things on white: what is not white lies within the image."""
    things = torch.tensor([[i, NOTHING if i % 2 else i + 1] for i in range(100)])
    images = renderer.draw(things, torch.full((100, 3), 245))
    rim = torch.cat([images[:, :, 0], images[:, :, -1], images[..., 0], images[..., -1]], -1).int()
    assert (rim - 245).abs().max() <= 6


def test_other_sizes(emoji: Path) -> None:
    assert render(Renderer(emoji, 128), all_compositions()[:2], 1, seed=0).shape == (2, 3, 128, 128)


def test_left_and_right(renderer: Renderer) -> None:
    """Exchanging the two things of a pair exchanges the halves of the image, shifts aside."""
    pair = Composition("🐶🍎", "white", COLOURS["white"], "", False)
    swapped = Composition("🍎🐶", "white", COLOURS["white"], "", False)
    (one,), (other,) = (render(renderer, [c] * 20, 1, seed=0).float().mean(0)[None] for c in (pair, swapped))
    straight = (one - other).square().mean()
    exchanged = (one - torch.cat([other[..., 32:], other[..., :32]], -1)).square().mean()
    assert exchanged < straight / 2


def test_as_tensors() -> None:
    things, rgb = as_tensors([c for c in all_compositions() if c.caption == "a dog face on a black background"])
    assert things.tolist() == [[0, NOTHING]] and rgb.tolist() == [[20, 20, 20]]


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="npm pack @lobehub/fluent-emoji-3d@1.1.0"):
        find_emoji("🐶", tmp_path)
