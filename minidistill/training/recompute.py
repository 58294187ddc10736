"""Activation checkpointing: what a block keeps for its backward pass, and what it computes again there."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch._ops import OpOverload
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# Where ``train.py --memory low`` draws the line, in multiply-adds. Of SD 1.5 it keeps the 3x3 convolutions, attention
# among many pixels and the widest linear layers; results/README.md#memory says what other lines would save and cost.
LOW_MEMORY = 1000


def multiply_adds(operator: OpOverload, args: tuple) -> int:
    """How many a single number of the operator's result takes; a norm, an activation or a sum counts as one."""
    name = operator.name()
    if "attention" in name:  # of q, k [B, heads, L', d] and v
        return 2 * args[1].shape[-2]  # for its share of the weights, and to sum the values by them
    if name.endswith(("convolution", "linear", "conv")):  # of x, W [out, in, ...]
        return args[1].shape[1:].numel()
    if name.endswith("mm"):  # of ..., W^T [in, out]
        return args[-1].shape[-2]
    return 1


def policy(least: float, _: SelectiveCheckpointContext, operator: OpOverload, *args, **kwargs) -> CheckpointPolicy:
    """Keep what costs ``least`` or more to compute again, recompute the rest.

    A kept number takes the same memory whatever it cost, so this saves the most for the fewest operations.
    """
    dear = multiply_adds(operator, args) >= least
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(least: float, block: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """``block(*args)``, of which only numbers that took ``least`` multiply-adds or more are kept."""
    keep = partial(create_selective_checkpoint_contexts, partial(policy, least))
    # Nothing in a block is random.
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=keep)
