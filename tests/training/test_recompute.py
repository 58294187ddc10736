"""training/recompute.py: activation checkpointing computes the same gradients, with the switch of each forward pass."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from tiny import TINY_UNET, error, fill_up, tiny_student, tiny_unet, unet_inputs
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from minidistill import inject_lora
from minidistill.lora import LoRAModel, lora_parameters
from minidistill.training.recompute import recompute

BELOW = pytest.mark.parametrize("below", [math.inf, 100.0], ids=["recompute all", "recompute cheap"])


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


@BELOW
def test_recomputation_sees_the_switch_of_its_own_forward(below: float):
    expected = gradients(tiny_student(dtype=torch.float64), interleaved=False)
    model = tiny_student(dtype=torch.float64)
    recompute(model, below)
    calls = []
    model.get_submodule("mid_block.resnets.0").register_forward_pre_hook(lambda *_: calls.append(1))
    actual = gradients(model, interleaved=True)
    assert len(calls) == 5 + 2  # five forward passes and two recomputations: blocks are indeed checkpointed
    assert max(error(a, b) for a, b in zip(actual, expected)) < 1e-12


@BELOW
def test_deep_transformers_are_recomputed_one_block_at_a_time(below: float):
    """As in SDXL. Each block's numbers are gone before those of the block below it are computed again."""
    config = replace(TINY_UNET, depth=(2, 0), mid_depth=3)
    plain, model = (fill_up(inject_lora(tiny_unet(config=config).double(), rank=2)) for _ in range(2))
    expected = gradients(plain, interleaved=False)
    recompute(model, below)
    calls = []
    for i, block in enumerate(model.get_submodule("mid_block.attentions.0.transformer_blocks")):
        block.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
        block.register_full_backward_hook(lambda *_, i=i: calls.append(f"{i} is done"))
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, interleaved=True), expected))
    assert calls[: 5 * 3] == [0, 1, 2] * 5  # five forward passes
    assert calls[5 * 3 :] == [2, "2 is done", 1, "1 is done", 0, "0 is done"] * 2


@BELOW
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
