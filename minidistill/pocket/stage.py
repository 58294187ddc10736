"""The training loop of VAE and UNet, which averages the weights and resumes where it was stopped."""

import copy
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minidistill.distill import learning_rate
from minidistill.formats.files import atomic_write
from minidistill.pocket.muon import Muon
from minidistill.training.cuda_graph import adamw, graphed, load_moments, on_gpu, set_learning_rate

Model = TypeVar("Model", bound=nn.Module)

EMA_DECAY = 0.998


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    """An exponential moving average with a lower decay at first, to forget the initial weights."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def fit(
    model: Model,
    new_batch: Callable[[], tuple[Tensor, ...]],
    loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    state: Path,
    steps: int,
    lr: float,
    weight_decay: float,
    compiled: bool = False,
    bfloat16: bool = False,
    by_muon: Sequence[nn.Parameter] = (),
    save_every: int = 500,
) -> Model:
    """Train the parameters that require a gradient, those in ``by_muon`` by Muon and the others by AdamW.

    Returns the averaged weights. Resumes from the file ``state`` if it exists.

    ``loss_of(model, *new_batch())`` is the loss, and the values to show beside the progress bar. With ``bfloat16`` it
    is computed by autocast. On a GPU the whole update, with ``new_batch``, is recorded in a CUDA graph; a resumed run
    differs a little there, because it warms up again.
    """
    device = next(model.parameters()).device
    model.to(memory_format=torch.channels_last).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    average = copy.deepcopy(model).eval().requires_grad_(False)
    matrices = set(by_muon)
    others = [p for p in trained if p not in matrices]
    optimizers: list[torch.optim.Optimizer] = [adamw(others, lr, weight_decay)]
    if by_muon:
        optimizers.append(Muon(by_muon, torch.tensor(lr, device=device) if on_gpu(device) else lr, weight_decay))
    parts = {"model": model, "average": average} | {type(one).__name__: one for one in optimizers}
    start = 0
    if state.exists():
        saved = torch.load(state, weights_only=True, map_location="cpu")
        start = saved["step"]
        torch.set_rng_state(saved["rng"])
        if on_gpu(device):
            torch.cuda.set_rng_state(saved["cuda_rng"], device)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        for optimizer in optimizers:
            load_moments(optimizer, saved[type(optimizer).__name__])
    loss_of = torch.compile(loss_of) if compiled else loss_of

    def update() -> dict[str, Tensor]:
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss, values = loss_of(model, *new_batch())
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        return {name: value.detach() for name, value in values.items()}

    def set_rate(rate: float) -> None:
        for optimizer in optimizers:
            set_learning_rate(optimizer, rate)

    if on_gpu(device) and start < steps:
        set_rate(0.0)  # while it warms up
        update = graphed(update)

    progress = tqdm(range(start, steps), initial=start, total=steps, desc=state.stem, unit="step", mininterval=1)
    for step in progress:
        set_rate(learning_rate(step, steps, lr, warmup=min(200, steps // 10 + 1)))
        values = update()
        update_average(average, model, step)
        if step % 20 == 0:
            progress.set_postfix({name: f"{value.item():.4g}" for name, value in values.items()})
        if (step + 1) % save_every == 0 or step + 1 == steps:
            with atomic_write(state) as temporary:
                now = {name: part.state_dict() for name, part in parts.items()}
                rng = {"rng": torch.get_rng_state()}
                if on_gpu(device):
                    rng["cuda_rng"] = torch.cuda.get_rng_state(device)
                buffer = io.BytesIO()
                torch.save(now | rng | {"step": step + 1}, buffer)
                temporary.write_bytes(buffer.getvalue())  # here a full disk is an OSError
    return average
