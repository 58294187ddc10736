"""The LoRA layers compared with peft's: the same W, A and B give the same outputs and gradients."""

import copy

import pytest
import torch
from test_lora import LAYERS
from tiny import error, randn
from torch import nn

from minidistill import inject_lora, merge_lora

peft = pytest.importorskip("peft", reason="compares with peft")


@pytest.mark.parametrize("kind", ["linear", "1x1", "3x3", "stride_2", "no_padding"])
def test_layer(kind: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(LAYERS[kind]()).double()
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["0"], init_lora_weights="gaussian")
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(base)).double()
    ours = inject_lora(base, rank=3, alpha=7, targets=["0"])
    down, up = (getattr(theirs[0], name)["default"].weight for name in ("lora_A", "lora_B"))
    pair = ours.get_submodule("0")
    with torch.no_grad():
        up.copy_(randn(*up.shape, dtype=torch.float64))
        pair.lora_down.copy_(down)
        pair.lora_up.copy_(up)

    x = randn(2, 6, dtype=torch.float64) if kind == "linear" else randn(2, 6, 8, 7, dtype=torch.float64)
    reference, output = theirs(x), ours(x, lora_enabled=True)
    assert error(output, reference) <= 1e-12
    reference.square().sum().backward()
    output.square().sum().backward()
    assert error(pair.lora_down.grad, down.grad) <= 1e-12
    assert error(pair.lora_up.grad, up.grad) <= 1e-12
    merge_lora(ours)
    theirs[0].merge()
    assert error(pair.weight, theirs[0].weight) <= 1e-12
