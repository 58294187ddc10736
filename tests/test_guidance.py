"""guidance.py and distill.py: the formula, and who calls the network how often with which setting."""

import pytest
import torch
from tiny import error, randn, tiny_student, unet_inputs
from torch import Tensor

from minidistill import guided_noise
from minidistill.config import ScheduleConfig
from minidistill.distill import student, teacher
from minidistill.guidance import batched_guided_noise
from minidistill.schedule import Schedule, clean_and_noise


class Recorded:
    """A model whose prediction depends on all it is given; keeps the arguments of its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, z_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.calls.append((z_t, t, context))
        return torch.sin(z_t * context.mean((1, 2))[:, None, None, None] + t[:, None, None, None])


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z_t, t, cond = unet_inputs(dtype=torch.float64)
    return z_t, t, cond, randn(*cond.shape, seed=5, dtype=torch.float64)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5, 7.5, -1.0])
def test_formula(inputs, guidance: float):
    """As the paper has it, with w = s - 1: (1 + w) eps_cond - w eps_uncond."""
    z_t, t, cond, uncond = inputs
    w = guidance - 1
    expected = (1 + w) * Recorded()(z_t, t, cond) - w * Recorded()(z_t, t, uncond)
    assert error(guided_noise(Recorded(), z_t, t, cond, uncond, guidance), expected) < 1e-12


def test_in_one_call_on_a_batch_of_twice_the_size(inputs):
    model = Recorded()
    found = batched_guided_noise(model, *inputs, 2.5)
    assert error(found, guided_noise(Recorded(), *inputs, 2.5)) < 1e-12
    assert [len(x) for call in model.calls for x in call] == [2 * len(inputs[0])] * 3


def test_zero_is_unconditional(inputs):
    z_t, t, cond, uncond = inputs
    assert torch.equal(guided_noise(Recorded(), z_t, t, cond, uncond, 0.0), Recorded()(z_t, t, uncond))


def test_one_is_conditional(inputs):
    z_t, t, cond, uncond = inputs
    assert error(guided_noise(Recorded(), z_t, t, cond, uncond, 1.0), Recorded()(z_t, t, cond)) < 1e-12


def test_two_calls_on_the_same_latents(inputs):
    z_t, t, cond, uncond = inputs
    model = Recorded()
    guided_noise(model, z_t, t, cond, uncond, 7.5)
    assert len(model.calls) == 2
    assert all(torch.equal(call[0], z_t) and torch.equal(call[1], t) for call in model.calls)
    contexts = [call[2] for call in model.calls]
    assert any(c is cond for c in contexts) and any(c is uncond for c in contexts)


def test_guiding_v_is_guiding_eps(inputs):
    """At one z_t the two are linear in each other, so guidance may be applied to either."""
    z_t, t, cond, uncond = inputs
    alpha, sigma = Schedule.from_config(ScheduleConfig()).alpha_sigma(t, z_t)

    def eps(*args: Tensor) -> Tensor:
        return clean_and_noise("v", Recorded()(*args), args[0], alpha, sigma)[1]

    v = guided_noise(Recorded(), z_t, t, cond, uncond, 7.5)
    expected = guided_noise(eps, z_t, t, cond, uncond, 7.5)
    assert error(clean_and_noise("v", v, z_t, alpha, sigma)[1], expected) < 1e-12


@pytest.fixture
def unet():
    """A student, and the settings of its switch at each call."""
    model, settings = tiny_student(dtype=torch.float64), []
    model.get_submodule("conv_in").register_forward_hook(lambda *_: settings.append(model.switch.enabled))
    return model, settings


def test_teacher_is_two_calls_switched_off(unet, inputs):
    model, settings = unet
    z_t, t, cond, uncond = inputs
    prediction = teacher(model, z_t, t, cond, uncond, 3.0)
    assert settings == [False, False]
    base = model.base
    assert error(prediction, -2 * base(z_t, t, uncond) + 3 * base(z_t, t, cond)) < 1e-12


def test_teacher_keeps_no_graph(unet, inputs):
    z_t, t, cond, uncond = inputs
    assert not teacher(unet[0], z_t.requires_grad_(), t, cond, uncond, 3.0).requires_grad


def test_student_is_one_call_switched_on(unet, inputs):
    model, settings = unet
    z_t, t, cond, _ = inputs
    prediction = student(model, z_t, t, cond)
    assert settings == [True]
    assert prediction.requires_grad and torch.equal(prediction, model(z_t, t, cond, lora_enabled=True))


@pytest.mark.parametrize("wide, narrow", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)])
def test_latents_may_be_wider_than_the_weights(wide: torch.dtype, narrow: torch.dtype):
    """The network computes in its own dtype; what is done with its predictions stays in that of the latents."""
    model = tiny_student(dtype=narrow)
    z_t, t, cond = unet_inputs(dtype=wide)
    cond, uncond = cond.to(narrow), torch.zeros_like(cond, dtype=narrow)
    expected = model(z_t.to(narrow), t, cond, lora_enabled=True)
    assert expected.dtype == narrow and torch.equal(student(model, z_t, t, cond), expected.to(wide))
    eps_cond, eps_uncond = (model(z_t.to(narrow), t, context).to(wide) for context in (cond, uncond))
    assert torch.equal(teacher(model, z_t, t, cond, uncond, 3.0), eps_uncond + 3.0 * (eps_cond - eps_uncond))
