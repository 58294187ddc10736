"""Files of named tensors: .safetensors read and written, PyTorch's own .ckpt and .bin read without running them."""

import ctypes
import io
import json
import math
import mmap
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor, _weights_only_unpickler, nn

from minidistill.formats.files import CheckpointError, atomic_write, reading

# What people have instead of a checkpoint, by its first bytes.
NOT_CHECKPOINTS = {
    b"<": "a web page: the download went wrong. Fetch the file itself",
    b"version https://git-lfs": "a pointer of Git LFS instead of the file itself: run `git lfs pull`",
    b"{": "a JSON text: name a checkpoint",
    b"GGUF": "a GGUF file, which minidistill does not read: fetch the .safetensors",
}
# What compiling and distributed training put into the names of a network that is saved without taking them off.
WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|^module\.")
# Pickle's instructions that leave a list, dict or tuple on the stack, by the ends of their names.
CONTAINERS = ("LIST", "DICT", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS")
NEW = object()  # stands for such a container that is not in the memo
# A .ckpt that names one of these was made to run code. Any other class or function gets a harmless stand-in.
ATTACKS = ("os.", "posix.", "nt.", "sys.", "subprocess.", "builtins.eval", "builtins.exec")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a .safetensors, .ckpt or .bin file by name, and the metadata of a .safetensors.

    The tensors are mapped: the file is read when their values are used, and writing to them leaves it unchanged.
    Nothing in the file is run. Names lose what ``torch.compile`` and the like put into them. Raises CheckpointError.
    """
    tensors, metadata = read_raw(path)
    unwrapped = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if len(unwrapped) < len(tensors):
        raise CheckpointError(f"{path} has the same tensors under two names: save it again without a wrapper.")
    return unwrapped, metadata


def read_raw(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``read_tensors``, by the names in the file."""
    if not path.is_file():
        problem = "a folder, where a file should be" if path.is_dir() else "missing"
        raise CheckpointError(f"{path} is {problem}: fetch the file again, or name another.")
    with reading(path):
        with path.open("rb") as file:
            head = file.read(64)
        if not head:
            raise CheckpointError(f"{path} is empty: fetch it again.")
        if head[8:9] == b"{":
            return read_safetensors(path)
        if head.startswith((b"PK\3\4", b"\x80")):
            return read_pickle(path, zipped=head.startswith(b"PK")), {}
    for start, mistake in NOT_CHECKPOINTS.items():
        if head.lstrip().startswith(start):
            raise CheckpointError(f"{path} is not a readable checkpoint but {mistake}.")
    raise CheckpointError(f"{path} is not a readable checkpoint, neither safetensors nor PyTorch's: fetch it again.")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        if "invalid type: null, expected a string" in str(error):
            return read_null_metadata(path)
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}): fetch it again.") from error


def read_null_metadata(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file with nulls in its metadata, which some programs write and safetensors rejects. Nothing is mapped."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        stated = {key: value for key, value in header.pop("__metadata__").items() if value is not None}
        metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in stated.items()}
        text = json.dumps(header).encode()
        tensors = load(len(text).to_bytes(8, "little") + text + file.read())
    return {name: tensor.clone() for name, tensor in tensors.items()}, metadata  # memory that may be written to


class StandIn:
    """Replaces every class and function in a .ckpt that tensors do not need. Calling it does nothing."""

    __slots__ = ()

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_pickle(path: Path, zipped: bool) -> dict[str, Tensor]:
    """The tensors of the dict in a .ckpt or .bin, or of the ``state_dict`` inside that dict.

    PyTorch's restricted unpickler builds tensors and plain containers only. It is told to put a StandIn wherever
    anything else is named, such as the callbacks of a training framework. ``zipped``: the format since PyTorch 1.6.
    """
    if zipped and path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is a PyTorch file under the wrong name: rename it to .ckpt.")
    if zipped:
        check_archive(path)
    try:
        names = unknown_globals(path, zipped)
        if attacks := sorted(name for name in names if name.startswith(ATTACKS)):
            raise CheckpointError(f"{path} tries to run code ({', '.join(attacks)[:100]}): do not use this file.")
        with torch.serialization.safe_globals([(StandIn, name) for name in names]):
            root = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n\nCheck the documentation")[0].rpartition("\n")[2]  # without its unsafe advice
        raise CheckpointError(
            f"{path} holds more than tensors and plain data, or is damaged ({reason[:200]}): convert it to "
            ".safetensors where it was made, or fetch it again."
        ) from error
    # dict.get(x) instead of x.get(): the file can set attributes of its OrderedDicts.
    if isinstance(root, dict) and isinstance(dict.get(root, "state_dict"), dict):
        root = dict.get(root, "state_dict")
    items = dict.items(root) if isinstance(root, dict) else ()
    tensors = {name: Tensor.detach(value) for name, value in items if isinstance(name, str) and is_plain(value)}
    if not tensors:
        raise CheckpointError(f"{path} holds no named tensors: it is not a checkpoint of a model.")
    # Tensors may share storage, but a file whose tensors together exceed it would fill the memory.
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * path.stat().st_size:
        raise CheckpointError(f"{path} holds tensors larger than itself: do not use this file.")
    if not zipped and not all(tensor.untyped_storage().resizable() for tensor in tensors.values()):
        raise CheckpointError(f"{path} holds views of storages, as PyTorch wrote them before 0.4: save it again.")
    return tensors


