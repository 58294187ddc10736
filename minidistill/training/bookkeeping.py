"""What happens around each update: progress bar, learning rate, loss log, signals, checkpoints, preview images."""

import math
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minidistill.distill import ENOUGH_EXAMPLES, Batch, error_and_limit, learning_rate
from minidistill.guidance import Interval
from minidistill.training.cuda_graph import set_learning_rate
from minidistill.training.distributed import Ranks
from minidistill.training.run_folder import save_checkpoint

WINDOW = 10  # updates whose losses are read together, because reading them makes a GPU wait


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list instead of dying from them; the loop checks it between updates."""
    caught: list[int] = []
    before = {n: signal.signal(n, lambda number, frame: caught.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Progress:
    """The bookkeeping of a training loop over ``for step in progress.steps()``."""

    out: Path  # the run's folder
    losses: list[float]  # of the updates done so far; the run continues after them
    unet: nn.Module  # teacher and student
    trained: Sequence[nn.Parameter]  # its parameters that learn
    optimizer: torch.optim.Optimizer
    settings: dict[str, str]  # saved in checkpoints
    ranks: Ranks
    _: KW_ONLY
    parts: int  # in which a batch is computed (--accumulate)
    total: int  # updates of the whole run
    peak: float  # learning rate
    save_every: int  # updates between checkpoints
    interval: Interval | None  # where the teacher guides
    preview: Callable[[int], None] | None  # called with the number of updates after each checkpoint
    before_saving: Callable[[], None]  # called before the student is checked and saved

    def __post_init__(self) -> None:
        self.recent: deque[Batch] = deque()  # the last ENOUGH_EXAMPLES or more, with their targets
        self.unread: list[Tensor] = []  # loss and gradient norm of the last updates, still on the device

    def steps(self) -> Iterator[int]:
        """The numbers of the updates still to do; sets the learning rate of each."""
        with stop_signals() as self.stop:
            done, quiet = len(self.losses), not self.ranks.first
            self.bar = tqdm(initial=done, total=self.total, desc="distilling", unit="step", disable=quiet)
            for step in range(done, self.total):
                rate = learning_rate(step, self.total, self.peak, warmup=max(self.total // 10, 1))
                set_learning_rate(self.optimizer, rate)
                yield step
            self.bar.close()
            if self.stop:  # during the last preview
                sys.exit("Stopped after the last update. Finish with the same command and --resume.")

    def remember(self, batch: Batch, target: Tensor) -> None:
        """Keep the last examples and targets, to check before a checkpoint that the student has not diverged."""
        self.recent.extend(replace(batch, target=target).split(self.parts))
        while sum(map(len, self.recent)) - len(self.recent[0]) >= ENOUGH_EXAMPLES:
            self.recent.popleft()

    def after_update(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Log the update; save, sample and stop when it is time to.

        Raises ValueError if the loss is not finite or the student has diverged, before a checkpoint is written.
        """
        self.bar.update()
        self.unread.append(torch.stack([loss, norm]))
        stopping = self.ranks.any(bool(self.stop))  # a signal may reach one process an update before the others
        saving = stopping or (step + 1) % self.save_every == 0 or step + 1 == self.total
        if len(self.unread) == WINDOW or saving:
            self.read_losses()
        if saving:
            self.before_saving()
        if self.ranks.first and saving:
            self.check_divergence(step + 1)
            save_checkpoint(self.out, self.trained, self.optimizer, self.losses, self.settings)
            if self.preview and not stopping:
                self.preview(step + 1)
        if stopping:
            self.bar.close()
            self.ranks.wait()  # until the checkpoint is written: torchrun ends all processes when one ends
            sys.exit(f"Saved after {step + 1} of {self.total} updates. Continue with the same command and --resume.")

    def read_losses(self) -> None:
        for loss, norm in torch.stack(self.unread).tolist():
            if not math.isfinite(loss + norm):
                raise ValueError(
                    f"At update {len(self.losses) + 1} the loss is {loss:g} and its gradient's norm {norm:g}: "
                    f"lower --lr (it is {self.peak:g}) or --guidance, in a new --out."
                )
            self.losses.append(loss)
        self.unread.clear()
        last = self.losses[-50:]
        self.bar.set_postfix(loss=f"{sum(last) / len(last):.5f}", refresh=False)

    def check_divergence(self, step: int) -> None:
        error, most = error_and_limit(self.unet, list(self.recent), self.interval)
        if not error <= most:  # NaN is not
            raise ValueError(
                f"After update {step} the student's squared error is {error:g}, and at most {most:g} is saved: "
                f"lower --lr (it is {self.peak:g}) or --guidance, in a new --out."
            )
