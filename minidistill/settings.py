"""Command lines from dataclasses: each field is a flag, with its default and help in one place."""

import argparse
import math
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


def setting(default: Any, help: str, group: str = "options", **how: Any) -> Any:
    """A dataclass field that is a flag. ``how`` goes to argparse (``type``, ``choices``, ``nargs``, ``metavar``)."""
    return field(default=default, metadata={"help": help, "group": group, **how})


def count(text: str) -> int:
    """An argparse type: a whole number, 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"it has to be 1 or more, not {value}")
    return value


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"it has to be a number above 0, not {text}")
    return value


class ScaledFile(NamedTuple):
    """FILE[:SCALE] on a command line: a file, and how much of it counts."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "ScaledFile":
        """An argparse type. What follows the last colon is a scale if it is a number, and part of the name if not."""
        path, colon, scale = text.rpartition(":")
        try:
            found = cls(Path(path), float(scale)) if colon else cls(Path(text))
        except ValueError:
            found = cls(Path(text))
        if not math.isfinite(found.scale):
            raise argparse.ArgumentTypeError(f"a scale has to be finite, not {found.scale}")
        return found

    def __str__(self) -> str:
        return f"{self.path}:{self.scale:g}"


def parse(settings: type[T], description: str, argv: list[str] | None = None) -> T:
    """Read the command line into a ``settings`` dataclass. A default of ``...`` makes it positional."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    groups: dict[str, Any] = {}
    for f in fields(settings):
        how = dict(f.metadata)
        name = how.pop("group")
        group = groups.setdefault(name, parser.add_argument_group(name))
        if f.default is ...:
            group.add_argument(f.name, **how)
            continue
        if isinstance(f.default, bool):
            how["action"] = "store_true"
        elif f.default is not None:
            how.setdefault("type", type(f.default))
            how["help"] += " (default: %(default)s)"
        group.add_argument("--" + f.name.replace("_", "-"), default=f.default, **how)
    return settings(**vars(parser.parse_args(argv)))
