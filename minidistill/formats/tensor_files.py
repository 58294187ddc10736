"""A file of named tensors, whatever its format: told by its first bytes, described without reading the tensors.

And written, as safetensors.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minidistill.formats.files import CheckpointError, blamed, written_whole
from minidistill.formats.pickles import read_pickle
from minidistill.formats.stored import MappedFile, StoredTensor, is_shape, row_major

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # as safetensors calls them

HEADER_LIMIT = 2**20  # bytes, and in a large file more

# What people have in place of a checkpoint, by its first bytes.
MISTAKEN = {
    b"<": "a web page: the download went wrong. Fetch the file itself",
    b"version https://git-lfs": "a pointer of Git LFS, not the file it stands for: run `git lfs pull`",
    b"{": "a JSON text: name a checkpoint",
    b"GGUF": "a GGUF file, which is not read here: fetch the .safetensors",
}


def read_tensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a .safetensors, .ckpt or .bin file by name, and the metadata of a .safetensors.

    Nothing in the file is run, and no tensor is read. Raises CheckpointError.
    """
    if not path.is_file():
        what = "a folder, where a file should be" if path.is_dir() else "missing"
        raise CheckpointError(f"{path} is {what}: fetch the file anew, or name another.")
    with blamed(path):
        with path.open("rb") as file:
            head = file.read(64)
        if not head:
            raise CheckpointError(f"{path} is empty: fetch it again.")
        if head[8:9] == b"{":
            return read_safetensors(MappedFile(path))
        if head.startswith((b"PK\3\4", b"\x80")):
            return read_pickle(MappedFile(path)), {}
        for start, what in MISTAKEN.items():
            if head.lstrip().startswith(start):
                raise CheckpointError(f"{path} is not a readable checkpoint but {what}.")
    raise CheckpointError(
        f"{path} is not a readable checkpoint: neither safetensors nor what PyTorch writes. Fetch it again."
    )


def read_safetensors(file: MappedFile) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Eight bytes with the header's length, the header as JSON, and the tensors, each where the one before it ends."""

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{file.path} is not a readable safetensors file: {what}. Fetch it again.")

    with file.path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        # Parsed, a header is many times its length; those of honest files are a small part of the whole.
        if length > min(HEADER_LIMIT + file.size // 16, file.size - 8):
            raise refuse(f"its header is said to have {length:,} bytes, the file has {file.size:,}")
        header = json.loads(opened.read(length))
    metadata = header.pop("__metadata__", {})
    if not all(isinstance(text, str) for text in metadata.values()):
        raise refuse("its metadata are not text")

    tensors, spans = {}, []
    for name, entry in header.items():
        dtype, shape, (start, stop) = DTYPES.get(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        if dtype is None:
            raise refuse(f"{name} has the unknown dtype {entry['dtype']}")
        if not is_shape(shape) or not is_shape((start, stop)):
            raise refuse(f"{name} has the shape {list(shape)} and the offsets {start} to {stop}")
        if stop - start != prod(shape) * dtype.itemsize:
            raise refuse(f"{name} takes {stop - start:,} bytes, which its shape {list(shape)} does not")
        tensors[name] = StoredTensor(file, 8 + length + start, dtype, shape, row_major(shape))
        spans.append((start, stop))

    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise refuse(f"its tensors overlap, or leave a gap, at byte {start:,}")
        end = stop
    if end != file.size - 8 - length:
        raise refuse(f"its tensors take {end:,} bytes, and the file has {file.size - 8 - length:,} for them")
    return tensors, metadata


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write safetensors whole, equal bytes for equal contents."""
    with written_whole(path) as beside:
        beside.touch()
        mode = beside.stat().st_mode
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, {**metadata, "format": "pt"})
        sort_header(beside)
        beside.chmod(mode)  # the library's files are for their owner only


def sort_header(path: Path) -> None:
    """Put the metadata of a safetensors in order: the library's order differs from call to call."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        contents = json.loads(file.read(length))
        header = json.dumps(contents, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(header.ljust(length))  # spaces at the end, as before: the tensors stay where they are
