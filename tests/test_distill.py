"""distill.py: teacher and student, what the student is asked for, when it counts as diverged, and its learning rate."""

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from test_guidance import Recorded
from tiny import error, fill_up, randn, tiny_student, tiny_unet, unet_inputs
from torch import Tensor, nn

from minidistill.conditioning import Conditioning
from minidistill.config import ScheduleConfig
from minidistill.distill import (
    ENOUGH_EXAMPLES,
    Batch,
    Dial,
    FullStudent,
    error_and_limit,
    few_step_states,
    few_step_weight,
    guided_target,
    learning_rate,
    stored_target,
)
from minidistill.guidance import Interval
from minidistill.lora import LoRAModel
from minidistill.samplers import ddim_loop, ddim_step
from minidistill.schedule import Schedule


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z_t, t, cond = unet_inputs(dtype=torch.float64)
    return z_t, t, cond, randn(1, *cond.shape[1:], seed=5, dtype=torch.float64).expand_as(cond)


def teacher(
    model: nn.Module, z_t: Tensor, t: Tensor, cond: Tensor, uncond: Tensor, guidance: float, interval=None
) -> Tensor:
    """The target of the teacher in the loop, asked as train.py asks it."""
    batch = Batch(z_t, t, Conditioning(cond), torch.ones(len(t), 1, 1, 1))
    target = guided_target(Conditioning(uncond[:1]), guidance, interval, batched=False)
    return target(partial(model, lora_enabled=False), batch)


@pytest.fixture
def unet():
    """A student, and the settings of its switch at each call."""
    model, settings = tiny_student(dtype=torch.float64), []
    model.get_submodule("conv_in").register_forward_hook(lambda *_: settings.append(model.switch.enabled))
    return model, settings


def examples(size: int, seed: int = 0, target: bool = True) -> Batch:
    z_t, tokens, stored = (
        randn(size, *shape, seed=seed + i) for i, shape in enumerate([(4, 4, 4), (5, 32), (4, 4, 4)])
    )
    t = torch.randint(1000, (size,), generator=torch.Generator().manual_seed(seed))
    return Batch(z_t, t, Conditioning(tokens), torch.ones(size, 1, 1, 1), stored if target else None)


# Teacher and student


def test_teacher_is_two_calls_switched_off(unet, inputs):
    model, settings = unet
    z_t, t, cond, uncond = inputs
    prediction = teacher(model, z_t, t, cond, uncond, 3.0)
    assert settings == [False, False]
    base = model.base
    assert error(prediction, -2 * base(z_t, t, uncond) + 3 * base(z_t, t, cond)) < 1e-12


def test_teacher_outside_its_interval_is_one_call_switched_off(unet, inputs):
    model, settings = unet
    z_t, t, cond, uncond = inputs  # t is 20 and 420
    assert torch.equal(teacher(model, z_t, t, cond, uncond, 3.0, Interval(500, 999)), model.base(z_t, t, cond))
    assert settings == [False, False]  # the teacher's call, and the one it is compared with


def test_teacher_keeps_no_graph(unet, inputs):
    z_t, t, cond, uncond = inputs
    assert not teacher(unet[0], z_t.requires_grad_(), t, cond, uncond, 3.0).requires_grad


@pytest.mark.parametrize("wide, narrow", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)])
def test_latents_may_be_wider_than_the_weights(wide: torch.dtype, narrow: torch.dtype):
    """The network computes in its own dtype; whatever is done with its predictions keeps that of the latents."""
    model = tiny_student(dtype=narrow)
    z_t, t, cond = unet_inputs(dtype=wide)
    cond, uncond = cond.to(narrow), torch.zeros_like(cond, dtype=narrow)
    expected = model(z_t.to(narrow), t, cond, lora_enabled=True)
    assert expected.dtype == narrow and torch.equal(model(z_t, t, cond, lora_enabled=True), expected.to(wide))
    eps_cond, eps_uncond = (model(z_t.to(narrow), t, context).to(wide) for context in (cond, uncond))
    assert torch.equal(teacher(model, z_t, t, cond, uncond, 3.0), eps_uncond + 3.0 * (eps_cond - eps_uncond))


def test_a_full_student_is_a_second_network_in_its_own_dtype():
    base, other = tiny_unet().bfloat16(), tiny_unet(seed=1)
    model = FullStudent(base, other)
    z_t, t, tokens = unet_inputs()
    with torch.no_grad():
        for cond in (tokens.bfloat16(), Conditioning(tokens.bfloat16())):
            assert torch.equal(model(z_t, t, cond), base(z_t, t, tokens.bfloat16()))
            assert torch.equal(model(z_t, t, cond, lora_enabled=True), other(z_t, t, tokens.bfloat16().float()))


# Batches and targets


