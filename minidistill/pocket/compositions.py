"""The world of the embedded model: every emoji on every colour, and which pairs are held out for evaluation."""

import json
import random
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path

from minidistill.formats.files import atomic_write

ANIMALS = (
    "🐶🐱🐭🐹🐰🦊🐻🐼🐨🐯🦁🐮🐷🐸🐵🐔🐧🐦🐤🦉🐺🐗🐴🦄🐝🐛🦋🐌🐞🐜🐢🐍🦎🐙🦑🦀🐡🐠🐟🐬🐳🦈🐊🐘🦒🐪🐏🦌🐓🦃🦜🦢🦩🐿🦔"
)
FOOD = "🍎🍐🍊🍋🍌🍉🍇🍓🍒🍑🥭🍍🥥🥝🍅🍆🥑🥦🌽🥕🥔🥐🍞🧀🥚🍳🥓🍔🍟🍕🌭🌮🍣🍦🍩🍪🎂🍰🧁🍫🍭☕🍺🍷🍄🌰"
OUTDOORS = "🌲🌵🌴🍀🍁🌹🌻🌷🌸🌼🌍🌙⭐🌈☁⚡🔥💧⛄🌊☀🚗🚕🚌🚑🚒🚜🚲🚂🚀🚁⛵🚢✈🛸🎈"
THINGS = "⚽🏀🏈🎾🎱🎸🎺🎻🥁🎨🎁🏆👑💎🔑🔒💡⏰📷📺💻📱📚🔨🔔☂🎩👟👕👗🏠🏰⛺🤖👻🎃👽💀👾❤🙂😎😡🤡🧸🪁🦴🍿"
EMOJI = ANIMALS + FOOD + OUTDOORS + THINGS

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

HELD_OUT_SHARE = 0.1
HELD_OUT_SEED = 0


@dataclass(frozen=True)
class Composition:
    emoji: str  # one character
    name: str  # "rocket"
    colour: str  # "purple"
    rgb: tuple[int, int, int]  # of the background, 0..255
    caption: str  # "a rocket on a purple background"
    held_out: bool  # never trained on


def all_compositions() -> list[Composition]:
    """Every emoji on every colour, emoji by emoji, always in the same order.

    A tenth of the pairs is held out: each emoji of a shuffled list loses one colour, and the colours take turns. So no
    emoji loses more than one of its eight colours, and every colour loses the same number of emoji, plus or minus one.
    """
    emoji, colours = list(EMOJI), list(COLOURS)
    random.Random(HELD_OUT_SEED).shuffle(emoji)
    number = round(HELD_OUT_SHARE * len(emoji) * len(colours))
    held_out = {(e, colours[i % len(colours)]) for i, e in enumerate(emoji[:number])}

    compositions = []
    for e in EMOJI:
        name = unicodedata.name(e).lower().replace("-", " ")
        for colour, rgb in COLOURS.items():
            caption = f"a {name} on a {colour} background"
            compositions.append(Composition(e, name, colour, rgb, caption, (e, colour) in held_out))
    return compositions


def write_compositions(path: str | Path) -> None:
    """Write all compositions as a JSON list of `name, colour, rgb, caption, held_out`, one per line."""
    rows = [asdict(c) for c in all_compositions()]
    lines = [json.dumps({key: row[key] for key in row if key != "emoji"}) for row in rows]
    with atomic_write(path) as file:
        file.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
