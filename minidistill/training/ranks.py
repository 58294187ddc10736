"""Several processes that train one student, as torchrun starts them. A process alone joins no group.

Every rank holds all of W and the same LoRA, and takes its equal part of every batch. The loss over the whole batch is
the mean of the N ranks' losses L_r, and so is its gradient:

    dL/dw = 1/N sum_r dL_r/dw

Given the same gradient, Adam takes the same step on every rank, so that neither weights nor the optimizer's state ever
have to be sent. W is frozen and has no gradient: the LoRA's is all that is reduced, in one flat all_reduce an update.
(A second one, of a single number, asks whether to stop.) DistributedDataParallel would overlap the reduction with the
backward pass, which pays where it is gigabytes.
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


@dataclass(frozen=True)
class Ranks:
    """Which of ``world`` processes this is, and the ``device`` it computes on. Rank 0 alone writes and prints."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, batch: int) -> int:
        """How many of a batch each rank takes. Raises ValueError when the parts would not be equal."""
        if batch % self.world:
            raise ValueError(
                f"{self.world} processes cannot share a batch of {batch} equally: give a --batch that is a multiple "
                f"of {self.world}, and at least as many --trajectories or --images."
            )
        return batch // self.world

    def part(self, batch: Tensor) -> Tensor:
        """This rank's part of what was drawn for all: [B, ...] -> [B / world, ...]. Raises as ``share`` does."""
        return batch.split(self.share(len(batch)))[self.rank]

    def mean(self, trained: Sequence[nn.Parameter], *numbers: Tensor) -> list[Tensor]:
        """Make every gradient its mean over the ranks, and return the means of the ``numbers``, of shape []."""
        if self.world == 1:
            return list(numbers)
        gradients = [p.grad for p in trained]
        flat = self._sum(torch.cat([x.flatten() for x in (*gradients, *numbers)])).div_(self.world)
        *means, rest = flat.split([*(x.numel() for x in gradients), len(numbers)])
        for gradient, mean in zip(gradients, means):
            gradient.copy_(mean.view_as(gradient))
        return list(rest)

    def as_first(self, tensors: Sequence[Tensor]) -> None:
        """Fill the tensors with those of the first rank."""
        for x in tensors if self.world > 1 else ():
            dist.broadcast(x, 0)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank. All ranks get here before one goes on; no GPU is waited for."""
        return flag if self.world == 1 else self._sum(torch.tensor(float(flag))).item() > 0

    def wait(self) -> None:
        """Until all ranks have come here."""
        self.any(False)

    def _sum(self, x: Tensor) -> Tensor:
        """In place, over all ranks: each gets the very same bits."""
        try:
            dist.all_reduce(x)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConnectionError(
                "another process of this run has stopped, and says itself why. The same command with --resume goes on "
                f"from the last checkpoint. ({str(error).splitlines()[0]})"
            ) from error
        return x


ALONE = Ranks()


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started, and leave them at the end. Without torchrun there is only this one.

    On GPUs each takes that of its LOCAL_RANK; raises ValueError where there are fewer. What the ranks after the first
    print, or warn of, is what the first says too, and goes nowhere; their errors are shown.
    """
    world = int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1
    if world == 1:
        yield Ranks(device=device)
        return
    if device.startswith("cuda"):
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"There are {gpus} GPUs here, and more processes: give torchrun --nproc-per-node {gpus}.")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    # torchrun's store outlives a restart (github.com/pytorch/pytorch/issues/135712): under the same names a rank could
    # find the address of one that was killed, and wait for it.
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    # Ranks wait for the first while it draws pictures, and for each other's shards, as long as that takes. Nobody waits
    # for the dead: when one process dies, torchrun ends the others.
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(days=1))
    ranks = Ranks(rank, world, device)
    if ranks.first:
        yield ranks
    else:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield ranks
    dist.destroy_process_group()  # not after an error: NCCL would wait for the others, and they for this one
