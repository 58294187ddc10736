"""The world of the emoji model: things on coloured backgrounds, alone and in pairs, and which are held out."""

import json
import random
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

from minidistill.formats.files import write_text

# emoji -> what a caption calls it: {"🐘": "an elephant", "🍒": "cherries"}
THINGS = dict(line.split(" ", 1) for line in (Path(__file__).parent / "things.txt").read_text("utf-8").splitlines())

COLOURS = {
    "white": (245, 245, 245),
    "black": (20, 20, 20),
    "red": (215, 45, 45),
    "yellow": (250, 215, 60),
    "green": (60, 165, 80),
    "blue": (55, 110, 220),
    "purple": (135, 65, 180),
    "pink": (250, 160, 195),
}

PAIRS_PER_THING = 8  # with the thing on the left; it stands on the right in as many
HELD_OUT_SHARE = 0.1
SEED = 0


@dataclass(frozen=True)
class Composition:
    emoji: str  # one character, or two: left and right
    colour: str  # "purple"
    rgb: tuple[int, int, int]  # of the background, 0..255
    caption: str  # "a rocket and a kite on a purple background"
    held_out: bool  # never trained on


def composition(emoji: str, colour: str, held_out: bool) -> Composition:
    things = " and ".join(THINGS[e] for e in emoji)
    return Composition(emoji, colour, COLOURS[colour], f"{things} on a {colour} background", held_out)


def single_compositions() -> list[Composition]:
    """Every thing on every colour, thing by thing.

    A tenth is held out: each thing of a shuffled list loses one colour, and the colours take turns. So no thing loses
    more than one of its eight colours, and every colour loses the same number of things, plus or minus one.
    """
    shuffled = random.Random(SEED).sample(list(THINGS), len(THINGS))
    number = round(HELD_OUT_SHARE * len(THINGS) * len(COLOURS))
    held_out = set(zip(shuffled[:number], cycle(COLOURS)))
    return [composition(e, colour, (e, colour) in held_out) for e in THINGS for colour in COLOURS]


def pair_compositions() -> list[Composition]:
    """Two things side by side, PAIRS_PER_THING times as many pairs as things; no two things meet twice, in any order.

    The things stand in a circle in random order. In round k, each is the left neighbour of the k-th after it.
    """
    rng = random.Random(SEED)
    circle = rng.sample(list(THINGS), len(THINGS))
    pairs = []
    for k in range(1, PAIRS_PER_THING + 1):
        held_out = set(rng.sample(range(len(circle)), round(HELD_OUT_SHARE * len(circle))))
        for i, left in enumerate(circle):
            right, colour = circle[(i + k) % len(circle)], rng.choice(list(COLOURS))
            pairs.append(composition(left + right, colour, i in held_out))
    return pairs


def all_compositions() -> list[Composition]:
    """All single compositions, then all pairs, always in the same order."""
    return single_compositions() + pair_compositions()


def write_compositions(path: Path, compositions: list[Composition]) -> None:
    """Write a JSON list of compositions, one per line."""
    lines = [json.dumps(asdict(c), ensure_ascii=False) for c in compositions]
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


def read_compositions(path: Path) -> list[Composition]:
    """The compositions that a model was trained on and those held out from it."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Composition(**row | {"rgb": tuple(row["rgb"])}) for row in rows]
