"""Several processes that train one student, started by torchrun. A single process joins no group.

Every rank holds all of W and the same LoRA, and takes an equal share of every batch. The loss over the whole batch is
the mean of the N ranks' losses L_r, and so is its gradient:

    dL/dw = 1/N sum_r dL_r/dw

Given the same gradient, Adam takes the same step on every rank, so weights and optimizer state never have to be sent.
W is frozen and has no gradient: only the LoRA's is reduced, in one flat all_reduce per update. (A second one, of a
single number, asks whether to stop.) DistributedDataParallel would overlap the reduction with the backward pass, which
pays off for gigabytes.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minidistill.distill import Batch


@dataclass(frozen=True)
class Ranks:
    """This is process ``rank`` of ``world``, and it computes on ``device``. Only rank 0 prints.

    It writes all files except shards, which every rank writes.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, batch: int) -> int:
        """The number of examples per rank. Raises ValueError if the batch cannot be shared equally."""
        if batch % self.world:
            raise ValueError(
                f"{self.world} processes cannot share a batch of {batch} equally: make --batch a multiple of "
                f"{self.world}, and give at least as many --trajectories or --images."
            )
        return batch // self.world

    def part(self, batch: Batch) -> Batch:
        """This rank's share of a batch. Raises as ``share`` does."""
        size = self.share(len(batch))
        return batch[self.rank * size : (self.rank + 1) * size]

    def average_gradients(self, trained: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Replace every gradient by its mean over the ranks; returns the mean of their losses, of shape []."""
        if self.world == 1:
            return loss
        parts = [*(p.grad for p in trained), loss]
        flat = self._sum(torch.cat([x.flatten() for x in parts])).div_(self.world)
        *means, mean_loss = flat.split([x.numel() for x in parts])
        for p, mean in zip(trained, means):
            p.grad.copy_(mean.view_as(p))
        return mean_loss.view(())

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors with those of the first rank."""
        if self.world > 1:
            for x in tensors:
                dist.broadcast(x, 0)

    def any(self, flag: bool) -> bool:
        """True if the flag is set on any rank. All ranks meet here; no GPU is waited for."""
        return flag if self.world == 1 else self._sum(torch.tensor(float(flag))).item() > 0

    def wait(self) -> None:
        """Wait until all ranks have come here."""
        self.any(False)

    def _sum(self, x: Tensor) -> Tensor:
        """Sum in place over all ranks; each gets the same bits."""
        try:
            dist.all_reduce(x)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConnectionError(
                "another process of this run has stopped; its own message says why. The same command with --resume "
                f"continues from the last checkpoint. ({str(error).splitlines()[0]})"
            ) from error
        return x


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started, and leave them at the end. Without torchrun there is only this one.

    Each process takes the GPU of its LOCAL_RANK; raises ValueError if there are fewer GPUs. What ranks other than the
    first print or warn about is dropped, because the first says it too; their errors are shown.
    """
    world = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1  # torchrun sets both
    if world == 1:
        yield Ranks(device=device)
        return
    if device.startswith("cuda"):
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"There are more processes than GPUs ({gpus}): start torchrun --nproc-per-node {gpus}.")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    # torchrun's store outlives a restart (github.com/pytorch/pytorch/issues/135712): under the same names a rank could
    # find the address of a killed process, and wait for it.
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    # Ranks wait for the first while it samples images, and for each other's shards, however long that takes. Nobody
    # waits for the dead: when one process dies, torchrun ends the others.
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(days=1))
    ranks = Ranks(rank, world, device)
    if ranks.first:
        yield ranks
    else:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield ranks
    dist.destroy_process_group()  # not after an error: NCCL would wait for the others, and they for this process
