"""Damaged and hostile files: each ends in one CheckpointError, or loads without its harmful part."""

import io
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_load_model import as_bin, as_shards, equal, written_again
from tiny import tiny_tensors, write_tiny

from minidistill import CheckpointError, load
from minidistill.formats.tensor_files import read_tensors


class Calls:
    """pickle would call ``function`` when it loads this."""

    def __init__(self, function: Any, *args: object):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args

    def __call__(self):
        """Does nothing; pickle only accepts callables."""


MARK = "harmed"  # this file appears only if code from the pickle runs
TOUCH = f"open({MARK!r}, 'w')"


def zipped(program: bytes, file: Path) -> Path:
    """A .ckpt with any pickle program."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3")
        archive.writestr("archive/data/0", bytes(room(program)))
    return file


def legacy(program: bytes, file: Path, keys: bytes = pickle.dumps(["0"], protocol=2)) -> Path:
    before = [pickle.dumps(x, protocol=2) for x in (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True})]
    program = program.replace(b"tQ", b"NtQ")  # this format describes a storage with one more value
    after = keys + struct.pack("<q", 16) + bytes(room(program))
    file.write_bytes(b"".join(before) + program + after)
    return file


def room(program: bytes) -> int:
    """Bytes in the file's only storage; large for a long program."""
    return 2**24 if len(program) > 150_000 else 64


def tensor(key: str = "0", numel: str = "K\x10", offset: str = "K\x00", shape: str = "K\x10", stride: str = "K\x01"):
    """A pickle of {"a": a tensor of 16 float32}, or with other values in it."""
    storage = f"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00{key}X\x03\x00\x00\x00cpu{numel}tQ"
    rebuilt = f"ctorch._utils\n_rebuild_tensor_v2\n({storage}{offset}({shape}t({stride}t\x89}}tR"
    return f"\x80\x02}}X\x01\x00\x00\x00a{rebuilt}s.".encode("latin-1")


def text(contents: str) -> bytes:
    """Push a string."""
    return b"X" + struct.pack("<i", len(contents)) + contents.encode()


def deep(n: int) -> bytes:
    """Push n nested tuples."""
    return b")" + b"\x85" * n


