"""Activation checkpointing: keep what is expensive to compute for the backward pass, recompute the rest there."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from minidistill.blocks import Upsample
from minidistill.config import UNetConfig
from minidistill.lora import LoRAModel, Switch
from minidistill.unet import SpatialTransformer, UNet

# The threshold of ``train.py --memory low``, in multiply-adds per number. In SD 1.5 it keeps the 3x3 convolutions,
# attention over many pixels and the widest linear layers; results/README.md has the cost of other thresholds.
LOW_MEMORY = 1000
XL_LOW_MEMORY = 2500  # SDXL has 70 transformer blocks; this also drops attention over 32x32 pixels and linear layers


def low_memory(config: UNetConfig) -> float:
    """The threshold of ``train.py --memory low`` for a UNet."""
    return XL_LOW_MEMORY if config.pooled_width else LOW_MEMORY


def recompute(model: UNet | LoRAModel, below: float) -> None:
    """Make the UNet's blocks keep only activations that took ``below`` or more multiply-adds per number.

    0 keeps everything; ``math.inf`` keeps only the inputs of blocks. Call it after ``inject_lora``: the backward pass
    needs the model's switch.
    """
    unet = model.base if isinstance(model, LoRAModel) else model
    vars(unet).pop("run_block", None)  # back to the class's own
    if below:
        unet.run_block = partial(run_checkpointed, getattr(model, "switch", None), below)


def run_checkpointed(switch: Switch | None, below: float, block: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """``block(*args)``, checkpointed if there will be a backward pass."""
    if not torch.is_grad_enabled():
        return block(*args)
    if isinstance(block, SpatialTransformer) and len(block.transformer_blocks) > 1:
        # SDXL's have up to ten blocks: each is recomputed on its own, so only one block's activations exist at a time.
        return block(*args, run_block=partial(run_checkpointed, switch, below))
    if isinstance(block, Upsample):
        below = math.inf  # a frozen convolution needs what goes into it only, and recomputing stops before it
    if switch is not None:
        # The backward pass runs after the switch has been set back: recompute with its present setting.
        block = partial(call_switched, switch, switch.enabled, block)
    keep = partial(create_selective_checkpoint_contexts, partial(policy, below))
    # Nothing in a block is random, so there is no generator state to preserve.
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=keep)


def call_switched(switch: Switch, enabled: bool, block: Callable[..., Tensor], *args: Tensor) -> Tensor:
    with switch.set(enabled):
        return block(*args)


def policy(below: float, _: object, operator: OpOverload, *args, **kwargs) -> CheckpointPolicy:
    """A stored number takes the same memory whatever it cost, so dropping the cheap ones saves most for least."""
    expensive = multiply_adds(operator, args) >= below
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE


def multiply_adds(operator: OpOverload, args: tuple) -> int:
    """Multiply-adds per number of the operator's result; 1 for a norm, an activation or a sum."""
    name = operator.name()
    if "attention" in name:  # of q, k [B, heads, L', d] and v
        return 2 * args[1].shape[-2]  # L' for its share of q k^T, L' to sum the values
    if name.endswith(("convolution", "linear", "conv")):  # of x, W [out, in, ...]
        return args[1].shape[1:].numel()
    if name.endswith("mm"):  # of ..., W^T [in, out]
        return args[-1].shape[-2]
    return 1
