"""attention_maps.py: the recorded weights are the ones that the network applies to its values."""

import pytest
import torch
from tiny import error, tiny_student, tiny_unet, unet_inputs
from torch import nn

from minidistill.evaluate.attention_maps import attention_maps
from minidistill.unet import Attention


def cross_attention(unet: nn.Module) -> dict[str, Attention]:
    return {name: module for name, module in unet.named_modules() if name.endswith("attn2")}


@torch.no_grad()
@pytest.mark.parametrize("lora_enabled", [False, True])
def test_the_recorded_weights_give_the_output_of_the_layer(lora_enabled: bool):
    """Sum the values with the recorded weights, token by token and head by head."""
    unet, outputs, values = tiny_student(), {}, {}
    for name, layer in cross_attention(unet).items():
        layer.register_forward_hook(lambda m, args, out, name=name: outputs.update({name: out}))
        layer.to_v.register_forward_hook(lambda m, args, out, name=name: values.update({name: out}))
    with attention_maps(unet) as maps:
        unet(*unet_inputs(side=6), lora_enabled=lora_enabled)

    assert maps.keys() == outputs.keys() == cross_attention(unet).keys()
    for name, layer in cross_attention(unet).items():
        (weights,) = maps[name]
        assert weights.shape[:3] == (2, 2, 5) and weights.shape[3] == weights.shape[4]  # [B, heads, L, H, W]
        mixed = torch.zeros_like(outputs[name])  # [B, H*W, C]
        for head, columns in enumerate(torch.arange(mixed.shape[-1]).chunk(2)):
            for token in range(5):
                weight = weights[:, head, token].flatten(1)[:, :, None]  # [B, H*W, 1]
                mixed[:, :, columns] += weight * values[name][:, token, None, columns]
        with unet.switch.set(lora_enabled):
            assert error(layer.to_out(mixed), outputs[name]) < 1e-5


def test_the_weights_of_a_pixel_sum_to_one():
    unet = tiny_unet()
    with torch.no_grad(), attention_maps(unet) as maps:
        unet(*unet_inputs())
    for (weights,) in maps.values():
        assert weights.min() >= 0 and error(weights.sum(2), torch.ones_like(weights.sum(2))) < 1e-6


def test_latents_that_are_not_square():
    unet, (z_t, t, context) = tiny_unet(), unet_inputs(side=6)
    with torch.no_grad(), attention_maps(unet) as maps:
        unet(z_t[:, :, :4], t, context)
    sizes = {tuple(weights.shape[3:]) for (weights,) in maps.values()}
    assert sizes == {(4, 6), (2, 3)}


def test_every_call_in_the_block_is_recorded_and_none_after():
    unet, inputs = tiny_unet(), unet_inputs()
    with torch.no_grad():
        before = unet(*inputs)
        with attention_maps(unet) as maps:
            during = [unet(*inputs) for _ in range(3)]
        unet(*inputs)
    assert all(len(calls) == 3 for calls in maps.values())
    assert all(torch.equal(before, output) for output in during)  # recording changes no output


def test_hooks_are_removed_when_the_block_fails():
    unet = tiny_unet()
    with pytest.raises(ZeroDivisionError), attention_maps(unet):
        raise ZeroDivisionError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