LARGE = "\x8a\x06" + "\x00" * 5 + "\x01"  # 2**40
HOSTILE = {
    "os.system": pickle.dumps(Calls(os.system, f"touch {MARK}"), protocol=2),
    "builtins.eval": pickle.dumps({"a": Calls(eval, TOUCH)}, protocol=2),
    "builtins.exec": pickle.dumps([Calls(exec, TOUCH)], protocol=2),
    "nested": pickle.dumps({"state_dict": {"a": [{"b": (Calls(pickle.loads, pickle.dumps(Calls(eval, TOUCH))),)}]}}, 2),
    "reduce chain": pickle.dumps(Calls(Calls(getattr, Calls(__import__, "os"), "system"), f"touch {MARK}"), protocol=2),
    "old instance": f"(S'touch {MARK}'\nios\nsystem\n.".encode(),
    "object": f"(cos\nsystem\nS'touch {MARK}'\no.".encode(),
    "new object": b"cbuiltins\nbytearray\n" + b"\x8a\x06" + bytes(5) + b"\x01\x85\x81.",
    "state of a class": b"cbuiltins\ndict\n}X\x01\x00\x00\x00ax\x01\x00\x00\x00bsb.",
    "a tensor's function with a state": b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
    "extension": b"\x82\x01.",
    "large bytes": b"\x8e" + (2**40).to_bytes(8, "little") + b"abc.",
    "large number": b"\x8b" + (2**31 - 1).to_bytes(4, "little") + b"abc.",
    "large bytearray": pickle.dumps(Calls(bytearray, 2**40), protocol=2),
    "large memo": b"Kar\xff\xff\xff\xff.",
    "large storage": tensor(numel=LARGE),
    "large tensor": tensor(shape=LARGE),
    "repeated element": tensor(shape=LARGE, stride="K\x00"),
    "negative stride": tensor(stride="J\xff\xff\xff\xff"),
    "negative offset": tensor(offset="J\xff\xff\xff\xff"),
    "offset beyond": tensor(offset="K\x01"),
    "no numbers": tensor(shape="X\x01\x00\x00\x00a"),
    "no such storage": tensor(key="7"),
    "deep lists": b"]" * 90_000 + b"a" * 89_999 + b".",
    "deep tuples": deep(90_000) + b".",
    "deep key": b"}" + deep(90_000) + b"K\x01s.",
    "deep name": b"}" + text("a") + deep(180_000) + b"\x93K\x01s.",
    "deep kind": b"(" + text("storage") + text("a") + deep(2000) + b"\x93" + text("0") + text("cpu") + b"K\x10tQ.",
    "doubling key": b"})q\x00" + b"h\x00\x86q\x00" * 60 + b"K\x01s.",
    "doubling under other names": b"})q\x00" + b"h\x00q\x01h\x01q\x02h\x02\x86q\x00" * 60 + b"K\x01s.",
    "itself": b"]q\x00h\x00a.",
    "its own state dict": b"}q\x00X\x0a\x00\x00\x00state_dicth\x00s.",
    "long names": b"(" + b"X\x00\x00\x10\x00" + b"a" * 2**20 + b"q\x00" + b"h\x00h\x00\x93" * 20_000 + b"l.",
    "empty stack": b"\x80\x02R.",
    "no end": b"\x80\x02}q\x00",
    "text": b"Sunquoted\n.",
    "nothing": b".",
    "no dict": pickle.dumps([1, 2], protocol=2),
    "no tensors": pickle.dumps({"a": 1, "b": OrderedDict()}, protocol=2),
}


