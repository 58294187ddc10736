"""What the scripts share: flags from a dataclass, each with its default and help in one place; and how they end."""

import argparse
import math
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm import tqdm

T = TypeVar("T")

# The headings of the groups of flags in --help.
GROUPS = {
    "what": "what to draw",
    "model": "which Stable Diffusion, and how it is loaded",
    "teacher": "the teacher, two UNet calls a step, draws pictures",
    "student": "the student, one UNet call a step, learns from them",
    "how": "how it is done",
    "run": "the run itself",
}


def setting(default: Any, help: str, group: str = "options", **how: Any) -> Any:
    """A dataclass field that is a flag. ``how`` goes to argparse (``type``, ``choices``, ``nargs``, ``metavar``)."""
    return field(default=default, metadata={"help": help, "group": group, **how})


@dataclass
class ModelSettings:
    """Which Stable Diffusion, and how it is loaded: what the scripts' settings begin with."""

    model: Path = setting(
        Path("weights/pocket-emoji"),
        "Stable Diffusion: a folder in the official layout, a single file, or a hub id",
        "model",
    )
    ema: bool = setting(False, "take the UNet's averaged copy, which some single files hold", "model")
    variant: str = setting(None, 'which weights of a folder or hub id, for example "fp16"', "model", type=str)
    prediction: str = setting(
        None,
        "what the UNet predicts (default: as the model says; of an SD 2.x single file v)",
        "model",
        type=str,
        choices=("eps", "v"),
    )
    tokenizer: Path = setting(
        None,
        "folder with vocab.json and merges.txt (default: the model's own; of a single file the hub's)",
        "model",
        type=Path,
    )
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "where to compute", "model", metavar="DEVICE")
    dtype: str = setting("float32", "dtype of the weights", "model", choices=("float32", "bfloat16", "float16"))

    def load_options(self) -> dict[str, Any]:
        """All but ``model``, as ``minidistill.load`` takes it."""
        same = ("device", "prediction", "tokenizer", "ema", "variant")
        return {name: getattr(self, name) for name in same} | {"dtype": getattr(torch, self.dtype)}


def count(text: str) -> int:
    """An argparse type: a whole number, 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"it has to be 1 or more, not {value}")
    return value


def seed_number(text: str) -> int:
    """An argparse type: a whole number that PyTorch takes for a seed, and those counted on from it too."""
    value = int(text)
    if abs(value) >= 2**62:
        raise argparse.ArgumentTypeError(f"a seed has to be within 2**62 of 0, not {text}")
    return value


def finite(text: str) -> float:
    """An argparse type: any number but inf and nan."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"it has to be finite, not {text}")
    return value


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"it has to be a number above 0, not {text}")
    return value


def share(text: str) -> float:
    """An argparse type: a part of a whole, from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"it has to be from 0 to 1, not {text}")
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


METAVARS = {int: "N", count: "N", seed_number: "N", float: "X", finite: "X", positive: "X", share: "SHARE", str: "TEXT"}
METAVARS |= {Path: "PATH", type(Path()): "PATH"}


def parse(settings: type[T], description: str, argv: list[str] | None = None) -> T:
    """Read the command line into a ``settings`` dataclass. A default of ``...`` makes it positional."""
    # Positional ones first, and with them their group: fields that are inherited would stand before it.
    ordered = sorted(fields(settings), key=lambda f: f.default is not ...)
    positional = "".join(
        f"{f.metadata.get('metavar', f.name.upper())} {'... ' if 'nargs' in f.metadata else ''}"
        for f in ordered
        if f.default is ...
    )
    parser = argparse.ArgumentParser(
        usage=f"%(prog)s {positional}[flags]",  # all of them by name would fill the screen
        description=description,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30),
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for f in ordered:
        how = dict(f.metadata)
        name = how.pop("group")
        if name not in groups:
            groups[name] = parser.add_argument_group(GROUPS.get(name, name))
        if f.default is ...:
            groups[name].add_argument(f.name, **how)
            continue
        if isinstance(f.default, bool):
            how["action"] = "store_true"
        elif f.default is not None:
            how.setdefault("type", type(f.default))
            how["help"] += " (default: none)" if f.default == "" else " (default: %(default)s)"
        if "action" not in how and "choices" not in how:
            how.setdefault("metavar", METAVARS.get(how.get("type")))
        groups[name].add_argument("--" + f.name.replace("_", "-"), default=f.default, **how)
    return settings(**vars(parser.parse_args(argv)))


def made_by(module: str, argv: Sequence[str]) -> dict[str, str]:
    """What every file of results says of itself: the command, and the commit of the code; "+" if that was changed."""
    command = shlex.join(["python", "-m", module, *argv])
    here, code = Path(__file__).parent, (":/minidistill", ":/train.py", ":/weights")
    if not shutil.which("git"):
        return dict(command=command, commit="unknown")
    head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *code], cwd=here, capture_output=True).returncode
    return dict(command=command, commit=head.stdout.strip() + "+" * bool(changed) if head.stdout else "unknown")


OUT_OF_MEMORY = ("DefaultCPUAllocator", "MPS backend out of memory")  # what says so in a plain RuntimeError


@contextmanager
def one_sentence(script: str, stopped: str, less_memory: str = "") -> Iterator[None]:
    """Run a script: what was wrong with its input, or that it was ``stopped``, is one sentence and no traceback.

    SIGTERM stops it as Ctrl-C does. ``less_memory`` says which flags help when memory runs out, the first to try first.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except (ValueError, OSError) as error:  # a CheckpointError is a ValueError
        sys.exit(f"{script}: {error}")
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        sys.exit(f"{script}: out of memory. {less_memory}")
    except KeyboardInterrupt:
        sys.exit(f"{script}: {stopped}")
    finally:
        for bar in list(tqdm._instances):  # that an error left open: what is said of it has a line of its own
            bar.close()
        signal.signal(signal.SIGTERM, before)
