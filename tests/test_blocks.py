"""blocks.py: a frozen convolution, beside torch's own."""

import pytest
import torch
from tiny import error, randn
from torch import Tensor, nn

from minidistill.blocks import Conv2d


def kept(layer: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The result, and what autograd keeps for its backward pass."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        return layer(x), saved


@pytest.mark.parametrize("how", [dict(padding=1), dict(stride=2, padding=1), dict(bias=False)], ids=str)
def test_a_frozen_convolution_keeps_its_weight_alone(how: dict):
    layer = Conv2d(3, 5, 3, **how).double().requires_grad_(False)
    x = randn(2, 3, 7, 6, dtype=torch.float64).requires_grad_()
    y, saved = kept(layer, x)
    assert [t.data_ptr() for t in saved] == [layer.weight.data_ptr()]
    usual = nn.Conv2d.forward(layer, x)
    assert torch.equal(y, usual)
    dy = randn(*y.shape, seed=1, dtype=torch.float64)
    assert error(*(torch.autograd.grad(out, x, dy)[0] for out in (y, usual))) < 1e-14


def test_a_convolution_that_learns_is_torchs_own():
    layer, x = Conv2d(3, 5, 3), randn(2, 3, 7, 6).requires_grad_()
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()  # its bias learns
    assert layer.weight.grad is None and torch.equal(layer.bias.grad, torch.full((5,), 2 * 5 * 4.0))


def test_under_autocast():
    layer, x = Conv2d(3, 5, 3).requires_grad_(False), randn(2, 3, 7, 6).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    (dx,) = torch.autograd.grad(y.float().square().sum(), x)
    (expected,) = torch.autograd.grad(nn.Conv2d.forward(layer, x).square().sum(), x)
    assert y.dtype == torch.bfloat16 and dx.dtype == torch.float32 and error(dx, expected) < 0.02
