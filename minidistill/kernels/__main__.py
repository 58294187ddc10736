"""python -m minidistill.kernels: build the fused kernel now, not when a layer first needs it."""

import torch

from minidistill.kernels.build import obstacle

reason = obstacle(torch.device("cuda"))
print(f"LoRA layers run in plain PyTorch: {reason}." if reason else "The fused kernel is built and loads.")
