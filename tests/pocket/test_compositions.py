"""The world of the emoji model: its things, its captions, what is held out."""

from collections import Counter
from pathlib import Path

from minidistill.pocket.compositions import (
    COLOURS,
    PAIRS_PER_THING,
    THINGS,
    all_compositions,
    pair_compositions,
    read_compositions,
    single_compositions,
    write_compositions,
)


def test_captions_are_english() -> None:
    captions = {c.caption for c in all_compositions()}
    assert len(captions) == len(all_compositions())
    assert {
        "an elephant on a red background",
        "cherries on a white background",
        "a jack-o-lantern on a pink background",
    } <= captions
    for phrase in THINGS.values():
        article, word = (phrase.split() + [""])[:2]
        if article in ("a", "an"):
            assert (article == "an") == (word[0] in "aeiou" and not word.startswith("uni")), phrase
    assert all(c.caption.count(" and ") == len(c.emoji) - 1 for c in all_compositions())


def test_a_tenth_of_each_kind_is_held_out() -> None:
    for kind in (single_compositions(), pair_compositions()):
        assert sum(c.held_out for c in kind) == round(0.1 * len(kind))


def test_every_thing_and_colour_is_trained() -> None:
    trained = [c for c in single_compositions() if not c.held_out]
    assert {c.colour for c in trained} == set(COLOURS)
    assert min(Counter(c.emoji for c in trained).values()) == len(COLOURS) - 1


def test_things_meet_once_and_stand_as_often_left_as_right() -> None:
    pairs = pair_compositions()
    assert len({frozenset(c.emoji) for c in pairs}) == len(pairs)
    for place in (0, 1):
        assert set(Counter(c.emoji[place] for c in pairs).values()) == {PAIRS_PER_THING}


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    write_compositions(tmp_path / "new/compositions.json", all_compositions())
    assert read_compositions(tmp_path / "new/compositions.json") == all_compositions()