@pytest.mark.parametrize("form", [zipped, legacy])
@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles(form, program: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = form(program, tmp_path / "model.ckpt")
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="model.ckpt"):
        load(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * file.stat().st_size + 2**24
    assert not (tmp_path / MARK).exists()


def test_a_hostile_list_of_storages(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model.ckpt"):
        load(legacy(tensor(), tmp_path / "model.ckpt", keys=b"](" + deep(2000) + b"e."))


def test_they_would_do_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pickle itself runs these, so the test above tests something."""
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "builtins.eval", "builtins.exec", "nested", "old instance", "object"):
        pickle.loads(HOSTILE[name])
        assert (tmp_path / MARK).exists(), name
        (tmp_path / MARK).unlink()


@pytest.mark.parametrize("form", [zipped, legacy])
def test_the_honest_one(form, tmp_path: Path) -> None:
    """The unchanged program loads."""
    found = read_tensors(form(tensor(), tmp_path / "model.ckpt"))
    assert torch.equal(found[0]["a"], torch.zeros(16))


def harm() -> None:
    Path(MARK).touch()


class Harmful:
    """Does harm when it is created or gets its state."""

    def __init__(self) -> None:
        harm()

    def __setstate__(self, state: object) -> None:
        harm()

    def __reduce__(self):
        return Harmful, (), {"a": 1}


@pytest.mark.parametrize("zipped", [True, False])
def test_other_objects_in_the_file_are_inert(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tensors, file = tiny_tensors(), tmp_path / "model.ckpt"
    extra = {"callbacks": {Calls: Calls(harm)}, "hyper_parameters": object.__new__(Harmful)}
    torch.save(extra | {"state_dict": OrderedDict(tensors)}, file, _use_new_zipfile_serialization=zipped)
    assert equal(written_again(load(file)), tensors)
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("call", [Calls(eval, TOUCH), Calls(os.system, f"touch {MARK}")], ids=["eval", "system"])
def test_attacks_are_refused(call: Calls, zipped: bool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    extra = {"hyper_parameters": call}
    torch.save(extra | {"state_dict": tiny_tensors()}, "model.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"model.ckpt tries to run code \((builtins.eval|posix.system)\)"):
        load("model.ckpt")
    assert not (tmp_path / MARK).exists()


class Disguised:
    """Loads as an OrderedDict with attributes that hide its methods."""

    def __reduce__(self):
        return OrderedDict, (), {"get": set, "items": set}, None, iter([("a", torch.ones(2))])


def test_attributes_of_a_dict_are_not_called(tmp_path: Path) -> None:
    torch.save(Disguised(), tmp_path / "model.ckpt")
    assert torch.equal(read_tensors(tmp_path / "model.ckpt")[0]["a"], torch.ones(2))


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.zeros(3, device="meta")], ids=["sparse", "meta"])
def test_other_tensors_are_left_out(tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"a": tensor, "b": torch.zeros(2)}, tmp_path / "model.ckpt")
    assert list(read_tensors(tmp_path / "model.ckpt")[0]) == ["b"]


def test_many_views_of_one_storage(tmp_path: Path) -> None:
    """Each fits its storage, but together they can exceed the memory."""
    whole = torch.zeros(1000, 1000)
    torch.save({str(i): whole[: 1000 - i] for i in range(100)}, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="larger than itself"):
        load(tmp_path / "model.ckpt")


def test_a_compressed_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**24))
    with pytest.raises(CheckpointError, match="compressed"):
        load(tmp_path / "model.ckpt")


def test_archives_of_other_programs(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.ckpt", "w") as archive:
        archive.writestr("notes/readme.txt", "not a model")
    with pytest.raises(CheckpointError, match="model.ckpt is damaged"):
        load(tmp_path / "model.ckpt")


def test_a_later_pickle_protocol(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "model.ckpt", pickle_protocol=4)
    with pytest.raises(CheckpointError, match=r"model.ckpt .*Unsupported operand.*convert it to \.safetensors"):
        load(tmp_path / "model.ckpt")


def test_a_pickle_named_safetensors(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors is a PyTorch file.*rename it to \.ckpt"):
        load(tmp_path / "model.safetensors")


# Damage


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model in every format."""
    place, tensors = tmp_path_factory.mktemp("healthy"), tiny_tensors(dtype=torch.float16)
    save_file(tensors, place / "model.safetensors")
    torch.save({"state_dict": tensors, "global_step": 5}, place / "zip.ckpt")
    torch.save({"state_dict": tensors}, place / "legacy.ckpt", _use_new_zipfile_serialization=False)
    as_bin(write_tiny(place / "bin"))
    as_shards(write_tiny(place / "folder"))
    return {path.name: path for path in place.iterdir()}


@st.composite
def damages(draw: st.DrawFn, data: bytes) -> bytes:
    """Truncated, overwritten, shifted or replaced bytes; often near the ends, where the headers are."""
    size = len(data)
    near = st.integers(0, min(size, 4096))
    at = draw(st.one_of(near, near.map(lambda n: size - n), st.integers(0, size)))
    how = draw(st.sampled_from(["truncate", "overwrite", "insert", "delete", "flip", "zeros", "replace"]))
    junk = draw(st.binary(min_size=1, max_size=16))
    length = draw(st.integers(1, 4096))
    match how:
        case "truncate":
            return data[:at]
        case "overwrite":
            return data[:at] + junk + data[at + len(junk) :]
        case "insert":
            return data[:at] + junk + data[at:]
        case "delete":
            return data[:at] + data[at + length :]
        case "flip":
            at = min(at, size - 1)
            return data[:at] + bytes([data[at] ^ (1 << length % 8)]) + data[at + 1 :]
        case "zeros":
            return data[:at] + bytes(length) + data[at + length :]
    return draw(st.sampled_from([b"", b"<html>", b"{}", b"[]", b"null", data[::-1], junk * 100]))


def damaged_copy(path: Path, place: Path, data: st.DataObject) -> Path:
    """A copy of a file or folder in which one file is damaged, missing or a folder."""
    copy = place / path.name
    if path.is_file():
        copy.write_bytes(data.draw(damages(path.read_bytes())))
        return copy
    shutil.copytree(path, copy)
    victims = sorted(file for file in copy.rglob("*") if file.is_file() and "tokenizer" not in file.parts)
    victim = data.draw(st.sampled_from(victims))
    contents = victim.read_bytes()
    how = data.draw(st.sampled_from(["damage"] * 8 + ["remove", "folder"]))
    victim.unlink()
    if how == "damage":
        victim.write_bytes(data.draw(damages(contents)))
    elif how == "folder":
        victim.mkdir()
    return copy


def loads_or_says_why(healthy: dict[str, Path], place: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(healthy)))
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    copy = damaged_copy(healthy[name], place, data)
    try:
        load(copy)
    except CheckpointError as error:
        assert str(copy) in str(error)


FEW = settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@FEW
@given(data=st.data())
def test_damage(healthy: dict[str, Path], tmp_path: Path, data: st.DataObject) -> None:
    loads_or_says_why(healthy, tmp_path / "copy", data)


@pytest.mark.slow
@settings(FEW, max_examples=1000)
@given(data=st.data())
def test_much_damage(healthy: dict[str, Path], tmp_path: Path, data: st.DataObject) -> None:
    loads_or_says_why(healthy, tmp_path / "copy", data)


def test_healthy_ones_load(healthy: dict[str, Path]) -> None:
    for path in healthy.values():
        load(path)


@pytest.mark.parametrize("name", ["model.safetensors", "zip.ckpt", "legacy.ckpt"])
def test_truncated_anywhere(name: str, healthy: dict[str, Path], tmp_path: Path) -> None:
    contents = healthy[name].read_bytes()
    for size in [*range(0, 300, 7), *range(300, len(contents), len(contents) // 60), len(contents) - 1]:
        (tmp_path / name).write_bytes(contents[:size])
        with pytest.raises(CheckpointError, match=name):
            load(tmp_path / name)


def test_moved_storages(healthy: dict[str, Path], tmp_path: Path) -> None:
    """Data that has moved from where the file says is refused, not loaded as something else."""
    contents = healthy["legacy.ckpt"].read_bytes()
    (tmp_path / "legacy.ckpt").write_bytes(contents[: len(contents) // 3] + bytes(64) + contents[len(contents) // 3 :])
    contents = bytearray(healthy["zip.ckpt"].read_bytes())
    with zipfile.ZipFile(healthy["zip.ckpt"]) as archive:
        entry = archive.infolist()[9]
    contents[entry.header_offset + 28] ^= 64  # the length of the padding
    (tmp_path / "zip.ckpt").write_bytes(contents)
    for name in ("legacy.ckpt", "zip.ckpt"):
        with pytest.raises(CheckpointError, match=name):
            load(tmp_path / name)


def test_the_damage_is_done_to_bytes() -> None:
    """Most examples do change the bytes: a strategy that changed nothing would pass the tests above."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(100)}, buffer)
    changed = []

    @settings(FEW, max_examples=50)
    @given(damages(buffer.getvalue()))
    def look(damaged: bytes) -> None:
        changed.append(damaged != buffer.getvalue())

    look()
    assert sum(changed) > len(changed) / 2


def test_an_optimizer_with_many_groups(tmp_path: Path) -> None:
    """All groups of AdamW hold one tuple of betas: used often, it doubles nothing."""
    betas = (0.9, 0.999)
    groups = [{"params": [i], "betas": betas} for i in range(200)]
    torch.save({"state_dict": {"x": torch.ones(2)}, "optimizer_states": groups}, tmp_path / "model.ckpt")
    assert read_tensors(tmp_path / "model.ckpt")[0]["x"].tolist() == [1, 1]
