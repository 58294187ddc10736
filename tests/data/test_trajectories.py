"""data/trajectories.py: trajectories are those of the guided teacher, and their shards survive interruptions."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import error

from minidistill import CheckpointError, StableDiffusion, load
from minidistill.data.shards import read_shard
from minidistill.data.trajectories import Trajectories, generate
from minidistill.guidance import Interval
from minidistill.samplers import ddim_step

CAPTIONS = ["a red apple", "a green pear", "a rocket on a purple background"]
SETTINGS = dict(count=5, steps=3, guidance=4.0, batch=2)  # three shards, the last of one


def generated(sd: StableDiffusion, folder: Path, **changes) -> Trajectories:
    return generate(sd, **(dict(captions=CAPTIONS, folder=folder) | SETTINGS | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture
def calls(sd: StableDiffusion) -> list[int]:
    """The batch size of every call of the UNet."""
    sizes: list[int] = []
    sd.unet.register_forward_hook(lambda module, args, result: sizes.append(len(result)))
    return sizes


# Trajectories


def test_each_state_leads_to_the_next(sd: StableDiffusion, tmp_path: Path):
    """Each state and its stored prediction give the next state; the last gives the end."""
    states = generated(sd, tmp_path)
    all_five, stride = torch.arange(5), 1000 // 3
    for i, t in enumerate(sd.schedule.timesteps(3)):
        z_t, eps_hat, times = states.states(all_five, torch.full((5,), i))
        assert times.tolist() == [t] * 5
        following = states.states(all_five, torch.full((5,), i + 1))[0] if i < 2 else states.ends(all_five)
        assert error(ddim_step(sd.schedule, eps_hat, z_t, t, t - stride), following) < 2e-3  # stored in half precision


def test_shards_with_a_stride_take_the_first_step_and_together_every_step(sd: StableDiffusion, tmp_path: Path):
    states, timesteps = generated(sd, tmp_path, steps=8, batch=2, stride=3), sd.schedule.timesteps(8)
    taken = [shard["t"].tolist() for shard in states.shards]
    assert taken == [[timesteps[i] for i in steps] for steps in ((0, 3, 6), (0, 1, 4, 7), (0, 2, 5))]
    assert len(states.examples) == 2 * 3 + 2 * 4 + 1 * 3
    trajectory, step = torch.tensor([2, 3]), torch.tensor([2, 2])
    z_t, eps_hat, t = states.states(trajectory, step)
    assert t.tolist() == [timesteps[4]] * 2
    following = states.states(trajectory, step + 1)[0]
    assert error(ddim_step(sd.schedule, eps_hat, z_t, timesteps[4], timesteps[7]), following) < 2e-3


@pytest.mark.parametrize(
    "interval, inside", [(Interval(300, 500), [0, 1, 0]), (Interval(1, 334), [0, 1, 1]), (None, [1, 1, 1])]
)
def test_targets_are_guided_within_the_interval(interval: Interval | None, inside: list, sd, calls, tmp_path: Path):
    """t = 667, 334, 1: guided inside, the plain prediction of one call elsewhere, each from its own state."""
    states = generated(sd, tmp_path, interval=interval)
    assert len(calls) == 3 * (3 + sum(inside))  # three shards
    numbers = torch.arange(5)
    cond = sd.encode_prompt([CAPTIONS[i] for i in states.prompts(numbers)])
    uncond = sd.encode_prompt([""]).expand(5)
    for step, with_guidance in enumerate(inside):
        z_t, target, t = states.states(numbers, torch.full((5,), step))
        with torch.no_grad():
            eps, eps_uncond = sd.unet(z_t, t, cond), sd.unet(z_t, t, uncond)
        expected = 4 * eps - 3 * eps_uncond if with_guidance else eps
        other = eps if with_guidance else 4 * eps - 3 * eps_uncond
        assert error(target, expected) < 2e-3 < error(target, other)


def test_shards_record_their_interval(sd: StableDiffusion, tmp_path: Path):
    """And without one they are the same, byte for byte, as before there were intervals."""
    generated(sd, tmp_path / "plain", count=1)
    generated(sd, tmp_path / "interval", count=1, interval=Interval(300, 900))
    plain, interval = (json.loads(read_shard(next((tmp_path / name).iterdir()))[1]) for name in ("plain", "interval"))
    keys = "weights prediction schedule captions steps guidance negative_prompt seed batch stride keep_states"
    assert list(plain) == keys.split() and interval == plain | {"interval": [300, 900]}


def test_two_processes_share_the_shards(sd: StableDiffusion, tmp_path: Path):
    """Two threads that meet at a barrier: each shard is made once, and is the same as one process makes it."""
    generated(sd, tmp_path / "one")
    barrier, made = threading.Barrier(2), []

    def process(rank: int) -> int:
        own = load(sd.path)
        own.unet.register_forward_hook(lambda *_: made.append(rank))
        return len(generated(own, tmp_path / "two", rank=rank, world=2, wait=lambda: barrier.wait(timeout=60)))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(process, range(2))) == [5, 5]
    assert (made.count(0), made.count(1)) == (2 * 3 * 2, 3 * 2)  # shards, steps, calls per step
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_trajectories_start_from_noise_of_their_own_seed(sd: StableDiffusion, tmp_path: Path):
    z_T = generated(sd, tmp_path, seed=10).states(torch.arange(5), torch.zeros(5, dtype=torch.int64))[0]
    assert error(z_T, sd.starting_noise(range(10, 15))) < 1e-3


def test_every_prompt_comes_before_any_comes_again(sd: StableDiffusion, tmp_path: Path):
    states = generated(sd, tmp_path)
    numbers = states.prompts(torch.arange(len(states))).tolist()
    assert len(states) == 5 and sorted(numbers[:3]) == [0, 1, 2]


def test_only_the_ends_are_stored_for_noised_latents(sd: StableDiffusion, tmp_path: Path):
    whole, ends = generated(sd, tmp_path / "a"), generated(sd, tmp_path / "b", keep_states=False)
    assert torch.equal(ends.ends(torch.arange(5)), whole.ends(torch.arange(5)))
    assert set(ends.shards[0]) == {"z_0", "prompt", "t"}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists mapped files")
def test_shards_are_mapped_not_read(sd: StableDiffusion, tmp_path: Path):
    states = generated(sd, tmp_path)
    maps = Path("/proc/self/maps").read_text()
    assert len(states.shards) == 3 and all(str(file) in maps for file in tmp_path.iterdir())


def test_what_is_not_finite_is_not_stored(sd: StableDiffusion, tmp_path: Path):
    sd.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        generated(sd, tmp_path / "states")
    assert not (tmp_path / "states").exists()


def test_steps_that_skip_a_time_of_the_student_are_refused(sd: StableDiffusion, tmp_path: Path):
    """By rounding: of 16 steps the second is at t = 936 (937.5 rounded), of 48 the fourth is at t = 937."""
    with pytest.raises(ValueError, match="48 steps skip a time of the student's 16"):
        generated(sd, tmp_path / "states", steps=48, student_steps=16)


# Resuming


def flip(file: Path) -> None:
    """One bit of a tensor, which safetensors does not notice."""
    contents = bytearray(file.read_bytes())
    contents[-1000] ^= 1
    file.write_bytes(contents)
    load_file(file)


DAMAGE = [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-50]), lambda file: file.write_bytes(b""), flip]


@pytest.mark.parametrize("damage", DAMAGE, ids=["deleted", "truncated", "empty", "flipped"])
def test_only_the_damaged_shard_is_made_again(damage, sd: StableDiffusion, calls: list[int], tmp_path: Path):
    generated(sd, tmp_path)
    before = contents(tmp_path)
    assert len(before) == 3 and len(calls) == 3 * 3 * 2  # shards, steps, calls per step
    damage(tmp_path / "trajectories-000002.safetensors")
    calls.clear()
    generated(sd, tmp_path)
    assert len(calls) == 3 * 2 and contents(tmp_path) == before


def test_interrupted_generation_leaves_complete_shards_only(sd: StableDiffusion, calls: list[int], tmp_path: Path):
    def interrupt(*_):
        if len(calls) == 3 * 2 + 1:  # within the second shard
            raise KeyboardInterrupt

    hook = sd.unet.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generated(sd, tmp_path / "a")
    hook.remove()
    assert list(contents(tmp_path / "a")) == ["trajectories-000000.safetensors"]
    generated(sd, tmp_path / "a")
    generated(sd, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    "changes",
    [dict(steps=4), dict(guidance=5.0), dict(negative_prompt="a cat"), dict(seed=1), dict(batch=5), dict(stride=2)]
    + [dict(keep_states=False), dict(captions=CAPTIONS[:2]), dict(interval=Interval(300, 900))],
    ids=lambda changes: next(iter(changes)),
)
def test_other_settings_are_refused(changes: dict, sd: StableDiffusion, tmp_path: Path):
    generated(sd, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        generated(sd, tmp_path, **changes)
    assert contents(tmp_path) == before


def test_more_trajectories_are_added_to_existing_ones(sd: StableDiffusion, tmp_path: Path, calls: list[int]):
    for count in (2, 5, 6):  # 5: its last shard is not full
        calls.clear()
        generated(sd, tmp_path / "grown", count=count)
    assert len(calls) == 3 * 2  # the last shard alone
    generated(sd, tmp_path / "at once", count=6)
    assert contents(tmp_path / "grown") == contents(tmp_path / "at once")
    fewer = generated(sd, tmp_path / "grown", count=5)  # and keeps the rest
    assert len(fewer) == 5 and fewer.examples[:, 0].max() == 4
    assert contents(tmp_path / "grown") == contents(tmp_path / "at once")


def other_schedule(**changes) -> Callable[[StableDiffusion], object]:
    return lambda sd: setattr(sd, "schedule", replace(sd.schedule, **changes))


CHANGES: dict[str, Callable[[StableDiffusion], object]] = {
    "unet": lambda sd: sd.unet.conv_out.weight[0, 0, 0, 0].add_(1e-6),
    "heads": lambda sd: setattr(sd.unet, "config", replace(sd.unet.config, heads=(4, 4))),
    "text encoder": lambda sd: next(sd.text_encoder.parameters()).view(-1)[0].add_(1e-6),
    "activation": lambda sd: setattr(sd.text_encoder.config, "hidden_act", "gelu"),
    "tokenizer": lambda sd: setattr(sd.tokenizer, "pad_token", "!"),
    "width": lambda sd: setattr(sd, "width", 2 * sd.width),
    "last step": other_schedule(final_alpha=torch.tensor(1.0)),
    "noise levels": other_schedule(alphas_cumprod=torch.linspace(0.9, 0.1, 1000)),
    "time steps": other_schedule(steps_offset=0),
    "prediction": other_schedule(prediction="v"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_trajectories_of_another_teacher_are_refused(change: str, sd: StableDiffusion, tmp_path: Path):
    generated(sd, tmp_path)
    CHANGES[change](sd)
    with pytest.raises(ValueError, match="other settings"):
        generated(sd, tmp_path)


def test_a_folder_without_tokenizer_makes_nothing(sd: StableDiffusion, tmp_path: Path):
    sd = load(sd.path, tokenizer=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="tokenizer"):
        generated(sd, tmp_path / "states")
    assert not (tmp_path / "states").exists()
