"""prompts.py: the grammar is whole, and what it draws is distinct, repeatable, short enough and says a/an rightly."""

import re

import pytest

from minidistill.data.prompts import GRAMMAR, SLOT, prompts, read_prompts
from minidistill.data.trajectories import prompts as module

SPECIAL_SOUNDS = {"unicorn": "a", "ukulele": "a", "hourglass": "an"}  # words whose first letter misleads about a/an


@pytest.fixture(scope="module")
def drawn():
    return prompts()


def tokens(text):
    """At least as many as CLIP makes of plain English: words, marks, one more for each six letters, two ends."""
    return 2 + sum(1 + len(part) // 7 for part in re.findall(r"\w+|[^\w\s]", text))


def longest(name):
    """The most tokens any filling of the rule can have, without the two ends."""
    return max(tokens(SLOT.sub("", text)) - 2 + sum(map(longest, SLOT.findall(text))) for text in GRAMMAR[name])


def test_every_slot_has_a_rule_and_every_rule_is_reached():
    used = {slot for texts in GRAMMAR.values() for text in texts for slot in SLOT.findall(text)}
    assert used | {"prompt"} == set(GRAMMAR)
    assert all(text and "|" not in text for texts in GRAMMAR.values() for text in texts)


def test_count_and_distinct(drawn):
    assert len(drawn) == len(set(drawn)) == 4000
    assert prompts(0) == []


def test_the_same_seed_gives_the_same_prompts(drawn):
    assert prompts(300) == prompts(300, seed=0) == drawn[:300]
    assert len(set(prompts(300, seed=1)) & set(drawn[:300])) < 30


def test_lengths_vary_and_fit_clip(drawn):
    lengths = [len(text.split()) for text in drawn]
    assert min(lengths) == 2 and 25 <= max(lengths) <= 45
    assert max(map(tokens, drawn)) <= 77 and longest("prompt") + 2 <= 77  # these, and any other seed's


def test_articles(drawn):
    for text in drawn:
        for article, word in re.findall(r"\b(an?) (\w+)", text):
            by_letter = "an" if word[0] in "aeiou" else "a"
            assert article == SPECIAL_SOUNDS.get(word, by_letter), text
            if word not in SPECIAL_SOUNDS:  # a new word that sounds unlike its spelling belongs in SPECIAL_SOUNDS
                assert not re.match(r"uni|us[ei]|uk|eu|one|once|hour|hon[eo]|heir", word) or word in {"honeybee"}, text


def test_plain_tidy_text(drawn):
    for text in drawn:
        assert re.fullmatch(r"[A-Za-zé0-9 ,'\"-]+", text), text
        assert text == text.strip() and "  " not in text and " ," not in text and ",," not in text, text
        assert not re.search(r"\b(\w+) \1\b", text), text


def test_more_than_the_grammar_gives(monkeypatch):
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
    path.write_bytes("\ufeffa red apple\r\n\r\n  un café  \n\na boat".encode())
    assert read_prompts(path) == read_prompts(str(path)) == ["a red apple", "un café", "a boat"]


@pytest.mark.parametrize("data", [b"", b" \n\n\t\n", b"\xff\xfe\x80\n", b"a\0b\n"])
def test_read_prompts_names_a_bad_file(tmp_path, data):
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="bad.txt.*one prompt a line"):
        read_prompts(path)


def test_read_prompts_names_a_missing_file(tmp_path):
    for path in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            read_prompts(path)
