"""Atomic writes, JSON, and the error for files that cannot be used."""

import hashlib
import json
import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

JSON_LIMIT = 2**20  # bytes. Parsed JSON can take thirty times as much; configurations are far smaller


class CheckpointError(ValueError):
    """A file that cannot be used. The message names the file, says what is wrong with it, and what to do."""


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn any error that untrusted contents cause while they are read into a CheckpointError that names ``file``."""
    try:
        yield
    except (CheckpointError, PermissionError):
        raise
    except Exception as error:
        reason = traceback.format_exception_only(error)[-1].splitlines()[0]  # str(error) may itself fail
        raise CheckpointError(f"{file} is damaged ({reason}): fetch it again.") from error


def user_path(path: str | Path) -> Path:
    """The path, with ~ for the home folder. The shell leaves ~ alone after "=" and in quotes."""
    return Path(os.path.expanduser(path))


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; rename it to ``path`` on success, delete it on failure.

    Whatever interrupts the writing, ``path`` holds either its old contents or the complete new ones.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and not error.filename:  # a bare "No space left on device" does not name the file
            error.filename = str(path)
        raise
    except SafetensorError as error:  # also raised when the disk is full
        raise OSError(f"{path} could not be written. {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Like ``atomic_write``, for a new folder. Raises ValueError if it exists already."""
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already: name another folder, or delete it.")
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                fsync(file)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fsync(file: Path) -> None:
    """Force the contents to disk. Without this, a power cut after the rename could leave an empty file."""
    with file.open("r+b") as handle:
        os.fsync(handle.fileno())


def read_json(file: Path) -> dict:
    """The JSON object in ``file``. Raises CheckpointError."""
    if file.exists() and file.stat().st_size > JSON_LIMIT:
        raise CheckpointError(f"{file} is far too long for a configuration: fetch it again.")
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: fetch the whole model folder.") from None
    except PermissionError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable JSON ({error}): fetch it again.") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{file} is not the JSON of a configuration: fetch it again.")
    return contents


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, contents: dict) -> None:
    write_text(path, json.dumps(contents, indent=2) + "\n")


def digest(data: bytes) -> str:
    """A short hash that identifies ``data``."""
    return hashlib.sha256(data).hexdigest()[:16]