def tensors(batch: Batch) -> list[Tensor]:
    return [batch.z_t, batch.t, batch.cond.tokens, batch.weight, *([] if batch.target is None else [batch.target])]


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("size, parts, sizes", [(6, 2, [3, 3]), (5, 2, [3, 2]), (3, 5, [1, 1, 1]), (4, 1, [4])])
def test_a_batch_splits_into_parts(size: int, parts: int, sizes: list[int], target: bool):
    whole = examples(size, target=target)
    split = whole.split(parts)
    assert [len(part) for part in split] == sizes and len(whole) == size
    for whole_tensor, *part_tensors in zip(tensors(whole), *map(tensors, split), strict=True):
        assert torch.equal(torch.cat(part_tensors), whole_tensor)
    assert (split[0].target is None) != target


def test_a_batch_maps_every_tensor():
    batch = examples(3)
    assert all(torch.equal(x, 2 * y) for x, y in zip(tensors(batch.map(lambda x: 2 * x)), tensors(batch), strict=True))


def test_the_stored_target_calls_no_network():
    batch = examples(3)
    assert stored_target(None, batch) is batch.target


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("interval", [None, Interval(300, 700)])
def test_the_guided_target_is_the_teacher_now(interval: Interval | None, batched: bool):
    """One uncond prompt for the whole batch. Compared with the formula, one example at a time in float64."""
    batch = examples(6).map(lambda x: x.double() if x.is_floating_point() else x)
    uncond, model = Conditioning(randn(1, 5, 32, seed=9, dtype=torch.float64)), Recorded()

    target = guided_target(uncond, 4.0, interval, batched)(model, batch)
    for i in range(6):
        one = batch[i : i + 1]
        expected = Recorded()(one.z_t, one.t, one.cond)
        if interval is None or 300 <= one.t <= 700:
            expected = 4 * expected - 3 * Recorded()(one.z_t, one.t, uncond)
        assert error(target[i : i + 1], expected) < 1e-12
    assert [len(call[0]) for call in model.calls] == ([12] if batched else [6, 6])
    assert len({call[2].tokens.stride() for call in model.calls}) == 1  # or --compile would make another graph


# Divergence


def squared_error(model: LoRAModel, batch: Batch, enabled: bool) -> float:
    with torch.no_grad():
        return (model(batch.z_t, batch.t, batch.cond, lora_enabled=enabled) - batch.target).square().mean().item()


def test_a_few_examples_are_compared_with_zeros():
    """Fewer than ENOUGH_EXAMPLES: a student is allowed the error of a prediction of zeros."""
    model, batches = fill_up(tiny_student()), [examples(2), examples(3, seed=10)]
    assert sum(map(len, batches)) < ENOUGH_EXAMPLES
    student_error, most = error_and_limit(model, batches)
    assert student_error == pytest.approx(sum(squared_error(model, b, True) for b in batches) / 2, rel=1e-5)
    assert most == pytest.approx(sum(b.target.square().mean().item() for b in batches) / 2, rel=1e-5)


def test_enough_examples_are_compared_with_the_teacher_alone_too():
    """Four times W's own squared error, where that is less than the error of zeros."""
    model, batch = fill_up(tiny_student()), examples(ENOUGH_EXAMPLES)
    with torch.no_grad():
        plain = model(batch.z_t, batch.t, batch.cond)
    near = Batch(batch.z_t, batch.t, batch.cond, batch.weight, plain + 0.1 * batch.target)
    student_error, most = error_and_limit(model, [near])
    assert most == pytest.approx(4 * squared_error(model, near, False), rel=1e-4)
    assert most < near.target.square().mean().item()
    assert student_error == pytest.approx(squared_error(model, near, True), rel=1e-5)
    assert error_and_limit(model, [batch])[1] == pytest.approx(batch.target.square().mean().item(), rel=1e-5)


def test_only_guided_examples_are_compared_with_the_teacher_alone():
    """Outside its interval W alone is right, and any student would be infinitely further from the teacher than W."""
    model, batch = fill_up(tiny_student()), examples(40)
    inside = (batch.t >= 300) & (batch.t <= 800)
    assert ENOUGH_EXAMPLES <= inside.sum() < 40
    with torch.no_grad():
        plain = model(batch.z_t, batch.t, batch.cond)
    guided = plain + 0.1 * batch.target * inside[:, None, None, None]
    target = Batch(batch.z_t, batch.t, batch.cond, batch.weight, guided)
    alone = Batch(*(x[inside] for x in (batch.z_t, batch.t, batch.cond, batch.weight, guided)))
    student_error, most = error_and_limit(model, [target], Interval(300, 800))
    assert student_error == pytest.approx(squared_error(model, alone, True), rel=1e-5)
    assert most == pytest.approx(4 * squared_error(model, alone, False), rel=1e-4)
    few = error_and_limit(model, [target], Interval(300, 301))  # too few inside: all are compared with zeros
    assert few[0] == pytest.approx(squared_error(model, target, True), rel=1e-5)
    assert few[1] == pytest.approx(guided.square().mean().item(), rel=1e-5)


