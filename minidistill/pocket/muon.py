"""Muon, an optimizer whose updates are orthogonal matrices (https://kellerjordan.github.io/posts/muon)."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

MOMENTUM = 0.95


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """[..., m, n] = U S V^T -> about U V^T, by Newton-Schulz iterations X <- a X + b (X X^T) X + c (X X^T)^2 X.

    They bring the singular values near 1 (0.7 to 1.2), which is near enough; those below a thousandth of the norm stay
    smaller.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    high = matrices.shape[-2] > matrices.shape[-1]
    X = matrices.mT if high else matrices
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = X @ X.mT
        X = a * X + (b * gram + c * gram @ gram) @ X
    return X.mT if high else X


class Muon(Optimizer):
    """For weights with two dimensions or more: a convolution's counts as a matrix [out, in * height * width].

    torch.optim.Muon takes no convolutions. The updates are as large as AdamW's, so one learning rate serves for both
    ("Muon is Scalable for LLM Training", arXiv 2502.16982, eq. 4).
    """

    def __init__(self, params: Iterable[Tensor], lr: float | Tensor, weight_decay: float):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, alike = group["lr"], defaultdict(list)  # one shape, one product: faster on a GPU
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["average"] = torch.zeros_like(p)
                average = self.state[p]["average"].lerp_(p.grad, 1 - MOMENTUM)
                momentum = p.grad.lerp(average, MOMENTUM).flatten(1)  # Nesterov's
                alike[momentum.shape].append((p, momentum))
            for shape, pairs in alike.items():
                size = 0.2 * max(shape) ** 0.5
                for (p, _), update in zip(pairs, orthogonalise(torch.stack([momentum for _, momentum in pairs]))):
                    p.mul_(1 - lr * group["weight_decay"]).sub_(update.reshape(p.shape) * (lr * size))
