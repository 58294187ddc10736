"""python -m minidistill.kernels: compile the fused kernel ahead of its first use."""

import torch

from minidistill.kernels.build import obstacle

reason = obstacle(torch.device("cuda"))
print(f"LoRA layers run in plain PyTorch: {reason}." if reason else "The fused kernel is built and loads.")