def test_weights_count_in_the_error_and_in_both_limits():
    model, batch = fill_up(tiny_student()), examples(ENOUGH_EXAMPLES)
    with torch.no_grad():
        near = replace(batch, target=model(batch.z_t, batch.t, batch.cond) + 0.1 * batch.target)
    for one in (batch, near):  # limited by zeros, and by W alone
        double = [2 * x for x in error_and_limit(model, [one])]
        assert error_and_limit(model, [replace(one, weight=2 * one.weight)]) == pytest.approx(double, rel=1e-5)


# Learning rate


def test_learning_rate_rises_linearly_and_falls_along_a_cosine():
    rates = [learning_rate(step, 100, 2.0, warmup=10) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[50:] == pytest.approx([1 + math.cos(math.pi * step / 100) for step in range(50, 100)])
    assert max(rates) <= 2.0 and 0 < rates[-1] < 2e-3 and learning_rate(100, 100, 2.0, 10) == pytest.approx(0)


# Few steps


def fine_trajectory(prediction: str, steps: int) -> tuple[Schedule, Tensor, Tensor, Tensor]:
    """States [B, S, 4, h, w] of a made-up model at trailing steps, its predictions there, and the ends, in float64."""
    s = Schedule.from_config(ScheduleConfig(prediction=prediction))
    z_T = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pairs = list(pairwise([*s.timesteps(steps, "trailing"), -1]))
    path = list(ddim_loop(lambda z_t, t: torch.tanh(z_t.roll(1, 1)) + 0.5 * z_t, s, z_T, pairs))
    states = torch.stack([z_T, *(z_t for z_t, _, _ in path)], 1)
    return s, states[:, :-1], torch.stack([predicted for _, predicted, _ in path], 1), states[:, -1]


@pytest.mark.parametrize("student_steps", [1, 2, 4, 8, 24])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_our_ddim_step_lands_on_the_teachers_next_state(prediction: str, student_steps: int):
    s, fine, predictions, z_0 = fine_trajectory(prediction, 24)
    z_t, target = few_step_states(s, fine, z_0, student_steps)
    timesteps = s.timesteps(student_steps, "trailing")
    assert timesteps == s.timesteps(24, "trailing")[:: 24 // student_steps]
    following = torch.cat([z_t[:, 1:], z_0[:, None]], 1)
    for i, (t, t_next) in enumerate(pairwise([*timesteps, -1])):
        landing = ddim_step(s, target[:, i], z_t[:, i], t, t_next)
        assert (landing - following[:, i]).abs().max() < 1e-12
    if student_steps == 24:  # as many steps as the teacher: the target is its own prediction
        assert (target - predictions).abs().max() < 1e-12


def test_few_steps_do_not_depend_on_pytorchs_default_dtype():
    s, fine, _, z_0 = fine_trajectory("eps", 4)
    expected, weight = few_step_states(s, fine, z_0, 2)[1], few_step_weight(s, 2)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(few_step_states(s, fine, z_0, 2)[1], expected) and torch.equal(few_step_weight(s, 2), weight)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_weight_makes_an_error_of_the_prediction_one_of_the_landing(prediction: str):
    s = Schedule.from_config(ScheduleConfig(prediction=prediction))
    z_t, wrong = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    pairs = pairwise([*s.timesteps(4, "trailing"), -1])
    moved = torch.cat([ddim_step(s, wrong, z_t, t, t_next).flatten() ** 2 for t, t_next in pairs])
    weight = few_step_weight(s, 4)
    assert weight.mean().item() == pytest.approx(1)
    torch.testing.assert_close(weight.double(), moved / moved.mean(), rtol=1e-6, atol=0)


def test_a_dial_draws_straight_lines_through_what_was_measured():
    dial = Dial.through(3.0, [(2.0, 0.6)])
    assert [dial.strength(w) for w in (1.5, 2, 2.5, 3)] == pytest.approx([0.3, 0.6, 0.8, 1])
    with pytest.warns(UserWarning, match="up to guidance 3"):
        assert dial.strength(3.5) == pytest.approx(1.2)
    with pytest.raises(ValueError, match="above 1, not at 1: leave guidance out"):
        dial.strength(1)


def test_a_dial_that_was_not_measured_is_a_line_and_says_so():
    dial = Dial.through(3.0)
    assert dial.strength(3) == 1
    with pytest.warns(UserWarning, match="a guess"):
        assert dial.strength(2) == 0.5
