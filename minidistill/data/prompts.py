"""Prompts to distil with: four thousand of our own, from the grammar in grammar.toml, or yours from a text file."""

import json
import math
import random
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from minidistill.formats.files import reading, user_path

T = TypeVar("T")

RULES = tomllib.loads(Path(__file__).with_name("grammar.toml").read_text(encoding="utf-8"))
GRAMMAR = {name: " ".join(alternatives.split()).split(" | ") for name, alternatives in RULES.items()}

SLOT = re.compile(r"\{(\w+)\}")
AN = re.compile(r"\ba (?=(?!unicorn|ukulele)[aeiou]|hour)")  # the rules write "a" everywhere; here it becomes "an"
LONG_WORD = re.compile(r"\w{5,}")
PATIENCE = 2000  # draws in a row without a new prompt before the grammar counts as used up


def ways(name: str) -> int:
    """How many ways there are to fill the rule: an upper bound on its distinct prompts."""
    return sum(math.prod(ways(slot) for slot in SLOT.findall(text)) for text in GRAMMAR[name])


def expand(text: str, rng: random.Random) -> str:
    """Fill every {slot} of ``text``, recursively."""
    return SLOT.sub(lambda slot: expand(rng.choice(GRAMMAR[slot[1]]), rng), text)


def prompts(count: int = 4000, seed: int = 0) -> list[str]:
    """``count`` distinct English prompts, the same for the same seed; a smaller count gives the first of them.

    All fit in CLIP's 77 tokens. Raises ValueError if the grammar cannot give ``count`` different ones.
    """
    limit = ways("prompt")
    if not 0 <= count <= limit:
        raise ValueError(f"prompts() was asked for {count} distinct prompts; the grammar gives 0 to {limit}")
    rng, distinct, misses = random.Random(seed), {}, 0  # distinct: a dict, as a set that keeps the order
    while len(distinct) < count and misses < PATIENCE:
        text = AN.sub("an ", expand("{prompt}", rng))
        words = LONG_WORD.findall(text)
        if text not in distinct and len(set(words)) == len(words):  # the same long word twice reads badly: draw again
            distinct[text], misses = None, 0
        else:
            misses += 1
    if len(distinct) < count:
        raise ValueError(f"prompts() was asked for {count} distinct prompts; the grammar ran out at {len(distinct)}")
    return list(distinct)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a UTF-8 text file, one per line, blank lines skipped.

    Raises FileNotFoundError if there is no such file, ValueError if it is not UTF-8 text or has no prompt.
    """
    path, advice = user_path(path), "give a UTF-8 text file with one prompt per line"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: {advice}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {advice}") from error
    if "\0" in text:  # valid UTF-8, but not text
        raise ValueError(f"{path} is not UTF-8 text: {advice}")
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if not lines:
        raise ValueError(f"{path} has no prompts: {advice}")
    return lines


def prompt_split(model_folder: Path, file: Path | None = None) -> tuple[list[str], list[str]]:
    """Prompts to learn from, and prompts held out for evaluation.

    They come from a text ``file`` (one per line); else from the captions in the model folder's ``compositions.json``,
    which says which are held out; else from our own list. Raises ValueError if ``compositions.json`` lacks either kind.
    """
    compositions = model_folder / "compositions.json"
    if file is None and compositions.is_file():
        with reading(compositions):
            rows = json.loads(compositions.read_text(encoding="utf-8"))
            learned = [r["caption"] for r in rows if not r["held_out"]]
            held_out = [r["caption"] for r in rows if r["held_out"]]
        if not (learned and held_out):
            raise ValueError(f"{compositions} must have captions to learn from and captions that are held out.")
        return learned, held_out
    return every_tenth_held_out(read_prompts(file) if file else prompts())


def every_tenth_held_out(listed: Iterable[str]) -> tuple[list[str], list[str]]:
    """Distinct prompts to learn from, and every tenth for evaluation. A single prompt serves as both."""
    distinct = list(dict.fromkeys(listed))
    held_out = distinct[::10]
    return [p for i, p in enumerate(distinct) if i % 10] or held_out, held_out


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of the items, evenly spread, because neighbours in a list of prompts are alike."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
