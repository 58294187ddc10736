"""Command-line flags that the scripts share, and how a script ends: one clear line instead of a traceback."""

import argparse
import io
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from minidistill.formats.files import user_path
from minidistill.guidance import Interval

T = TypeVar("T", int, float)

DEFAULT_MODEL = Path(__file__).parents[2] / "weights/pocket-emoji"
if DEFAULT_MODEL.parents[1] == Path.cwd():
    DEFAULT_MODEL = DEFAULT_MODEL.relative_to(Path.cwd())  # shorter to read
DEFAULT_GUIDANCE = 4.0  # within what is usual; that model's images are right about as often from 1 to 5
DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def new_parser(description: str | None, positional: str = "", prog: str | None = None) -> argparse.ArgumentParser:
    """A parser with a one-line usage: ``positional`` followed by "[flags]".

    It checks the encoding of text and paths (``text``), and expands ~ in flags with ``type=Path`` (``user_path``).
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"%(prog)s {positional}[flags]",
        description=description,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30),
        allow_abbrev=False,
    )
    parser.register("type", Path, lambda argument: user_path(text(argument)))
    parser.register("type", None, text)
    return parser


def add_weight_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Which weights of which Stable Diffusion to read."""
    flags = parser.add_argument_group("which Stable Diffusion, and how it is loaded")
    add = flags.add_argument
    # fmt: off
    add("--model", type=Path, metavar="PATH", default=DEFAULT_MODEL, help="a folder in the official layout, a single "
        "file, or a hub id (default: %(default)s)")
    add("--ema", action="store_true", help="load the UNet's EMA weights, which some single files hold")
    add("--variant", metavar="TEXT", help='which weights of a folder or hub id to load, for example "fp16"')
    # fmt: on
    return flags


def add_model_flags(
    parser: argparse.ArgumentParser, dtypes: Sequence[str] = ("float32", "bfloat16", "float16")
) -> argparse._ArgumentGroup:
    """Which Stable Diffusion to load, and how: --model and the flags that ``load_options`` hands on."""
    flags = add_weight_flags(parser)
    add = flags.add_argument
    # fmt: off
    add("--prediction", choices=("eps", "v"), help="what the UNet predicts (default: what the model says; for an "
        "SD 2.x single file that says nothing, a guess from its weights)")
    add("--tokenizer", type=Path, metavar="PATH", help="folder with vocab.json and merges.txt (default: the model's "
        "own; for a single file, CLIP's from the hub)")
    add("--height", type=positive_int, metavar="N", help="image height in pixels (default: as trained; 1024 for SDXL)")
    add("--width", type=positive_int, metavar="N", help="image width in pixels (default: as trained; 1024 for SDXL)")
    add("--device", default=DEFAULT_DEVICE, metavar="DEVICE", help="where to compute (default: %(default)s)")
    add("--dtype", default="float32", choices=dtypes, help="dtype of the weights (default: %(default)s)")
    add("--weights", choices=("float8",), help="keep W of the UNet's linear layers and convolutions in 8 bits, half "
        "the memory of bfloat16; they are computed in --dtype (default: W has that dtype too)")
    # fmt: on
    return flags


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """The model flags as keyword arguments of ``minidistill.load``."""
    same = ("device", "prediction", "tokenizer", "ema", "variant", "height", "width", "weights")
    return {name: getattr(args, name) for name in same} | {"dtype": getattr(torch, args.dtype)}


def text(argument: str) -> str:
    """An argparse type: text, not bytes in an encoding other than the terminal's."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"not text in this terminal's encoding: {argument!r}") from None
    return argument


def out_file(argument: str) -> Path:
    """An argparse type: a file to write. Better to refuse it now than after hours of measuring."""
    path = user_path(text(argument))
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder: name a file")
    require_writable(path.absolute().parent)
    return path


def out_folder(argument: str) -> Path:
    """An argparse type: a folder to write into, which need not exist."""
    path = user_path(text(argument))
    require_writable(path.absolute())
    return path


def require_writable(folder: Path) -> None:
    """Raise ArgumentTypeError unless ``folder``, or the nearest one above it that exists, can be written into."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise argparse.ArgumentTypeError(f"{existing} is not a folder that can be written into")


