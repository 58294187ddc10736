"""A whole update as one CUDA graph: the GPU does not wait for Python to launch thousands of operations one by one.

A graph is a recording of the GPU's work: it reads and writes the same addresses whenever it is replayed, and nothing in
it can depend on Python. So each batch is copied into the tensors that the recorded one had, the learning rate is a
tensor, and what is recorded never waits for the GPU.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from minidistill.distill import Batch
from minidistill.training.distributed import Ranks
from minidistill.training.sources import FromTrajectories

WARM_UP = 3  # calls before a recording: AdamW makes its state, and libraries choose algorithms, which takes memory

Results = tuple[Tensor, ...]


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def can_record(args: Namespace, ranks: Ranks, source: FromTrajectories, device: torch.device) -> bool:
    """Whether train.py replays its update: on one GPU, unless a flag asks for what a graph cannot do."""
    waits = source.asks_teacher and args.interval  # to see whether any t lies in the interval
    return on_gpu(device) and ranks.world == 1 and not (args.no_graph or args.compile or waits)


class UpdateGraph:
    """Calls ``update(batch)``; with ``recording`` it is recorded after ``WARM_UP`` calls, and replayed from then on.

    All batches must have the shapes of the first. Every call returns tensors of its own.
    """

    def __init__(self, update: Callable[[Batch], Results], recording: bool):
        self.update, self.recording = update, recording
        self.forget()

    def forget(self) -> None:
        """Free the recording and its memory; it is made again when it is needed.

        Call it before anything that needs the memory, or that moves the network.
        """
        self.calls = 0
        self.inputs: list[Tensor] = []
        self.replay: Callable[[], None] | None = None
        self.results: Results = ()

    def __call__(self, batch: Batch) -> Results:
        if not self.recording:
            return self.update(batch)
        self.calls += 1
        if self.calls <= WARM_UP:
            with side_stream():
                return self.update(batch)
        if self.replay is None:
            recorded = batch.map(torch.clone)
            self.inputs = tensors_of(recorded)
            self.replay, self.results = record(partial(self.update, recorded), "Add --no-graph --resume.")
        for own, new in zip(self.inputs, tensors_of(batch), strict=True):
            own.copy_(new)
        self.replay()
        return tuple(result.clone() for result in self.results)


def tensors_of(batch: Batch) -> list[Tensor]:
    tensors: list[Tensor] = []
    batch.map(lambda x: tensors.append(x) or x)
    return tensors


@cache
def warm_up_stream() -> torch.cuda.Stream:
    """One stream for all warm-ups, because each stream keeps its memory."""
    return torch.cuda.Stream()


@contextmanager
def side_stream() -> Iterator[None]:
    """Run the block on a stream of its own, as PyTorch asks for before a recording."""
    stream = warm_up_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def record(run: Callable[[], Any], advice: str) -> tuple[Callable[[], None], Any]:
    """Record ``run()`` without running it. Returns a function that replays it, and the tensors that get its results.

    Raises ValueError, with the ``advice``, if the GPU, or what it runs, cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            results = run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(f"No CUDA graph can be made of an update here: {error}\n{advice}") from error
    return graph.replay, results


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` as a recording, for a function that needs no input. It is called ``WARM_UP`` times first."""
    with side_stream():
        for _ in range(WARM_UP):
            run()
    replay, results = record(run, "Train on a CPU, or on another GPU.")

    def replayed() -> Any:
        replay()
        return results

    return replayed


def adamw(trained: Sequence[Tensor], peak: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW; on a GPU in one kernel, which reads the learning rate from a tensor."""
    device = trained[0].device
    gpu = dict(lr=torch.tensor(peak, device=device), fused=True, capturable=True)
    how = gpu if on_gpu(device) else dict(lr=peak)
    return torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=weight_decay, **how)


def load_moments(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Load an optimizer's saved moments, but not its settings: they follow from this run's flags and device."""
    optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)  # in place, where a recording reads it
        else:
            group["lr"] = rate
