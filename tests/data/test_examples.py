"""data/examples.py: batches depend on their number alone, and hold what was stored or noised."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_distill import tensors
from tiny import error

from minidistill import StableDiffusion, load
from minidistill.data.examples import NoisedLatents, StoredStates, batch_indices, batch_to_device, prompts_of
from minidistill.data.trajectories import Trajectories, generate
from minidistill.distill import few_step_weight

CAPTIONS = ["a red apple", "a green pear", "a rocket on a purple background", "a cat", "never used"]


@pytest.fixture(scope="module")
def states(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    """Six trajectories of three steps, of which two prompts are used twice."""
    folder = tmp_path_factory.mktemp("states")
    return generate(load(tiny_model), CAPTIONS[:4], folder, count=6, steps=3, guidance=4.0, batch=4)


def examples_of(kind, sd: StableDiffusion, states: Trajectories, weighting: str = "even", seed: int = 5):
    prompts, prompt_of = prompts_of(sd, CAPTIONS, states)
    return kind(states, prompts, prompt_of, sd.schedule, batch_size=4, seed=seed, weighting=weighting)


# Which examples


def order(size: int, batch: int, seed: int, steps: range) -> list[list[int]]:
    return [batch_indices(size, batch, seed, step).tolist() for step in steps]


def test_an_epoch_takes_nothing_twice_and_the_next_is_shuffled_anew():
    batches = order(12, 4, 0, range(6))
    first, second = (sorted(sum(batches[i : i + 3], [])) for i in (0, 3))
    assert first == second == list(range(12)) and batches[:3] != batches[3:]


def test_what_does_not_fill_a_batch_is_left_for_another_epoch():
    batches = order(14, 4, 5, range(30))
    assert all(len(set(batch)) == 4 for batch in batches)
    assert all(len(set(sum(batches[i : i + 3], []))) == 12 for i in range(0, 30, 3))
    assert set(sum(batches, [])) == set(range(14))


@pytest.mark.parametrize("start", [1, 3, 4, 7, 8])
def test_a_resumed_run_sees_the_batches_that_would_have_come(start: int):
    """Compared with an endless generator that shuffles anew each epoch, as the loop had at first."""

    def endless():
        epoch = 0
        while True:
            permutation = torch.randperm(14, generator=torch.Generator().manual_seed(5 + epoch)).tolist()
            yield from (permutation[i : i + 4] for i in (0, 4, 8))
            epoch += 1

    expected = [batch for batch, _ in zip(endless(), range(start + 6))]
    assert order(14, 4, 5, range(start, start + 6)) == expected[start:]


def test_fewer_examples_than_a_batch():
    assert [sorted(batch) for batch in order(3, 8, 0, range(2))] == [[0, 1, 2], [0, 1, 2]]


# What is in a batch


def test_used_prompts_are_encoded_once(sd: StableDiffusion, states: Trajectories):
    prompts, prompt_of = prompts_of(sd, CAPTIONS, states)
    assert len(prompts) == 4 and prompt_of.shape == (6,)  # "never used" is not encoded
    for trajectory, row in enumerate(prompt_of):
        number = states.prompts(torch.tensor([trajectory])).item()
        expected = sd.encode_prompt([CAPTIONS[number]]).tokens[0]
        assert error(prompts.tokens[row], expected) < 1e-5


def test_batches_of_stored_states(sd: StableDiffusion, states: Trajectories):
    """z_t, t, prompt and target of the same states, as the trajectories give them one by one."""
    examples = examples_of(StoredStates, sd, states)
    assert len(examples) == 6 * 3
    for step in (0, 5):
        batch = examples.batch(step)
        for i, example in enumerate(batch_indices(18, 4, 5, step)):
            trajectory, position = states.examples[example].split(1)
            z_t, target, t = states.states(trajectory, position)
            caption = CAPTIONS[states.prompts(trajectory).item()]
            assert torch.equal(batch.z_t[i], z_t[0]) and torch.equal(batch.target[i], target[0])
            assert batch.t[i] == t and error(batch.cond.tokens[i], sd.encode_prompt([caption]).tokens[0]) < 1e-5
        assert torch.equal(batch.weight, torch.ones(4, 1, 1, 1))


def test_batches_of_noised_latents(sd: StableDiffusion, states: Trajectories):
    """z_t is the trajectory's end, noised to t; no target is stored."""
    examples, times = examples_of(NoisedLatents, sd, states), []
    assert len(examples) == 6
    for step in range(8):
        batch, chosen = examples.batch(step), batch_indices(6, 4, 5, step)
        alpha_bar = sd.schedule.alphas_cumprod[batch.t][:, None, None, None]
        noise = (batch.z_t - alpha_bar.sqrt() * states.ends(chosen)) / (1 - alpha_bar).sqrt()
        assert abs(noise.std() - 1) < 0.1 and abs(noise.mean()) < 0.1 and batch.target is None
        for i, trajectory in enumerate(chosen):
            caption = CAPTIONS[states.prompts(trajectory[None]).item()]
            assert error(batch.cond.tokens[i], sd.encode_prompt([caption]).tokens[0]) < 1e-5
        times += batch.t.tolist()
    assert len(set(times)) > 25 and min(times) < 200 and max(times) > 800
    examples.schedule = replace(sd.schedule, alphas_cumprod=sd.schedule.alphas_cumprod[:2])
    assert {t for step in range(8) for t in examples.batch(step).t.tolist()} == {0, 1}  # every t, also the last


@pytest.mark.parametrize("kind", [StoredStates, NoisedLatents])
def test_a_batch_depends_on_seed_and_number_alone(kind, sd: StableDiffusion, states: Trajectories):
    one, again, other = (examples_of(kind, sd, states, seed=seed) for seed in (5, 5, 6))
    again.batch(0), torch.seed()
    for step in (3, 2):
        assert all(torch.equal(x, y) for x, y in zip(tensors(one.batch(step)), tensors(again.batch(step))))
        assert not torch.equal(one.batch(step).z_t, other.batch(step).z_t)
    assert not torch.equal(one.batch(2).z_t, one.batch(3).z_t)


@pytest.mark.parametrize("kind", [StoredStates, NoisedLatents])
def test_min_snr_weights(kind, sd: StableDiffusion, states: Trajectories):
    """min(SNR, 5) / SNR of a network that predicts eps, for each example's own t."""
    batch = examples_of(kind, sd, states, weighting="min-snr").batch(1)
    alpha_bar = sd.schedule.alphas_cumprod[batch.t].double()
    snr = alpha_bar / (1 - alpha_bar)
    assert batch.weight.shape == (4, 1, 1, 1) and batch.weight.dtype == torch.float32
    assert error(batch.weight.flatten().double(), snr.clamp(max=5) / snr) < 1e-5


def test_weights_of_few_steps(sd: StableDiffusion, states: Trajectories):
    """Each of the states on the way to the next has the weight of its own step."""
    examples = examples_of(StoredStates, sd, states)
    examples.student_steps = 3
    batch = examples.batch(0)
    steps = [sd.schedule.timesteps(3).index(t) for t in batch.t]
    assert len(set(steps)) > 1
    assert torch.equal(batch.weight.flatten(), few_step_weight(sd.schedule, 3)[steps])


def test_a_batch_moves_whole(sd: StableDiffusion, states: Trajectories):
    batch = examples_of(StoredStates, sd, states).batch(0)
    assert {x.device.type for x in tensors(batch_to_device(batch, torch.device("meta")))} == {"meta"}
    same = batch_to_device(batch, torch.device("cpu"))
    assert all(torch.equal(x, y) for x, y in zip(tensors(same), tensors(batch), strict=True))
