"""PyTorch's own files (.ckpt, .bin), read without running them.

Such a file is a pickle: a program for a small stack machine, one of whose instructions calls any function of any
module. Here that machine is written out with this instruction taken away. It builds numbers, strings, lists and dicts;
a function to be called is only noted by its name, and of all names just those that describe tensors mean anything.
"""

import io
import pickletools
import zipfile
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

import torch

from minidistill.formats.files import CheckpointError
from minidistill.formats.stored import MappedFile, StoredTensor, is_shape, reach

# What a program may take, lest a small file fill the memory. Those of Stable Diffusion are below one million bytes.
PROGRAM_LIMIT = 16 * 2**20  # bytes
STEP_LIMIT = 100_000  # instructions, and in a large file more: each makes one object, which takes up to 200 bytes
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # how files begin that PyTorch wrote before 1.6

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class Global:
    """A class or function that the program names. It is never looked up."""

    module: str
    name: str


class StandIn:
    """In place of any object that is not built here."""


@dataclass(frozen=True)
class Storage:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class Rebuilt:
    """A tensor as the program describes it: a view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_pickle(file: MappedFile) -> dict[str, StoredTensor]:
    """The tensors of the dict that the file holds, or of the ``state_dict`` inside it.

    Raises CheckpointError for tensors that do not lie in the file; other exceptions, of any kind, for a program that
    cannot be run.
    """
    with file.path.open("rb") as opened:
        zipped = opened.read(2) == b"PK"
        opened.seek(0)
        read = read_zip if zipped else read_legacy
        root, places = read(opened, min(file.size, PROGRAM_LIMIT), Machine(STEP_LIMIT + file.size // 128))
    if isinstance(root, dict) and isinstance(root.get("state_dict"), dict):
        root = root["state_dict"]
    items = root.items() if isinstance(root, dict) else ()
    found = {name: value for name, value in items if isinstance(name, str) and isinstance(value, Rebuilt)}
    tensors = {name: stored(name, tensor, places, file) for name, tensor in found.items()}
    # Tensors may share storage; so many that they would fill memory from a small file are no honest checkpoint.
    if sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values()) > 2 * file.size:
        raise CheckpointError(f"{file.path} holds tensors larger than itself: do not use it.")
    if not tensors:
        raise CheckpointError(f"{file.path} holds no named tensors: it is no checkpoint of a model.")
    return tensors


def stored(name: str, tensor: Rebuilt, places: dict[str, tuple[int, int]], file: MappedFile) -> StoredTensor:
    storage, (start, size) = tensor.storage, places.get(tensor.storage.key, (0, 0))
    fits = is_shape((tensor.offset,)) and is_shape(tensor.shape) and is_shape(tensor.stride)
    fits = fits and len(tensor.shape) == len(tensor.stride)
    fits = fits and start + size <= file.size and storage.numel * storage.dtype.itemsize <= size
    fits = fits and tensor.offset + max(reach(tensor.shape, tensor.stride), prod(tensor.shape)) <= storage.numel
    if not fits:
        raise CheckpointError(f"{file.path} is damaged: {name} does not lie within its storage. Fetch it again.")
    return StoredTensor(
        file, start + tensor.offset * storage.dtype.itemsize, storage.dtype, tensor.shape, tensor.stride
    )


def read_zip(opened: BinaryIO, limit: int, machine: "Machine") -> tuple[Any, dict[str, tuple[int, int]]]:
    """What the program builds, and (first byte, size) of each storage, in the format of PyTorch 1.6 and later."""
    if directory_size(opened) > limit // 16 + 2**20:  # zipfile makes objects of it, ten times as large
        raise ValueError("it lists far too many parts")
    archive = zipfile.ZipFile(opened)
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    program = next((entry.filename for entry in entries if entry.filename.endswith("/data.pkl")), None)
    if program is None:
        raise ValueError("a zip archive, but not one of PyTorch")
    folder = program.removesuffix("data.pkl") + "data/"
    places = {}
    for entry, stop in zip(entries, [*(entry.header_offset for entry in entries[1:]), archive.start_dir]):
        name = entry.filename
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed, which PyTorch never does")
        # The local header, of 30 bytes, ends with the lengths of a name and of padding that follow it.
        opened.seek(entry.header_offset)
        header = opened.read(30)
        length, padding = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:], "little")
        start = entry.header_offset + 30 + length + padding
        held = opened.read(length).decode("utf-8" if entry.flag_bits & 0x800 else "cp437")
        if header[:4] != b"PK\3\4" or held != entry.orig_filename or start + entry.file_size > stop:
            raise ValueError(f"{name[:100]} is not where its list of parts says")
        places[name.removeprefix(folder)] = start, entry.file_size
    start, size = places[program]
    opened.seek(start)
    return machine.run(io.BytesIO(opened.read(min(size, limit)))), places


def directory_size(opened: BinaryIO) -> int:
    """Bytes of an archive's list of contents: stated in its last 22, or for large ones 98 from its end."""
    opened.seek(0, io.SEEK_END)
    opened.seek(max(opened.tell() - 98, 0))
    end = opened.read()
    if end[-22:-18] != b"PK\5\6":
        raise ValueError("its end is missing")
    short = int.from_bytes(end[-10:-6], "little")
    long = int.from_bytes(end[-58:-50], "little") if end.startswith(b"PK\6\6") else 0
    return max(long, short if short < 2**32 - 1 else 0)


