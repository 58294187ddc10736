"""Command lines from dataclasses: each field is a flag, with its default and help in one place."""

import argparse
import math
from dataclasses import field, fields
from typing import Any, TypeVar

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
