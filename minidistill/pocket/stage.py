"""What the training stages share: an average of the weights, and a state to resume from."""

import copy
from pathlib import Path

import torch
from torch import nn

from minidistill.files import written_whole


class Average:
    """An exponential moving average of a model's weights, warmed up so that the first ones do not linger."""

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, weight in zip(self.model.parameters(), model.parameters()):
            mean.lerp_(weight, 1 - decay)


def save_state(path: Path, step: int, model: nn.Module, average: Average, optimizer: torch.optim.Optimizer) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "average": average.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    with written_whole(path) as beside:
        torch.save(state, beside)


def resume(path: Path, model: nn.Module, average: Average, optimizer: torch.optim.Optimizer) -> int:
    """Continue from a saved state, where there is one; returns the number of steps done."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    average.model.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return state["step"]
