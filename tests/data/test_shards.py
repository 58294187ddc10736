"""data/shards.py: a shard knows what it was made with, is the same every time, and notices every flipped bit."""

import random
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import randn, tiny_student, tiny_unet

from minidistill.config import ScheduleConfig
from minidistill.data.shards import fingerprint, read_shard, schedule_fingerprint, write_shard
from minidistill.data.trajectories import is_shard
from minidistill.schedule import Schedule

TENSORS = {"z_0": randn(2, 4, 8, 8).half(), "prompt": torch.tensor([7, 3]), "empty": torch.zeros(0, 3)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_shard(tmp_path / "shard.safetensors", TENSORS, "some settings")
    return tmp_path / "shard.safetensors"


def test_a_shard_is_read_as_it_was_written(file: Path):
    tensors, made_with = read_shard(file)
    assert made_with == "some settings" and set(tensors) == set(TENSORS)
    assert all(torch.equal(x, TENSORS[name]) and x.dtype == TENSORS[name].dtype for name, x in tensors.items())


def test_equal_tensors_give_equal_bytes(file: Path):
    before = file.read_bytes()
    for _ in range(9):  # safetensors alone writes the header in an order that changes
        write_shard(file, dict(reversed(TENSORS.items())), "some settings")
        assert file.read_bytes() == before


def test_a_flipped_bit_is_noticed_wherever_it_is(file: Path):
    """In the header, in the settings it records, in the tensors."""
    contents, dice = file.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(contents[:8], "little")
    assert is_shard(file, "some settings", 2)
    for bit in [*dice.choices(range(8 * header), k=100), *dice.choices(range(8 * header, 8 * len(contents)), k=100)]:
        damaged = bytearray(contents)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match="shard.safetensors is damaged: the teacher samples it again"):
            assert not is_shard(file, "some settings", 2)


@pytest.mark.parametrize("contents", [b"", b"\0" * 100, None], ids=["empty", "zeros", "truncated"])
def test_a_damaged_shard_is_none(contents: bytes | None, file: Path):
    file.write_bytes(file.read_bytes()[:-1] if contents is None else contents)
    assert read_shard(file) is None


def test_a_file_of_another_program_is_none(tmp_path: Path):
    save_file(TENSORS, tmp_path / "plain.safetensors")  # without the metadata of a shard
    assert read_shard(tmp_path / "plain.safetensors") is None


def test_a_missing_shard_is_none(tmp_path: Path):
    assert read_shard(tmp_path / "nowhere") is None and not is_shard(tmp_path / "nowhere", "some settings", 1)


def test_a_shard_must_have_the_same_settings_and_enough_trajectories(file: Path):
    assert [is_shard(file, "some settings", size) for size in (1, 2, 3)] == [True, True, False]
    with pytest.raises(ValueError, match=r"other settings \(some settings\): delete .*--out or --states"):
        is_shard(file, "others", 2)


def test_the_fingerprint_is_of_the_frozen_weights():
    unet = tiny_unet().requires_grad_(False)
    before = fingerprint(unet)
    assert len(before) == 16 and before == fingerprint(tiny_unet().requires_grad_(False))
    assert before == fingerprint(tiny_unet().requires_grad_(False).to(memory_format=torch.channels_last))  # as on a GPU
    assert fingerprint(tiny_student()) == before  # the LoRA learns, and does not count
    with torch.no_grad():
        unet.conv_out.weight[0, 0, 0, 0] += 1e-6
    assert fingerprint(unet) != before


OTHER = ScheduleConfig(beta_end=0.02, prediction="v", steps_offset=0, spacing="trailing", set_alpha_to_one=True)


@pytest.mark.parametrize("field", [field.name for field in fields(Schedule)])
def test_the_fingerprint_of_a_schedule_is_of_all_its_fields(field: str):
    schedule, other = Schedule.from_config(ScheduleConfig()), Schedule.from_config(OTHER)
    assert schedule_fingerprint(replace(schedule, **{field: getattr(other, field)})) != schedule_fingerprint(schedule)
