"""Where each word of the prompt is looked at: the weights of the UNet's cross-attention, recorded as it runs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from minidistill.unet import Attention, SpatialTransformer

Maps = dict[str, list[Tensor]]


@contextmanager
def attention_maps(unet: nn.Module) -> Iterator[Maps]:
    """Record the cross-attention of every call of ``unet`` (with LoRA or without) in the block.

    Yields a dictionary that fills as the UNet runs: by the name of each cross-attention layer, the maps of each call,
    [B, heads, L, H, W] float32. At every pixel the L tokens of the prompt share a weight of 1. Nothing that the UNet
    computes changes.
    """
    maps: Maps = {}
    with ExitStack() as hooks:
        for name, transformer in unet.named_modules():
            if isinstance(transformer, SpatialTransformer):
                size: list[int] = []  # H and W of the call that is running
                hooks.enter_context(transformer.register_forward_pre_hook(partial(_note_size, size)))
                for i, block in enumerate(transformer.transformer_blocks):
                    kept = maps.setdefault(f"{name}.transformer_blocks.{i}.attn2", [])
                    hooks.enter_context(block.attn2.register_forward_hook(partial(_keep_maps, kept, size)))
        yield maps


def _note_size(size: list[int], transformer: SpatialTransformer, args: tuple[Tensor, Tensor]) -> None:
    size[:] = args[0].shape[2:]


@torch.no_grad()
def _keep_maps(kept: list[Tensor], size: list[int], layer: Attention, args: tuple[Tensor, Tensor], _: Tensor) -> None:
    """softmax(q k^T / sqrt(d)) ("Attention Is All You Need", eq. 1), which fused attention never writes down."""
    x, context = args
    q, k = (x.float().unflatten(-1, (layer.heads, -1)).transpose(1, 2) for x in (layer.to_q(x), layer.to_k(context)))
    weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)  # [B, heads, H*W, L]
    kept.append(weights.transpose(2, 3).unflatten(3, size))
