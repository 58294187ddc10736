"""data/prompts.py: the grammar is complete; its prompts are distinct, repeatable, short enough, with the right a/an."""

import json
import re
from pathlib import Path

import pytest

import minidistill.data.prompts as module
from minidistill.data.prompts import (
    GRAMMAR,
    SLOT,
    every_tenth_held_out,
    prompt_split,
    prompts,
    read_prompts,
    spread,
)

SPECIAL_SOUNDS = {"unicorn": "a", "ukulele": "a", "hourglass": "an"}  # words whose first letter misleads about a/an


@pytest.fixture(scope="module")
def ours():
    return prompts()


def tokens(text):
    """An upper bound on CLIP's tokens for plain English: words, marks, one more for each six letters, two ends."""
    return 2 + sum(1 + len(part) // 7 for part in re.findall(r"\w+|[^\w\s]", text))


def longest(name):
    """The most tokens that the rule can expand to, without the two ends."""
    return max(tokens(SLOT.sub("", text)) - 2 + sum(map(longest, SLOT.findall(text))) for text in GRAMMAR[name])


def test_every_slot_has_a_rule_and_every_rule_is_reached():
    used = {slot for texts in GRAMMAR.values() for text in texts for slot in SLOT.findall(text)}
    assert used | {"prompt"} == set(GRAMMAR)
    assert all(text and "|" not in text for texts in GRAMMAR.values() for text in texts)


def test_count_and_distinct(ours):
    assert len(ours) == len(set(ours)) == 4000
    assert prompts(0) == []


def test_the_same_seed_gives_the_same_prompts(ours):
    assert prompts(300) == prompts(300, seed=0) == ours[:300]
    assert len(set(prompts(300, seed=1)) & set(ours[:300])) < 30


def test_lengths_vary_and_fit_clip(ours):
    lengths = [len(text.split()) for text in ours]
    assert min(lengths) == 2 and 25 <= max(lengths) <= 45
    assert max(map(tokens, ours)) <= 77 and longest("prompt") + 2 <= 77  # with this seed and any other


def test_articles(ours):
    for text in ours:
        for article, word in re.findall(r"\b(an?) (\w+)", text):
            by_letter = "an" if word[0] in "aeiou" else "a"
            assert article == SPECIAL_SOUNDS.get(word, by_letter), text
            if word not in SPECIAL_SOUNDS:  # a new word that sounds unlike its spelling belongs in SPECIAL_SOUNDS
                assert not re.match(r"uni|us[ei]|uk|eu|one|once|hour|hon[eo]|heir", word) or word in {"honeybee"}, text


def test_plain_tidy_text(ours):
    for text in ours:
        assert re.fullmatch(r"[A-Za-zé0-9 ,'\"-]+", text), text
        assert text == text.strip() and "  " not in text and " ," not in text and ",," not in text, text
        assert not re.search(r"\b(\w+) \1\b", text), text


def test_asking_for_more_prompts_than_the_grammar_has(monkeypatch):
    with pytest.raises(ValueError, match="distinct prompts"):
        prompts(10**30)
    with pytest.raises(ValueError, match="-1 distinct"):
        prompts(-1)
    monkeypatch.setattr(module, "GRAMMAR", {"prompt": ["a {pet}", "a cat"], "pet": ["cat", "owl"]})
    assert sorted(prompts(2)) == ["a cat", "an owl"]
    with pytest.raises(ValueError, match="ran out at 2"):
        prompts(3)


def test_read_prompts(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffa red apple\r\n\r\n  un café  \n\ra boat\nan\u2028owl".encode())
    assert read_prompts(path) == read_prompts(str(path)) == ["a red apple", "un café", "a boat", "an\u2028owl"]


@pytest.mark.parametrize("data", [b"", b" \n\n\t\n", b"\xff\xfe\x80\n", b"a\0b\n"])
def test_read_prompts_names_a_bad_file(tmp_path, data):
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="bad.txt.*one prompt per line"):
        read_prompts(path)


def test_read_prompts_names_a_missing_file(tmp_path):
    for path in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            read_prompts(path)


# Split into prompts to learn from and prompts held out


def test_a_model_brings_its_own_captions(tmp_path: Path):
    rows = [dict(caption="a", held_out=False), dict(caption="b", held_out=True), dict(caption="c", held_out=False)]
    (tmp_path / "compositions.json").write_text(json.dumps(rows))
    assert prompt_split(tmp_path) == (["a", "c"], ["b"])


def test_a_file_overrides_the_captions_of_the_model(tmp_path: Path, prompts_file: Path):
    (tmp_path / "compositions.json").write_text(json.dumps([dict(caption="a", held_out=False)]))
    lines = prompts_file.read_text().splitlines()
    train, held_out = prompt_split(tmp_path, prompts_file)
    assert held_out == lines[::10] and sorted(train + held_out) == sorted(lines)


@pytest.mark.parametrize(
    "contents, complaint",
    [
        ("[{", "is damaged"),
        ('[{"held_out": false}]', "is damaged"),
        ('[{"caption": "a", "held_out": false}]', "must have captions"),
    ],
)
def test_unusable_compositions_are_named(contents: str, complaint: str, tmp_path: Path):
    (tmp_path / "compositions.json").write_text(contents)
    with pytest.raises(ValueError, match=f"compositions.json {complaint}"):
        prompt_split(tmp_path)


def test_our_own_list_is_split(tmp_path: Path):
    train, held_out = prompt_split(tmp_path)
    assert len(train) >= 2000 and len(held_out) >= 200 and not set(train) & set(held_out)


def test_a_single_prompt_serves_as_both(tmp_path: Path):
    (tmp_path / "one.txt").write_text("a red apple\n")
    assert prompt_split(tmp_path, tmp_path / "one.txt") == (["a red apple"], ["a red apple"])


def test_every_tenth_distinct_prompt_is_held_out():
    names = [f"prompt {i}" for i in range(25)]
    train, held_out = every_tenth_held_out(names + names[:7])
    assert held_out == ["prompt 0", "prompt 10", "prompt 20"]
    assert train == [name for name in names if name not in held_out]


@pytest.mark.parametrize("count, expected", [(3, [0, 3, 6]), (10, list(range(10))), (99, list(range(10))), (1, [0])])
def test_spread_takes_evenly_spaced_items(count: int, expected: list[int]):
    assert spread(range(10), count) == expected
