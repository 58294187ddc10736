"""guidance.py: the formula, in which interval it applies, and how often each predictor calls the network."""

import pytest
import torch
from test_schedule import schedule
from tiny import error, randn, tiny_student, unet_inputs
from torch import Tensor

from minidistill import guided_noise
from minidistill.conditioning import Conditioning
from minidistill.guidance import (
    Interval,
    away_from,
    batched_guided_noise,
    guided,
    interval_noise,
    normalized_guidance,
    plain,
    selective_interval,
    student,
)
from minidistill.schedule import clean_and_noise


class Recorded:
    """A model whose prediction depends on every input; it records the arguments of its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor | Conditioning]] = []

    def __call__(self, z_t: Tensor, t: Tensor, cond: Tensor | Conditioning) -> Tensor:
        self.calls.append((z_t, t, cond))
        tokens = cond.tokens if isinstance(cond, Conditioning) else cond
        return torch.sin(z_t * tokens.mean((1, 2))[:, None, None, None] + t[:, None, None, None])


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z_t, t, cond = unet_inputs(dtype=torch.float64)
    return z_t, t, cond, randn(*cond.shape, seed=5, dtype=torch.float64)


# The formula


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5, 7.5, -1.0])
def test_formula(inputs, guidance: float):
    """As the paper writes it, with w = s - 1: (1 + w) eps_cond - w eps_uncond."""
    z_t, t, cond, uncond = inputs
    w = guidance - 1
    expected = (1 + w) * Recorded()(z_t, t, cond) - w * Recorded()(z_t, t, uncond)
    assert error(guided_noise(Recorded(), z_t, t, cond, uncond, guidance), expected) < 1e-12


@pytest.mark.parametrize("wrap", [Conditioning, lambda tokens: tokens, lambda x: Conditioning(x, x.mean(1))])
def test_batched_guidance_is_one_call_of_twice_the_batch_size(wrap, inputs):
    z_t, t, cond, uncond = inputs
    model = Recorded()
    prediction = batched_guided_noise(model, z_t, t, wrap(cond), wrap(uncond), 2.5)
    assert error(prediction, guided_noise(Recorded(), z_t, t, cond, uncond, 2.5)) < 1e-12
    assert [len(x) for call in model.calls for x in call] == [2 * len(z_t)] * 3


@pytest.mark.parametrize("shape", [(4,), (4, 1, 1, 1)])
@pytest.mark.parametrize("call", [guided_noise, batched_guided_noise])
def test_each_image_may_have_its_own_guidance(call, shape: tuple):
    """Compared with one image at a time, for as many images as the latents have columns."""
    z_t, t, cond = unet_inputs(batch=4, side=4, dtype=torch.float64)
    uncond, scales = randn(*cond.shape, seed=5, dtype=torch.float64), [1.0, 0.0, -2.0, 7.5]
    prediction = call(Recorded(), z_t, t, cond, uncond, torch.tensor(scales, dtype=torch.float64).view(shape))
    inputs = zip(*(x.split(1) for x in (z_t, t, cond, uncond)), scales)
    assert error(prediction, torch.cat([guided_noise(Recorded(), *one) for one in inputs])) < 1e-12


def test_two_calls_on_the_same_latents(inputs):
    z_t, t, cond, uncond = inputs
    model = Recorded()
    guided_noise(model, z_t, t, cond, uncond, 7.5)
    assert len(model.calls) == 2
    assert all(torch.equal(call[0], z_t) and torch.equal(call[1], t) for call in model.calls)
    conds = [call[2] for call in model.calls]
    assert any(c is cond for c in conds) and any(c is uncond for c in conds)


def test_guiding_v_is_guiding_eps(inputs):
    """At one z_t, v and eps are linear in each other, so guidance may be applied to either."""
    z_t, t, cond, uncond = inputs
    alpha, sigma = schedule().alpha_sigma(t, z_t)

    def eps(*args: Tensor) -> Tensor:
        return clean_and_noise("v", Recorded()(*args), args[0], alpha, sigma)[1]

    v = guided_noise(Recorded(), z_t, t, cond, uncond, 7.5)
    expected = guided_noise(eps, z_t, t, cond, uncond, 7.5)
    assert error(clean_and_noise("v", v, z_t, alpha, sigma)[1], expected) < 1e-12


# In an interval


def test_an_interval_includes_both_ends():
    t = torch.tensor([299, 300, 500, 700, 701])
    assert Interval(300, 700).includes(t).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("way", ["two calls", "batched", "predictor"])
@pytest.mark.parametrize(
    "interval, t, is_guided",
    [(Interval(300, 700), t, 300 <= t <= 700) for t in (0, 299, 300, 411, 700, 701, 999)] + [(None, 20, True)],
)
def test_a_batch_inside_the_interval_is_guided(interval: Interval | None, t: int, is_guided: bool, way: str, inputs):
    """Outside it there is one call, without guidance; without an interval every t is inside."""
    z_t, _, cond, uncond = inputs
    model, t = Recorded(), torch.tensor([t, t])
    if way == "predictor":
        prediction = guided(model, cond, uncond, 4.0, interval)(z_t, t)
    else:
        prediction = interval_noise(model, z_t, t, cond, uncond, 4.0, interval, way == "batched")
    eps, eps_uncond = Recorded()(z_t, t, cond), Recorded()(z_t, t, uncond)
    assert error(prediction, 4 * eps - 3 * eps_uncond if is_guided else eps) < 1e-12
    assert [len(call[0]) for call in model.calls] == (([4] if way == "batched" else [2, 2]) if is_guided else [2])


@pytest.mark.parametrize("batched", [False, True])
def test_in_a_mixed_batch_each_example_has_its_own_guidance(batched: bool):
    """Compared with one example at a time, in float64."""
    t = torch.tensor([0, 299, 300, 512, 700, 701, 999])
    z_t, cond, uncond = (
        randn(7, *shape, seed=i, dtype=torch.float64) for i, shape in enumerate([(4, 3, 3), (5, 8), (5, 8)])
    )
    model = Recorded()
    prediction = interval_noise(model, z_t, t, cond, uncond, 7.5, Interval(300, 700), batched)
    expected = torch.cat([Recorded()(z_t[i : i + 1], t[i : i + 1], cond[i : i + 1]) for i in range(7)])
    for i in (2, 3, 4):
        eps_uncond = Recorded()(z_t[i : i + 1], t[i : i + 1], uncond[i : i + 1])[0]
        expected[i] = -6.5 * eps_uncond + 7.5 * expected[i]
    assert error(prediction, expected) < 1e-12
    assert len(model.calls) == (1 if batched else 2)


def test_the_interval_keeps_the_dtype_of_the_latents():
    z_t, t, cond = unet_inputs()
    t = torch.tensor([100, 500])
    for dtype in (torch.float32, torch.bfloat16):
        out = interval_noise(lambda z_t, t, cond: z_t, z_t.to(dtype), t, cond, cond, 4.0, Interval(300, 700))
        assert out.dtype == dtype


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 25, 50, 1000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.34, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("spacing", [None, "trailing"])
def test_selective_guidance_drops_the_last_steps(steps: int, share: float, spacing: str | None):
    """Exactly the last round(share * steps) of DDIM's steps, as selective guidance has always been counted here."""
    timesteps = schedule().timesteps(steps, spacing)
    dropped = round(share * steps)
    interval = selective_interval(schedule(), steps, share, spacing)
    guided_steps = timesteps if interval is None else [t for t in timesteps if interval.includes(torch.tensor([t]))]
    assert guided_steps == timesteps[: steps - dropped]
    assert (interval is None) == (dropped == 0)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share: float):
    with pytest.raises(ValueError, match=f"from 0 to 1, not {share:g}"):
        selective_interval(schedule(), 25, share)


