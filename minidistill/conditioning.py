"""What the UNet is told beside the latents and the time step: the prompt's embeddings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Embeddings of B prompts. ``len(cond)`` is B; ``cond[:2]`` and ``cond[indices]`` select prompts.

    Attributes:
        tokens: one vector per token, [B, L, D].
        pooled: one vector per prompt, [B, P], for networks that take one (SDXL); otherwise None.
    """

    tokens: Tensor
    pooled: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        """Apply ``function`` to every tensor."""
        return Conditioning(function(self.tokens), None if self.pooled is None else function(self.pooled))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: slice | Tensor) -> "Conditioning":
        return self.map(lambda x: x[index])

    def expand(self, n: int) -> "Conditioning":
        """One prompt for a batch: B = 1 -> B = ``n``, without copying."""
        return self.map(lambda x: x.expand(n, *x.shape[1:]))

    def to(self, *args: Any, **kwargs: Any) -> "Conditioning":
        """Move or cast, with the arguments of ``Tensor.to``."""
        return self.map(lambda x: x.to(*args, **kwargs))


def cat(conds: list[Conditioning] | list[Tensor]) -> Conditioning | Tensor:
    """Join along the batch: conditionings, or bare token embeddings [B, L, D]."""
    if isinstance(conds[0], Tensor):
        return torch.cat(conds)
    pooled = [cond.pooled for cond in conds]
    return Conditioning(
        torch.cat([cond.tokens for cond in conds]), torch.cat(pooled) if pooled[0] is not None else None
    )
