"""Fused LoRA layers for GPUs. ``install(model)`` puts them into a LoRA model; without it the model is plain PyTorch.

The CUDA kernel is compiled on first use. ``python -m minidistill.kernels`` compiles it ahead of time, or says why it
cannot.
"""

from math import prod

from torch import Tensor

from minidistill.kernels.conv import lora_conv
from minidistill.kernels.dispatch import Region, choose_region, lora_linear_or_addmm
from minidistill.lora import LoRAConv, LoRALayer, LoRALinear, LoRAModel, lora_layers


def install(model: LoRAModel, kernel: str = "auto") -> None:
    """Replace the LoRA layers of ``model`` by fused ones, in place, for the device and dtype it has now.

    Args:
        kernel: "auto" fuses the layers for which the kernel was measured to be faster on this GPU, "fused" every layer
            the kernel supports, "torch" none. If "fused" is impossible, a line on stderr says why.
    """
    weight = next(model.parameters())
    sizes = {layer: size_of(layer) for layer in lora_layers(model).values()}
    region = choose_region(kernel, weight.device, weight.dtype, sizes.values())
    if region is None:
        return
    for layer, size in sizes.items():
        if not region.covers(*size):
            continue  # it stays plain PyTorch
        if isinstance(layer, LoRALinear):
            layer.__class__, layer.region = FusedLoRALinear, region
        elif isinstance(layer, LoRAConv) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            layer.__class__, layer.region = FusedLoRAConv, region


def size_of(layer: LoRALayer) -> tuple[int, int, int]:
    """K, N and rank; a convolution's K is that of its matrix, in * height * width."""
    N, *inputs = layer.weight.shape
    return prod(inputs), N, len(layer.lora_down)


def can_fuse(layer: LoRALayer) -> bool:
    """True if the low-rank pair is active and W is frozen: the operators compute no gradient for W."""
    return layer.active and not layer.weight.requires_grad


class FusedLoRALinear(LoRALinear):
    """LoRALinear, computed by one operator while the pair is active."""

    region: Region

    def forward(self, x: Tensor) -> Tensor:
        if not can_fuse(self):
            return super().forward(x)
        return lora_linear_or_addmm(self.region, x, self.weight, self.bias, self.lora_down, self.lora_up, self.scale)


class FusedLoRAConv(LoRAConv):
    """LoRAConv, computed by one operator while the pair is active."""

    region: Region

    def forward(self, x: Tensor) -> Tensor:
        if not can_fuse(self):
            return super().forward(x)
        layer = self.weight, self.bias, self.lora_down, self.lora_up, self.scale
        return lora_conv(self.region, x, *layer, self.stride, self.padding, self.dilation)
