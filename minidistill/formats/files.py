"""Files that are written whole or not at all, and the error of those that cannot be used."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. Says which file, what is wrong with it, and what to do."""


@contextmanager
def blamed(file: Path) -> Iterator[None]:
    """Whatever goes wrong in reading contents that may be anything is a CheckpointError about ``file``."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{file} is damaged ({type(error).__name__}: {error}): fetch it again.") from error


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a name beside ``path`` to write to; rename it when the block ends well, remove it when it does not.

    So ``path`` holds the old contents or the new, never half of them, whatever interrupts the writing.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield beside
        to_disk(beside)
        os.replace(beside, path)
    except OSError as error:
        if error.errno and not error.filename:  # "No space left on device" by itself does not say for what
            error.filename = str(path)
        raise
    except SafetensorError as error:  # of a full disk too
        raise OSError(f"{path} could not be written. {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def to_disk(file: Path) -> None:
    """Before it is renamed: or a power cut could leave the new name without its contents."""
    with file.open("r+b") as handle:
        os.fsync(handle.fileno())


@contextmanager
def folder_written_whole(folder: str | Path) -> Iterator[Path]:
    """The same for a folder that is not there yet. Raises ValueError when it is."""
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already: name another folder, or delete it.")
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed here
    try:
        beside.mkdir(parents=True)
        yield beside
        for file in beside.rglob("*"):
            if file.is_file():
                to_disk(file)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def digest(data: bytes) -> str:
    """To tell contents apart by."""
    return hashlib.sha256(data).hexdigest()[:16]


atomic_write, atomic_folder, reading = written_whole, folder_written_whole, blamed
