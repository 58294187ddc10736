"""Shared by the training stages: the training loop, an average of the weights, and states to resume from."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minidistill.distill import learning_rate
from minidistill.formats.files import atomic_write

Model = TypeVar("Model", bound=nn.Module)


def update(
    loss: Tensor, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], max_norm: float = 1.0
) -> None:
    """Take one step down the gradient of ``loss``, clipped to ``max_norm``."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class Average:
    """An exponential moving average of a model's weights, with a lower decay at first to forget the initial ones."""

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
    with atomic_write(path) as temporary:
        torch.save(state, temporary)


def resume(path: Path, model: nn.Module, average: Average, optimizer: torch.optim.Optimizer) -> int:
    """Load a saved state if there is one; returns the number of finished steps."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    average.model.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return state["step"]


def fit(
    model: Model,
    loss_of_batch: Callable[[], tuple[Tensor, dict[str, Tensor]]],
    state: Path,
    steps: int,
    lr: float,
    weight_decay: float,
    save_every: int = 200,
) -> Model:
    """Train with AdamW and return the averaged weights. Resumes from ``state`` if it exists.

    ``loss_of_batch()`` returns the model's loss on a new batch, and the values to show beside the progress bar.
    """
    model.to(memory_format=torch.channels_last).train().requires_grad_(True)
    average = Average(model, 0.998)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    start = resume(state, model, average, optimizer)
    progress = tqdm(range(start, steps), initial=start, total=steps, desc=state.stem, unit="step", mininterval=1)
    for step in progress:
        loss, values = loss_of_batch()
        set_learning_rate(optimizer, learning_rate(step, steps, lr, warmup=min(200, steps // 10 + 1)))
        update(loss, optimizer, model.parameters())
        average.update(model, step)
        if step % 20 == 0:
            progress.set_postfix({name: f"{value.item():.4g}" for name, value in values.items()})
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_state(state, step + 1, model, average, optimizer)
    return average.model
