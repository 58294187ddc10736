"""Muon beside the singular value decomposition, and beside PyTorch's for matrices."""

import pytest
import torch
from torch import nn

from minidistill.pocket.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(8, 8), (8, 40), (40, 8)])
def test_orthogonalise(shape: tuple[int, int]) -> None:
    """The singular vectors stay, and the singular values come near 1."""
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    S = U.T @ orthogonalise(matrix) @ Vh.T
    assert (S - torch.diag(S.diag())).abs().max() < 1e-9
    assert S.diag().min() > 0.6 and S.diag().max() < 1.3


def test_muon_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a matrix, as torch.optim.Muon in float64; a convolution is trained as its matrix is."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # PyTorch's iterates in bfloat16
    start = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    ours, convolution, theirs = (nn.Parameter(start.clone()) for _ in range(3))
    ours.data, theirs.data = ours.data.flatten(1), theirs.data.flatten(1)
    convolution.data = convolution.data.contiguous(memory_format=torch.channels_last)
    optimizers = [Muon([ours, convolution], 0.1, 0.01)]
    optimizers.append(torch.optim.Muon([theirs], 0.1, 0.01, adjust_lr_fn="match_rms_adamw"))
    for _ in range(3):
        gradient = torch.randn_like(start)
        ours.grad, convolution.grad, theirs.grad = gradient.flatten(1), gradient, gradient.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).abs().max() < 1e-12
    assert torch.equal(convolution.flatten(1), ours)