def is_plain(value: object) -> bool:
    """True for an ordinary dense tensor."""
    if type(value) not in (Tensor, nn.Parameter):
        return False
    return value.layout is torch.strided and value.is_cpu and not value.is_quantized


def unknown_globals(path: Path, zipped: bool) -> set[str]:
    """The classes and functions that a PyTorch file names, beyond those that torch.load(weights_only=True) allows."""
    if zipped:
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    with path.open("rb") as file:  # five pickles: magic number, version, system, contents, names of storages
        names = set().union(*(_weights_only_unpickler.get_globals_in_pkl(file) for _ in range(5)))
        file.seek(0)
        for _ in range(5):
            check_nesting(file)
    return names - _weights_only_unpickler._get_allowed_globals().keys()


def check_archive(path: Path) -> None:
    """Raise unless every record is uncompressed and ends before the next: torch.load(mmap=True) relies on both."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        ends = [*(record.header_offset for record in records[1:]), archive.start_dir]
        for record, end in zip(records, ends):
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{record.filename} is compressed, which PyTorch never does")
            file.seek(record.header_offset + 26)  # the local header: 30 bytes, a name, padding
            name, padding = struct.unpack("<HH", file.read(4))
            if record.header_offset + 30 + name + padding + record.file_size > end:
                raise ValueError(f"{record.filename} overlaps what follows it")
            if record.filename.endswith("/data.pkl"):
                file.seek(name + padding, os.SEEK_CUR)
                check_nesting(io.BytesIO(file.read(record.file_size)))


def check_nesting(file: BinaryIO) -> None:
    """Raise if hashing or printing a container in the next pickle could crash or occupy Python.

    Tuples may be nested deeply; and containers that hold one another twice each, over and over, double at every level:
    the product of their uses says how large they can grow. Its logarithm is bounded, as it may itself be huge.
    """
    memo: dict[int, int] = {}  # key -> index into ``uses``
    uses: list[int] = []  # how often each container in the memo is taken from it
    tuples, top = 0, None  # on top of the stack: a container's index, NEW, or None for anything else
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo.pop(argument, None)
            if top is NEW:
                top = len(uses)
                uses.append(0)
            if top is not None:
                memo[argument] = top
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            top = memo.get(argument)
            if top is not None:
                uses[top] += 1
        else:
            top = NEW if opcode.name.endswith(CONTAINERS) else None
        tuples += opcode.name.startswith("TUPLE")
    if tuples > 50_000 or sum(math.log2(1 + times) for times in uses) > 20:
        raise ValueError("it nests lists, dicts or tuples too deeply")


def convert(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself, still mapped, if it has that dtype already; else a copy, and the pages read for it are freed.

    Copies of convolution weights [out, in, k, k] are channels last, the fastest layout for small convolutions.
    """
    if tensor.dtype == dtype and tensor.is_contiguous() and tensor.data_ptr() % tensor.itemsize == 0:
        return tensor
    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    copy = tensor.to(dtype, copy=True, memory_format=layout)
    release_pages(tensor)
    return copy


def is_finite(tensor: Tensor) -> bool:
    """True without NaN and infinities. One pass and no copy: NaN spreads to the least and the largest."""
    if not tensor.numel():
        return True
    wide = tensor.detach().float() if tensor.itemsize < 2 else tensor.detach()  # 8 bits have no aminmax
    in_memory = sorted(range(wide.ndim), key=wide.stride, reverse=True)
    low, high = wide.permute(in_memory).aminmax()  # in any other order of dimensions it would make a copy
    return math.isfinite(low) and math.isfinite(high)


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError that names the tensors with NaN or infinities, which would make every image black."""
    if wrong := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        more = f" and {len(wrong) - 3} more tensors" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{path} has values that are not finite (NaN or infinite) in {', '.join(wrong[:3])}{more}: the file is "
            "damaged, or its training failed. Fetch it again, or use another."
        )


def release_pages(tensor: Tensor) -> None:
    """Free the memory behind a mapped tensor. If it is used again, the system reads it from the file again.

    Without this, a float16 file loaded as float32 takes 1.5 times the memory of its weights.
    """
    storage = tensor.untyped_storage()
    if storage.resizable() or not hasattr(mmap, "MADV_DONTNEED"):  # not mapped; not available on Windows
        return
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def without_hashes(metadata: Mapping[str, str]) -> dict[str, str]:
    """Without the hashes of a file's tensors, for a file with others."""
    hashes = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
    return {key: value for key, value in metadata.items() if key not in hashes}


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a .safetensors atomically. Equal contents give equal bytes."""
    with atomic_write(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        storages = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
        tensors = {  # safetensors refuses tensors that share memory
            name: (tensor.clone() if storages[tensor.untyped_storage().data_ptr()] > 1 else tensor).contiguous()
            for name, tensor in tensors.items()
        }
        save_file(tensors, temporary, {**metadata, "format": "pt"})
        sort_header(temporary)
        temporary.chmod(mode)  # safetensors would leave it readable by its owner only


def sort_header(path: Path) -> None:
    """Sort the header of a .safetensors, because safetensors writes the metadata in arbitrary order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        contents = json.loads(file.read(length))
        header = json.dumps(contents, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(header.ljust(length))  # padded with spaces to the same length: the tensors stay in place