# Predictors: functions of (z_t, t)


def test_plain_is_one_call(inputs):
    z_t, t, cond, _ = inputs
    model = Recorded()
    assert torch.equal(plain(model, cond)(z_t, t), Recorded()(z_t, t, cond)) and len(model.calls) == 1


def test_student_is_one_call_switched_on(inputs):
    z_t, t, cond, _ = inputs
    model, settings = tiny_student(dtype=torch.float64), []
    model.get_submodule("conv_in").register_forward_hook(lambda *_: settings.append(model.switch.enabled))
    prediction = student(model, cond)(z_t, t)
    assert settings == [True] and torch.equal(prediction, model(z_t, t, cond, lora_enabled=True))
    assert not torch.equal(prediction, plain(model, cond)(z_t, t)) and settings == [True, True, False]


# A negative prompt in one call


def test_normalized_guidance_keeps_what_agrees():
    positive = randn(2, 5, 8, dtype=torch.float64)
    assert error(normalized_guidance(positive, positive), positive) < 1e-12


def test_normalized_guidance_is_limited():
    """However far away the negative prompt is: at most share * limit + (1 - share) of the size, token by token."""
    positive, negative = randn(2, 5, 8, dtype=torch.float64), 1e6 * randn(2, 5, 8, seed=1, dtype=torch.float64)
    size = normalized_guidance(positive, negative).norm(p=1, dim=-1) / positive.norm(p=1, dim=-1)
    assert (size <= 0.25 * 2.5 + 0.75 + 1e-9).all()


def test_away_from_is_one_call_and_ends_with_its_block(inputs):
    z_t, t, cond, negative = inputs
    model, calls = tiny_student(dtype=torch.float64), []
    model.get_submodule("conv_in").register_forward_hook(lambda *_: calls.append(1))
    predict = student(model, cond)
    before = predict(z_t, t)
    with pytest.raises(KeyError), away_from(model, Conditioning(negative[:1])):
        led = predict(z_t, t)
        with away_from(model, Conditioning(negative[1:2])):
            led_by_both = predict(z_t, t)
        assert not torch.allclose(led_by_both, led) and torch.equal(predict(z_t, t), led)
        raise KeyError
    assert len(calls) == 4 and not torch.allclose(led, before) and torch.equal(predict(z_t, t), before)
