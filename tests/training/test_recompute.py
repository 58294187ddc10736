"""training/recompute.py: activation checkpointing computes the same gradients, with the switch of each forward pass."""

import copy
import math
import pickle

import pytest
import torch
from tiny import error, fill_up, tiny_student, tiny_unet, unet_inputs
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from minidistill import inject_lora
from minidistill.lora import LoRAModel, lora_parameters
from minidistill.training.recompute import recompute


def gradients(model: LoRAModel, interleaved: bool) -> list[Tensor]:
    """Gradients of a loss on teacher and student, with other calls between forward and backward if ``interleaved``."""
    z_t, t, context = unet_inputs(dtype=torch.float64)
    z_t.requires_grad_()
    student = model(z_t, t, context, lora_enabled=True)
    teacher = model(z_t, t, context)
    if interleaved:
        with torch.no_grad():
            model(z_t, t, context, lora_enabled=False)
            model(z_t, t, context, lora_enabled=True)
        model(z_t, t, context, lora_enabled=False)
    (student - 2 * teacher).square().mean().backward()
    return [z_t.grad, *(p.grad for p in lora_parameters(model))]


@pytest.mark.parametrize("below", [math.inf, 100.0], ids=["recompute all", "recompute cheap"])
def test_recomputation_sees_the_switch_of_its_own_forward(below: float):
    expected = gradients(tiny_student(dtype=torch.float64), interleaved=False)
    model = tiny_student(dtype=torch.float64)
    recompute(model, below)
    calls = []
    model.get_submodule("mid_block.resnets.0").register_forward_pre_hook(lambda *_: calls.append(1))
    actual = gradients(model, interleaved=True)
    assert len(calls) == 5 + 2  # five forward passes and two recomputations: blocks are indeed checkpointed
    assert max(error(a, b) for a, b in zip(actual, expected)) < 1e-12


@pytest.mark.parametrize("below", [math.inf, 100.0], ids=["recompute all", "recompute cheap"])
def test_recomputation_set_up_before_injection_is_an_error(below: float):
    """Not a wrong gradient: the backward pass would recompute with the switch off."""
    unet = tiny_unet().double()
    recompute(unet, below)
    with pytest.raises(CheckpointError, match="A different number of tensors"):
        gradients(fill_up(inject_lora(unet, rank=2)), interleaved=False)


def test_recomputation_can_be_turned_off_again():
    model, calls = tiny_student(dtype=torch.float64), []
    recompute(model, math.inf)
    recompute(model, 0)
    model.get_submodule("mid_block.resnets.0").register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(model, interleaved=False)
    assert len(calls) == 2


def test_backward_within_a_call_of_the_other_setting():
    """The recomputation runs while the switch has another setting, and restores that setting."""
    expected = gradients(tiny_student(dtype=torch.float64), interleaved=False)
    model = tiny_student(dtype=torch.float64)
    recompute(model, math.inf)
    with model.switch.set(True):
        actual = gradients(model, interleaved=True)
        assert model.switch.enabled
    assert max(error(a, b) for a, b in zip(actual, expected)) < 1e-12


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_recomputes_with_its_own_switch(duplicate):
    model = tiny_student(dtype=torch.float64)
    expected = gradients(model, interleaved=False)
    model.zero_grad()
    recompute(model, math.inf)
    copied = duplicate(model)
    assert max(error(a, b) for a, b in zip(gradients(copied, interleaved=True), expected)) < 1e-12
