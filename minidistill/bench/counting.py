"""Counts memory and arithmetic, operation by operation, of code that runs on fake tensors: shapes without numbers.

So it is exact to the byte, for networks of any size, on any machine. It does not see what a GPU kernel allocates
while it runs, such as a convolution's workspace; a measured peak does.
"""

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidistill.bench.workloads import Update
from minidistill.formats.float8 import Float8Weight
from minidistill.training.recompute import multiply_adds


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that were made inside the block and still exist.

    A storage counts once, however many tensors are views of it, until the last of them is gone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if Float8Weight in types:
            return NotImplemented  # it computes with its parts, and these operations are counted
        result = operation(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and not x.is_meta and (storage := x.untyped_storage()) not in self.storages:
                self.storages.add(storage)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.forget, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def forget(self, size: int) -> None:
        self.bytes -= size


class Work(TorchDispatchMode):
    """Counts the multiply-adds inside the block. The gradients of convolutions are not included."""

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        each = multiply_adds(operation, args)
        if each > 1:
            self.multiply_adds += each * (result if isinstance(result, Tensor) else result[0]).numel()
        return result


def size_of(tensors: Iterable[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def count_bytes(make: Callable[[], Update], parts: int = 1) -> dict[str, int]:
    """Bytes by purpose, and the peak, of an update that sums the gradients of ``parts`` calls of its loss."""
    with FakeTensorMode(), Live() as live:
        update = make()
        if update.optimizer:  # put AdamW's state in place, as after a first update
            for p in update.trained:
                p.grad = torch.zeros_like(p)
            update.optimizer.step()
            update.optimizer.zero_grad()
        before = live.bytes
        loss = update.loss()
        columns = {"weights": size_of(update.weights), "gradients": 0, "optimizer": 0}
        columns["saved"] = live.bytes - before - loss.nbytes  # for the backward pass
        if update.optimizer:
            for _ in range(parts - 1):
                loss.backward()
                loss = update.loss()
            update.step(loss)
            columns["gradients"] = size_of(p.grad for p in update.trained)
            columns["optimizer"] = size_of(x for state in update.optimizer.state.values() for x in state.values())
        return columns | {"peak": live.peak}
