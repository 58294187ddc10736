"""data.py: trajectories are the teacher's, shards survive interruptions, batches depend on their number alone."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import error
from torch import Tensor

from minidistill import CheckpointError, StableDiffusion, guided_noise
from minidistill.data.trajectories import States, batches, generate, is_shard, prompt_split
from minidistill.samplers import ddim_step

CAPTIONS = ["a red apple", "a green pear", "a rocket on a purple background"]
SETTINGS = dict(count=5, steps=3, guidance=4.0, batch=2)  # three shards, the last of one


def made(sd: StableDiffusion, folder: Path, **changes) -> States:
    return generate(sd, **(dict(captions=CAPTIONS, folder=folder) | SETTINGS | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture
def calls(sd: StableDiffusion) -> list[int]:
    """The batch size of every call of the UNet."""
    sizes: list[int] = []
    sd.unet.register_forward_hook(lambda module, args, result: sizes.append(len(result)))
    return sizes


# Prompts


def test_a_models_own_captions(tmp_path: Path):
    rows = [dict(caption="a", held_out=False), dict(caption="b", held_out=True), dict(caption="c", held_out=False)]
    (tmp_path / "compositions.json").write_text(json.dumps(rows))
    assert prompt_split(tmp_path) == (["a", "c"], ["b"])


def test_a_file_counts_more_than_the_models_captions(tmp_path: Path, prompts_file: Path):
    (tmp_path / "compositions.json").write_text(json.dumps([dict(caption="a", held_out=False)]))
    lines = prompts_file.read_text().splitlines()
    train, held_out = prompt_split(tmp_path, prompts_file)
    assert held_out == lines[::10] and sorted(train + held_out) == sorted(lines)


@pytest.mark.parametrize(
    "contents, complaint",
    [
        ("[{", "is damaged"),
        ('[{"held_out": false}]', "is damaged"),
        ('[{"caption": "a", "held_out": false}]', "should have captions"),
    ],
)
def test_compositions_that_cannot_be_used(contents: str, complaint: str, tmp_path: Path):
    (tmp_path / "compositions.json").write_text(contents)
    with pytest.raises(ValueError, match=f"compositions.json {complaint}"):
        prompt_split(tmp_path)


def test_our_own_list(tmp_path: Path):
    train, held_out = prompt_split(tmp_path)
    assert len(train) >= 2000 and len(held_out) >= 200 and not set(train) & set(held_out)


def test_a_single_prompt_serves_for_both(tmp_path: Path):
    (tmp_path / "one.txt").write_text("a red apple\n")
    assert prompt_split(tmp_path, tmp_path / "one.txt") == (["a red apple"], ["a red apple"])


# Trajectories


def test_states_lead_from_one_to_the_next(sd: StableDiffusion, tmp_path: Path):
    """Each state and its stored prediction make the next state; the last makes the end."""
    states = made(sd, tmp_path)
    everyone, stride = torch.arange(5), 1000 // 3
    for i, t in enumerate(sd.schedule.timesteps(3)):
        z_t, eps_hat, times = states.states(everyone, torch.full((5,), i))
        assert times.tolist() == [t] * 5
        following = states.states(everyone, torch.full((5,), i + 1))[0] if i < 2 else states.ends(everyone)
        assert error(ddim_step(sd.schedule, eps_hat, z_t, t, t - stride), following) < 2e-3  # stored in half precision


def test_strides_start_at_the_first_step_and_between_them_take_every_step(sd: StableDiffusion, tmp_path: Path):
    states, timesteps = made(sd, tmp_path, steps=8, batch=2, stride=3), sd.schedule.timesteps(8)
    taken = [shard["t"].tolist() for shard in states.shards]
    assert taken == [[timesteps[i] for i in steps] for steps in ((0, 3, 6), (0, 1, 4, 7), (0, 2, 5))]
    assert len(states.examples) == 2 * 3 + 2 * 4 + 1 * 3
    trajectory, step = torch.tensor([2, 3]), torch.tensor([2, 2])
    z_t, eps_hat, t = states.states(trajectory, step)
    assert t.tolist() == [timesteps[4]] * 2
    following = states.states(trajectory, step + 1)[0]
    assert error(ddim_step(sd.schedule, eps_hat, z_t, timesteps[4], timesteps[7]), following) < 2e-3


def test_targets_are_the_guided_prediction(sd: StableDiffusion, tmp_path: Path):
    states = made(sd, tmp_path)
    trajectories, steps = torch.tensor([4, 0, 3]), torch.tensor([2, 1, 0])
    z_t, eps_hat, t = states.states(trajectories, steps)
    cond = sd.encode_prompt([CAPTIONS[i] for i in states.prompts(trajectories)])
    expected = guided_noise(sd.unet, z_t, t, cond, sd.encode_prompt([""]).expand_as(cond), 4.0).detach()
    assert error(eps_hat, expected) < 2e-3


def test_trajectories_start_from_noise_of_their_own_seed(sd: StableDiffusion, tmp_path: Path):
    z_T = made(sd, tmp_path, seed=10).states(torch.arange(5), torch.zeros(5, dtype=torch.int64))[0]
    assert error(z_T, sd.starting_noise(range(10, 15))) < 1e-3


def test_prompts_take_turns(sd: StableDiffusion, tmp_path: Path):
    states = made(sd, tmp_path)
    numbers = states.prompts(torch.arange(len(states))).tolist()
    assert len(states) == 5 and sorted(numbers[:3]) == [0, 1, 2]  # all of them before any comes again


def test_negative_prompt_guides_away(sd: StableDiffusion, tmp_path: Path):
    plain, negative = made(sd, tmp_path / "a"), made(sd, tmp_path / "b", negative_prompt="a green pear")
    assert not torch.equal(plain.ends(torch.arange(5)), negative.ends(torch.arange(5)))


def test_ends_alone(sd: StableDiffusion, tmp_path: Path):
    whole, ends = made(sd, tmp_path / "a"), made(sd, tmp_path / "b", keep_states=False)
    assert torch.equal(ends.ends(torch.arange(5)), whole.ends(torch.arange(5)))
    assert set(ends.shards[0]) == {"z_0", "prompt", "t"}


def test_trajectories_are_of_float32(sd: StableDiffusion, tmp_path: Path):
    z_t, eps_hat, _ = (states := made(sd, tmp_path)).states(torch.tensor([1]), torch.tensor([1]))
    assert {z_t.dtype, eps_hat.dtype, states.ends(torch.tensor([1])).dtype} == {torch.float32}
    assert z_t.shape == eps_hat.shape == (1, 4, 8, 8)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is mapped")
def test_shards_are_mapped_not_read(sd: StableDiffusion, tmp_path: Path):
    states = made(sd, tmp_path)
    maps = Path("/proc/self/maps").read_text()
    assert len(states.shards) == 3 and all(str(file) in maps for file in tmp_path.iterdir())


# Resuming


def delete(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path) -> None:
    """One bit of a tensor, which safetensors does not notice."""
    contents = bytearray(file.read_bytes())
    contents[-1000] ^= 1
    file.write_bytes(contents)
    load_file(file)


@pytest.mark.parametrize("damage", [delete, truncate, empty, flip])
def test_only_the_damaged_shard_is_made_again(damage, sd: StableDiffusion, calls: list[int], tmp_path: Path):
    made(sd, tmp_path)
    before, whole = contents(tmp_path), len(calls)
    assert len(before) == 3 and whole == 3 * 3 * 2  # shards, steps, calls a step
    damage(tmp_path / "trajectories-000002.safetensors")
    calls.clear()
    made(sd, tmp_path)
    assert len(calls) == 3 * 2 and contents(tmp_path) == before


def test_a_flipped_bit_is_found_wherever_it_is(sd: StableDiffusion, tmp_path: Path):
    """In the header, in what it says of the settings, in the tensors."""
    made(sd, tmp_path, count=1)
    (file,) = tmp_path.iterdir()
    with safe_open(file, "pt") as shard:
        made_with = shard.metadata()["made_with"]
    contents, dice = file.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(contents[:8], "little")
    assert is_shard(file, made_with, 1)
    for bit in [*dice.choices(range(8 * header), k=100), *dice.choices(range(8 * header, 8 * len(contents)), k=100)]:
        damaged = bytearray(contents)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is damaged: the teacher draws it again"):
            assert not is_shard(file, made_with, 1)


def test_whole_shards_need_no_teacher(sd: StableDiffusion, calls: list[int], tmp_path: Path):
    first = made(sd, tmp_path)
    calls.clear()
    again = made(sd, tmp_path)
    assert not calls and torch.equal(again.ends(torch.arange(5)), first.ends(torch.arange(5)))


def test_interrupted_generation_leaves_whole_shards_only(sd: StableDiffusion, calls: list[int], tmp_path: Path):
    def interrupt(*_):
        if len(calls) == 3 * 2 + 1:  # within the second shard
            raise KeyboardInterrupt

    hook = sd.unet.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        made(sd, tmp_path / "a")
    hook.remove()
    assert list(contents(tmp_path / "a")) == ["trajectories-000000.safetensors"]
    made(sd, tmp_path / "a")
    made(sd, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    "changes",
    [
        dict(steps=4),
        dict(guidance=5.0),
        dict(negative_prompt="a cat"),
        dict(seed=1),
        dict(batch=5),
        dict(keep_states=False),
        dict(captions=CAPTIONS[:2]),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_settings_are_refused(changes: dict, sd: StableDiffusion, tmp_path: Path):
    made(sd, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        made(sd, tmp_path, **changes)
    assert contents(tmp_path) == before


def test_more_are_added_to_what_is_there(sd: StableDiffusion, tmp_path: Path, calls: list[int]):
    for count in (2, 5, 6):  # 5: its last shard is not full
        calls.clear()
        made(sd, tmp_path / "grown", count=count)
    assert len(calls) == 3 * 2  # the last shard alone
    made(sd, tmp_path / "at once", count=6)
    assert contents(tmp_path / "grown") == contents(tmp_path / "at once")
    fewer = made(sd, tmp_path / "grown", count=5)  # which leaves what is there
    assert len(fewer) == 5 and fewer.examples[:, 0].max() == 4
    assert contents(tmp_path / "grown") == contents(tmp_path / "at once")


def other_unet(sd: StableDiffusion) -> None:
    sd.unet.conv_out.weight[0, 0, 0, 0] += 1e-6


def other_text_encoder(sd: StableDiffusion) -> None:
    next(sd.text_encoder.parameters()).view(-1)[0] += 1e-6


def other_tokenizer(sd: StableDiffusion) -> None:
    sd.tokenizer.pad_token = "!"


def other_schedule(sd: StableDiffusion) -> None:
    sd.schedule = replace(sd.schedule, final_alpha=torch.tensor(1.0))


@pytest.mark.parametrize("other", [other_unet, other_text_encoder, other_tokenizer, other_schedule])
def test_trajectories_of_another_teacher_are_refused(
    other: Callable[[StableDiffusion], None], sd: StableDiffusion, tmp_path: Path
):
    made(sd, tmp_path)
    other(sd)
    with pytest.raises(ValueError, match="other settings"):
        made(sd, tmp_path)


def test_a_folder_without_tokenizer_makes_nothing(sd: StableDiffusion, tmp_path: Path):
    sd.tokenizer_folder = tmp_path / "nowhere"
    with pytest.raises(CheckpointError, match="tokenizer"):
        made(sd, tmp_path / "states")
    assert not (tmp_path / "states").exists()


# Batches


def taken(iterator: Iterator[Tensor], count: int) -> list[list[int]]:
    return [batch.tolist() for batch in islice(iterator, count)]


@pytest.mark.parametrize("start", [1, 3, 4, 7, 8])
def test_resumed_batches_are_those_that_would_have_come(start: int):
    assert taken(batches(14, 4, seed=5, start=start), 6) == taken(batches(14, 4, seed=5), start + 6)[start:]


def test_an_epoch_takes_nothing_twice_and_the_next_is_shuffled_anew():
    found = taken(batches(12, 4, seed=0), 6)
    first, second = (sorted(sum(found[i : i + 3], [])) for i in (0, 3))
    assert first == second == list(range(12)) and found[:3] != found[3:]


def test_the_seed_decides_the_order():
    assert taken(batches(12, 4, seed=0), 3) != taken(batches(12, 4, seed=7), 3)


def test_fewer_examples_than_a_batch():
    assert [sorted(batch) for batch in taken(batches(3, 8, seed=0), 2)] == [[0, 1, 2], [0, 1, 2]]
