"""Record the UNet's cross-attention weights while it runs: where each word of the prompt acts on the image."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from minidistill.unet import Attention, SpatialTransformer

Maps = dict[str, list[Tensor]]


@contextmanager
def attention_maps(unet: nn.Module) -> Iterator[Maps]:
    """Record the cross-attention of every call of ``unet`` (with or without LoRA) inside the block.

    Yields a dictionary that fills as the UNet runs: for each cross-attention layer by name, one map per call,
    [B, heads, L, H, W] float32. At every pixel the weights of the L tokens sum to 1. The UNet's output does not change.
    """
    maps: Maps = {}
    with ExitStack() as hooks:
        for name, transformer in unet.named_modules():
            if isinstance(transformer, SpatialTransformer):
                size: list[int] = []  # H and W of the current call
                hooks.enter_context(transformer.register_forward_pre_hook(partial(_store_size, size)))
                for i, block in enumerate(transformer.transformer_blocks):
                    calls = maps.setdefault(f"{name}.transformer_blocks.{i}.attn2", [])
                    hooks.enter_context(block.attn2.register_forward_hook(partial(_store_map, calls, size)))
        yield maps


def _store_size(size: list[int], transformer: SpatialTransformer, args: tuple[Tensor, Tensor]) -> None:
    size[:] = args[0].shape[2:]


@torch.no_grad()
def _store_map(calls: list[Tensor], size: list[int], layer: Attention, args: tuple[Tensor, Tensor], _: Tensor) -> None:
    """softmax(q k^T / sqrt(d)) ("Attention Is All You Need", eq. 1), which fused attention does not return."""
    x, context = args
    q, k = (x.float().unflatten(-1, (layer.heads, -1)).transpose(1, 2) for x in (layer.to_q(x), layer.to_k(context)))
    weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)  # [B, heads, H*W, L]
    calls.append(weights.transpose(2, 3).unflatten(3, size))