def number_type(number: Callable[[str], T], holds: Callable[[T], bool], rule: str) -> Callable[[str], T]:
    """An argparse type: ``number(text)`` for which ``holds``; otherwise the error says that it must be ``rule``."""

    def read(text: str) -> T:
        value = number(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, not {text}")
        return value

    read.__name__ = number.__name__  # "invalid int value: 'x'"
    return read


positive_int = number_type(int, lambda n: n >= 1, "1 or more")
seed_number = number_type(int, lambda n: abs(n) < 2**62, "within 2**62 of 0")  # PyTorch's limit, with room to count on
finite = number_type(float, math.isfinite, "finite")
positive = number_type(float, lambda x: 0 < x < math.inf, "a number above 0")
fraction = number_type(float, lambda x: 0 <= x <= 1, "from 0 to 1")


def read_interval(ends: Sequence[float] | None) -> Interval | None:
    """The two numbers of --interval. Raises ValueError for an interval that no time step can lie in."""
    if ends and ends[0] > ends[1]:
        raise ValueError(f"--interval {Interval(*ends)} is empty: give the lower time step first.")
    return Interval(*ends) if ends else None


class ScaledFile(NamedTuple):
    """FILE[:SCALE] on a command line: a LoRA file and its strength."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, argument: str) -> "ScaledFile":
        """An argparse type. A number after the last colon is the scale, unless there is a file of that name."""
        path, colon, scale = text(argument).rpartition(":")
        whole = user_path(argument)
        try:
            file = cls(user_path(path), float(scale)) if colon and not whole.exists() else cls(whole)
        except ValueError:
            file = cls(whole)
        if not math.isfinite(file.scale):
            raise argparse.ArgumentTypeError(f"a scale must be finite, not {file.scale}")
        return file

    def __str__(self) -> str:
        return f"{self.path}:{self.scale:g}"


def provenance(command: str, argv: Sequence[str]) -> dict[str, str]:
    """The command and the git commit that made a file of results; the commit ends in "+" if the code was changed.

    ``command`` is what follows ``python``, such as "-m minidistill.bench speed".
    """
    line = shlex.join(["python", *command.split(), *argv])
    here, code = Path(__file__).parent, (":/minidistill", ":/train.py", ":/weights")
    if not shutil.which("git"):
        return dict(command=line, commit="unknown")
    head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True)
    commit = head.stdout.strip() or "unknown"
    diff = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *code], cwd=here, capture_output=True)
    if head.stdout and diff.returncode:
        commit += "+"
    return dict(command=line, commit=commit)


def run_command(program: str, doc: str, commands: Mapping[str, ModuleType], argv: Sequence[str]) -> None:
    """Run the module that ``argv`` names, or else the first: its ``add_flags(parser)``, then its ``run(args)``.

    A module that takes more than flags says so in POSITIONAL, for its usage. ``args.provenance`` is the command.
    """
    default = next(iter(commands))
    named = argv and argv[0] in ("-h", "--help", *commands)
    for_default = not argv or argv[0].startswith("-") or hasattr(commands[default], "POSITIONAL")
    if not named and for_default:
        argv = [default, *argv]
    parser = new_parser(doc, "COMMAND ", f"python -m {program}")
    parser.add_argument("command", metavar="COMMAND", choices=commands)
    name = parser.parse_args(argv[:1]).command
    module = commands[name]
    parser = new_parser(module.__doc__, getattr(module, "POSITIONAL", ""), f"python -m {program} {name}")
    module.add_flags(parser)
    args = parser.parse_args(argv[1:])
    args.provenance = provenance(f"-m {program} {name}", argv[1:])
    module.run(args)


def check_interval(interval: Interval | None, timesteps: list[int]) -> None:
    """Raise ValueError for an interval without any of the time steps."""
    if interval and not interval.includes(torch.tensor(timesteps)).any():
        raise ValueError(
            f"--interval: none of the DDIM steps, t = {timesteps}, lies inside: widen it, or take more steps."
        )


def model_name(path: Path) -> str:
    """The last part of the path of a model or a run, also of "."; where it is a link, the name of the link."""
    return Path(os.path.abspath(path)).name


def prepare(device: torch.device, compiled: bool) -> None:
    """Make a GPU the current one, with fast arithmetic.

    Raises ValueError if ``compiled`` and torch.compile does not work here.
    """
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # streams and CUDA graphs belong to the current one
        torch.backends.cuda.matmul.allow_tf32 = True  # float32 matmuls with ten bits of mantissa, as convolutions have
    if not compiled:
        return
    try:  # better now than after the teacher has sampled for hours
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # of PyTorch's compiler, whose kinds change with the version
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"--compile finds no compiler that works ({reason}): install one (g++; on a GPU, Triton needs it too), or "
            "leave --compile out."
        ) from error


OUT_OF_MEMORY = ("DefaultCPUAllocator", "MPS backend out of memory")  # how a plain RuntimeError says so


@contextmanager
def one_line_errors(script: str, stopped: str, less_memory: str = "") -> Iterator[None]:
    """Run a script; end with one line when its input is wrong, memory runs out, or somebody stops it.

    SIGTERM stops it as Ctrl-C does, with the line ``stopped``. ``less_memory`` names the flags that help when memory
    runs out, the first to try first. Other errors keep their traceback: they are bugs.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names in letters that the output's encoding lacks must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
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
        for bar in list(tqdm._instances):  # bars that the error left open, so that its message starts a new line
            bar.close()
        signal.signal(signal.SIGTERM, before)
