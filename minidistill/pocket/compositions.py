"""The little world the embedded model knows: every emoji on every colour, and which pairs are kept for evaluation."""

import json
import random
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path

from minidistill.formats.files import written_whole

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
    rgb: tuple[int, int, int]  # the background, 0..255
    caption: str  # "a rocket on a purple background"
    held_out: bool  # never trained on


def all_compositions() -> list[Composition]:
    """Every emoji on every colour, emoji by emoji, always in the same order.

    A tenth of the pairs is held out: emoji in a shuffled order lose one colour each, the colours taking turns. So no
    emoji loses more than one of its eight colours, and the colours lose equally many emoji, give or take one.
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
    """Write all compositions as a JSON list of `name, colour, rgb, caption, held_out`, one to a line."""
    rows = [asdict(c) for c in all_compositions()]
    lines = [json.dumps({key: row[key] for key in row if key != "emoji"}) for row in rows]
    with written_whole(path) as beside:
        beside.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
