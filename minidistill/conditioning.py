"""What the UNet is told besides the latents and the time step: the prompt's embeddings, and sizes."""

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
        sizes: in pixels, [B, 6] int64, where there is a pooled vector: height and width of the original image, top and
            left of the crop from it, height and width of the image to make.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        """Apply ``function`` to every tensor."""
        return Conditioning(*(None if x is None else function(x) for x in (self.tokens, self.pooled, self.sizes)))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: slice | Tensor) -> "Conditioning":
        return self.map(lambda x: x[index])

    def expand(self, n: int) -> "Conditioning":
        """One prompt for a batch: B = 1 -> B = ``n``, without copying."""
        return self.map(lambda x: x.expand(n, *x.shape[1:]))

    def to(self, *args: Any, **kwargs: Any) -> "Conditioning":
        """Move or cast, with the arguments of ``Tensor.to``. Sizes are only moved: bfloat16 would round them."""

        def to(x: Tensor) -> Tensor:
            y = x.to(*args, **kwargs)
            return y if x.is_floating_point() else x.to(y.device)

        return self.map(to)


def cat(conds: list[Conditioning] | list[Tensor]) -> Conditioning | Tensor:
    """Join along the batch: conditionings, or bare token embeddings [B, L, D]."""
    if isinstance(conds[0], Tensor):
        return torch.cat(conds)
    columns = zip(*((cond.tokens, cond.pooled, cond.sizes) for cond in conds))
    return Conditioning(*(None if column[0] is None else torch.cat(column) for column in columns))
