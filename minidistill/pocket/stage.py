"""What the training stages share: their loop, an average of the weights, and a state to resume from."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minidistill.distill import learning_rate
from minidistill.formats.files import written_whole

Model = TypeVar("Model", bound=nn.Module)


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


def fit(
    model: Model,
    loss_of_batch: Callable[[], tuple[Tensor, dict[str, Tensor]]],
    state: Path,
    steps: int,
    lr: float,
    weight_decay: float,
    save_every: int = 200,
) -> Model:
    """Train with AdamW, and return the averaged weights. Resumes from ``state`` where that exists.

    ``loss_of_batch()`` draws a batch and gives the model's loss on it, and what is shown beside the bar.
    """
    model.to(memory_format=torch.channels_last).train().requires_grad_(True)
    average = Average(model, 0.998)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    start = resume(state, model, average, optimizer)
    progress = tqdm(range(start, steps), initial=start, total=steps, desc=state.stem, unit="step", mininterval=1)
    for step in progress:
        loss, shown = loss_of_batch()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup=min(200, steps // 10 + 1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model, step)
        if step % 20 == 0:
            progress.set_postfix({name: f"{value.item():.4g}" for name, value in shown.items()})
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_state(state, step + 1, model, average, optimizer)
    return average.model
