"""The shapes in the kernel's GPU tests against those of diffusers' UNets."""

import torch
from kernel_shapes import CONVS, SDXL
from torch import Tensor, nn

from .helpers import diffusers
from .test_sdxl import PUBLISHED

SD15_CONFIG = dict(sample_size=64, cross_attention_dim=768)


def shapes(config: dict) -> tuple[set, set]:
    """Shapes of linear layers and 1x1 convolutions, and of 3x3 convolutions except the outermost and the resamplers."""
    linear, convolutions = set(), set()

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        N, K, *size = layer.weight.shape
        if size == [3, 3]:
            convolutions.add((K, N, inputs[0].shape[-1]))
        else:
            linear.add((inputs[0].numel() // K, K, N))

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**config)
        for name, layer in unet.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and not name.startswith("conv_") and "samplers." not in name:
                layer.register_forward_pre_hook(note)
        z_t = torch.empty(1, 4, config["sample_size"], config["sample_size"])
        context = torch.empty(1, 77, config["cross_attention_dim"])
        conditions = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        unet(z_t, torch.empty(1), context, added_cond_kwargs=conditions)
    return linear, convolutions


def test_no_layer_is_missing():
    (linear, convolutions), (_, others) = shapes(PUBLISHED), shapes(SD15_CONFIG)
    assert linear == set(SDXL) and convolutions | others == set(CONVS)
