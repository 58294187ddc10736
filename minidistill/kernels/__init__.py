"""LoRA layers on a GPU: one fused kernel where it pays, cuBLAS elsewhere. lora.py does without where there is neither.

The kernel is built when it is first asked for; ``python -m minidistill.kernels`` does so ahead, or says why it cannot.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from minidistill.kernels.build import obstacle
from minidistill.kernels.conv import lora_conv
from minidistill.kernels.dispatch import EVERYWHERE, FASTER, Region, dispatched


class LoRAFunctions(NamedTuple):
    """What computes a layer, W and b and the pair, from (x, W, b, A, B, scale): linear layers and convolutions.

    Convolutions take stride, padding and dilation besides.
    """

    linear: Callable[..., Tensor]
    conv: Callable[..., Tensor]

    @classmethod
    def within(cls, region: Region) -> "LoRAFunctions":
        return cls(partial(dispatched, region), partial(lora_conv, region))


def lora_functions(kernel: str, device: torch.device, dtype: torch.dtype) -> LoRAFunctions | None:
    """What computes the LoRA layers of a network in ``dtype`` on ``device``; None means lora.py's own lines.

    "auto" is the dispatcher where its table has the card, "fused" the fused kernel wherever it can be used, and "torch"
    is None. Where "fused" is asked for and cannot be had, a line says why.
    """
    if kernel == "fused":
        if reason := obstacle(device):
            print(f"LoRA layers run in plain PyTorch: {reason}.", file=sys.stderr)
            return None
        if dtype not in (torch.float16, torch.bfloat16):  # autocast may still ask for it
            print(f"The fused kernel is for float16 and bfloat16: in {dtype} it stays idle.", file=sys.stderr)
        return LoRAFunctions.within(EVERYWHERE)
    if kernel == "auto" and device.type == "cuda":
        region = FASTER.get(torch.cuda.get_device_capability(device))
        if region and not obstacle(device):
            return LoRAFunctions.within(region)
    return None