def read_legacy(opened: BinaryIO, limit: int, machine: "Machine") -> tuple[Any, dict[str, tuple[int, int]]]:
    """The same in the older format: five programs in a row, then each storage after its number of elements."""
    programs = io.BytesIO(opened.read(limit))
    magic, _, _, root, keys = (machine.run(programs) for _ in range(5))  # second and third: version, byte order
    if magic != LEGACY_MAGIC:
        raise ValueError("a pickle, but not one of PyTorch")
    places, start = {}, programs.tell()
    for key in keys:
        if type(key) is not str:
            raise ValueError("a storage's name is no text")
        storage = machine.storages[key]
        opened.seek(start)
        if int.from_bytes(opened.read(8), "little") != storage.numel:
            raise ValueError("its storages do not follow one another")
        size = storage.numel * storage.dtype.itemsize
        places[key] = start + 8, size
        start += 8 + size
    return root, places


# Instructions whose argument is the value itself.
LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
CONTAINERS = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
CALLS = {"NEWOBJ": 2, "NEWOBJ_EX": 3}  # how much each takes off the stack


class Machine:
    """Runs programs one after another; ``storages`` are those they mentioned.

    Sets become lists, so that nothing but dict keys is ever hashed, and those are plain: text, numbers and what is
    made of text. A deep tuple would exhaust the interpreter's own stack.
    """

    def __init__(self, steps: int):
        self.steps = steps  # that are left
        self.storages: dict[str, Storage] = {}

    def run(self, program: BinaryIO) -> Any:
        """Run one program up to its STOP, and return what it leaves on the stack."""
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        for opcode, arg, _ in pickletools.genops(program):
            self.steps -= 1
            if self.steps < 0:
                raise ValueError("its program is far too long")
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, arg)
        raise ValueError("its program does not end")

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def step(self, name: str, arg: Any) -> None:
        stack = self.stack
        if name in LITERALS:
            stack.append(arg)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in CONTAINERS:
            stack.append(CONTAINERS[name]())
        elif name == "MARK":
            self.marked.append(stack)
            self.stack = []
        elif name in TUPLES:
            items = [stack.pop() for _ in range(TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name in ("TUPLE", "LIST", "FROZENSET"):
            items = self.pop_mark()
            self.stack.append(tuple(items) if name == "TUPLE" else items)
        elif name == "DICT":
            items = self.pop_mark()
            self.stack.append({})
            set_items(self.stack[-1], items)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else self.pop_mark()
            if isinstance(self.stack[-1], list):
                self.stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self.pop_mark()
            if isinstance(self.stack[-1], dict):
                set_items(self.stack[-1], items)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if arg is None else arg] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[arg])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP":
            stack.pop() if stack else self.pop_mark()
        elif name == "POP_MARK":
            self.pop_mark()
        elif name == "GLOBAL":
            stack.append(Global(*arg.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            if type(module) is not str or type(attribute) is not str:
                raise ValueError("a function's name is no text")
            stack.append(Global(module, attribute))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(described(function, arguments))
        elif name in CALLS:
            del stack[-CALLS[name] :]
            stack.append(StandIn())
        elif name in ("INST", "OBJ"):
            self.pop_mark()
            self.stack.append(StandIn())
        elif name == "BUILD":
            stack.pop()  # the attributes of an object: of no interest
        elif name == "BINPERSID":
            stack.append(self.storage(stack.pop()))
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"{name} has no place in a checkpoint")

    def storage(self, description: Any) -> Storage:
        """What a persistent id of PyTorch's stands for: ("storage", its class, key, device, number of elements)."""
        _, kind, key, _, numel = description[:5]
        view = description[5:6]  # in the older format, of another storage; long out of use
        if type(key) is not str or not is_shape((numel,)) or view not in ((), (None,)):
            raise ValueError("a storage is not described as PyTorch does")
        if kind.name not in STORAGE_DTYPES:
            raise ValueError(f"{kind.name[:50]} is not read: of number formats only {', '.join(STORAGE_DTYPES)}")
        storage = self.storages[key] = Storage(key, STORAGE_DTYPES[kind.name], numel)
        return storage


def set_items(target: dict, items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2]):
        if not isinstance(key, str | bytes | int | float | None | Global | StandIn):
            raise ValueError(f"a {type(key).__name__} is the key of a dict")
        target[key] = value


def described(function: Any, arguments: Any) -> Any:
    """What a call would have made, for the few functions that describe tensors and dicts."""
    match function:
        case Global("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor"):
            return Rebuilt(*arguments[:4])
        case Global("torch._utils", "_rebuild_parameter"):
            return arguments[0]
        case Global("collections", "OrderedDict") if arguments == ():
            return {}
    return StandIn()
