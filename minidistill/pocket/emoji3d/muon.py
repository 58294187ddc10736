"""Muon, an optimizer whose updates are orthogonal matrices (https://kellerjordan.github.io/posts/muon)."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

MOMENTUM = 0.95


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """[m, n] = U S V^T -> about U V^T, by Newton-Schulz iterations X <- a X + b (X X^T) X + c (X X^T)^2 X.

    They bring the singular values near 1 (0.7 to 1.2), which is near enough; those below a thousandth of the norm stay
    smaller.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    X = X / X.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = X @ X.T
        X = a * X + (b * gram + c * gram @ gram) @ X
    return X.T if matrix.shape[0] > matrix.shape[1] else X


class Muon(Optimizer):
    """For weights with two dimensions or more: a convolution's counts as a matrix [out, in * height * width].

    torch.optim.Muon takes no convolutions. The updates are as large as AdamW's, so one learning rate serves for both
    ("Muon is Scalable for LLM Training", arXiv 2502.16982, eq. 4).
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["average"] = torch.zeros_like(p)
                average = self.state[p]["average"].lerp_(p.grad, 1 - MOMENTUM)
                update = orthogonalise(p.grad.lerp(average, MOMENTUM).flatten(1))  # Nesterov's momentum
                size = 0.2 * max(update.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * size)
