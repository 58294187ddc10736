"""Where the memory goes: sampling, full fine-tuning, plain and LoRA-enhanced distillation (the paper's Table 1).

  python -m minidistill.bench.memory                            the ledger of SD 1.5, SD 2.1-base and pocket
  python -m minidistill.bench.memory --size pocket --device cpu --measure

The ledger runs the real update on fake tensors, which have shapes but no memory, and follows every storage from the
operation that makes it to its end: to the byte, for any size, on any machine. What a kernel takes while it runs, such
as a convolution's workspace, it does not see; the measured peak does. What each way to save memory saves is told by
``python -m minidistill.bench.memory_steps``.
"""

import math
import sys
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from minidistill.bench import workloads as contestants
from minidistill.bench.speed import peak_bytes, printed_elsewhere
from minidistill.bench.timing import device_name, markdown_table
from minidistill.bench.workloads import GUIDANCE, Setup, Size, filled
from minidistill.config import SD21_BASE_UNET, UNetConfig
from minidistill.distill import student, teacher
from minidistill.formats.model_configs import write_json
from minidistill.guidance import guided_noise
from minidistill.training.settings import count, made_by, one_sentence, parse, setting
from minidistill.unet import UNet

SIZES = {"sd15": contestants.SIZES["sd15"], "sd21": replace(contestants.SIZES["sd15"], unet=SD21_BASE_UNET)}
SIZES |= {"pocket": contestants.SIZES["pocket"]}
DTYPES = ("float32", "bfloat16")
# Run before anything is measured, for what libraries set up once: as small as can be, with every kind of layer.
SMALLEST_UNET = UNetConfig(widths=(8, 16), layers=1, depth=(1, 0), heads=(1, 1), groups=8, sample_size=4)
SMALLEST = replace(contestants.SIZES["pocket"], unet=SMALLEST_UNET, batch=1)
LARGEST_MEASURED = 16e9  # bytes
# Left to itself, glibc keeps most of what is freed, and a process holds more than its tensors. With fixed thresholds
# it hands freed blocks of more than 64 kB back at once.
HAND_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
NOTES = """Saved is what a forward pass leaves for its backward pass; "to full" is beside the peak of full fine-tuning.
In bfloat16, frozen weights and activations are bfloat16, and the LoRA, its gradients and AdamW's state float32. Where
all weights are trained, they, their gradients and AdamW's state are bfloat16 too: plain PyTorch, no float32 copy.
"""


@dataclass
class Settings:
    size: list[str] = setting(None, "which networks (default: all)", type=str, nargs="+", choices=tuple(SIZES))
    device: str = setting("cuda", "whose memory, and where to measure; for the ledger it need not be there")
    dtype: list[str] = setting(DTYPES, "of W and activations", type=str, nargs="+", choices=DTYPES)
    rank: int = setting(16, "of the LoRA", type=count)
    keep_attention: bool = setting(False, "materialise the attention matrices, as was usual before fused attention")
    measure: bool = setting(False, "measure peaks too, each in a process of its own; rows above 16 GB are left out")
    out: Path = setting(Path("results/memory.json"), "where the figures go as JSON")
    row: str = setting(None, "only print one row's measured peak bytes (full/float32, ...): what --measure runs")


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations within the block made and that are still there.

    A storage counts once, however many tensors are views of it, until the last of them is gone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        made = [x.untyped_storage() for x in tree_leaves(result) if isinstance(x, Tensor) and not x.is_meta]
        for storage in made:
            if storage not in self.storages:
                self.storages.add(storage)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.forget, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def forget(self, size: int) -> None:
        self.bytes -= size


class Program:
    """What a row runs: one call of the guided teacher, or one update of what asks for gradients in ``networks``.

    Args:
        forward: gives the loss or, where nothing is trained, the guided noise.
        foreach: AdamW on all tensors at once, torch's default on CUDA; on CPU it takes them in turn.
        parts: gradients of so many calls of ``forward`` are summed in an update.
    """

    def __init__(self, networks: list[nn.Module], forward: Callable[[], Tensor], foreach: bool, parts: int = 1):
        self.forward, self.parts = forward, parts
        self.weights = [p for network in networks for p in network.parameters()]
        self.trained = [p for p in self.weights if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, foreach=foreach) if self.trained else None

    def start(self) -> None:
        """Have AdamW's state in place, as after a first update."""
        if self.optimizer:
            for p in self.trained:
                p.grad = torch.zeros_like(p)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def update(self, loss: Tensor) -> None:
        for _ in range(self.parts - 1):
            loss.backward()
            loss = self.forward()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()

    def run(self) -> None:
        if self.optimizer:
            self.optimizer.zero_grad()
            self.update(self.forward())
        else:
            self.forward()


class Inputs(NamedTuple):
    """Random ones, in the dtypes that train.py computes in."""

    z_t: Tensor  # [B, 4, h, w]
    t: Tensor  # [B]
    cond: Tensor  # [B, L, D]
    uncond: Tensor  # [B, L, D]
    target: Tensor  # [B, 4, h, w]: the noise that was added, or what the teacher predicted when it drew the picture


def inputs(setup: Setup) -> Inputs:
    batch = setup.size.batch
    t = torch.linspace(999, 1, batch, device=setup.device).long()
    return Inputs(setup.latents(batch).float(), t, *setup.contexts(batch), setup.latents(batch, seed=5).float())


# The rows: networks, and what is computed with them.
Networks = tuple[list[nn.Module], Callable[[], Tensor]]


def sampling(setup: Setup) -> Networks:
    unet, (*given, _) = setup.unet(), inputs(setup)
    return [unet], torch.no_grad()(partial(guided_noise, unet, *given, GUIDANCE))


def full(setup: Setup) -> Networks:
    """The paper's baseline: all weights learn from noised pictures, and there is no teacher."""
    unet, (z_t, t, cond, _, noise) = setup.unet().requires_grad_(), inputs(setup)
    return [unet], lambda: F.mse_loss(unet(z_t, t, cond), noise)


def plain(setup: Setup) -> Networks:
    """The student is a whole copy of its frozen teacher."""
    unet, (*given, _) = setup.unet(), inputs(setup)
    copy = filled(lambda: UNet(setup.size.unet), {name: x.clone() for name, x in setup.weights.items()})
    copy.requires_grad_()

    def loss() -> Tensor:
        with torch.no_grad():
            eps_hat = guided_noise(unet, *given, GUIDANCE)
        return F.mse_loss(copy(*given[:3]), eps_hat)

    return [unet, copy], loss


def lora(setup: Setup, teacher_in_loop: bool) -> Networks:
    unet, (*given, stored) = setup.lora_unet(), inputs(setup)

    def loss() -> Tensor:
        eps_hat = teacher(unet, *given, GUIDANCE) if teacher_in_loop else stored
        return F.mse_loss(student(unet, *given[:3]), eps_hat)

    return [unet], loss


class Row(NamedTuple):
    label: str
    make: Callable[[Setup], Networks]


ROWS = {
    "sampling": Row("sampling with guidance", sampling),
    "full": Row("full fine-tuning", full),
    "plain": Row("plain distillation", plain),
    "noised": Row("LoRA-enhanced distillation", partial(lora, teacher_in_loop=True)),
    "trajectories": Row("the same from stored trajectories", partial(lora, teacher_in_loop=False)),
}


class Case(NamedTuple):
    row: str
    dtype: str  # of the weights
    recompute: bool  # activation checkpointing of whole blocks

    def __str__(self) -> str:
        return f"{self.row}/{self.dtype}" + "/recompute" * self.recompute


CASES = {str(case): case for case in map(Case._make, product(ROWS, DTYPES, (False, True)))}
del CASES["sampling/float32/recompute"], CASES["sampling/bfloat16/recompute"]  # there is no backward pass


def program(case: Case, size: Size, device: torch.device, rank: int, foreach: bool) -> Program:
    setup = Setup(size, device, getattr(torch, case.dtype), rank, timed_steps=1)
    networks, forward = ROWS[case.row].make(setup)
    for network in networks:
        getattr(network, "base", network).recompute_below = math.inf if case.recompute else 0.0
    return Program(networks, forward, foreach)


def size_of(tensors: Iterable[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def ledger(case: Case, size: Size, rank: int = 16, foreach: bool = False) -> dict[str, int]:
    """Bytes, by what they are for, and the most there are at one time."""
    return counted(partial(program, case, size, torch.device("cpu"), rank, foreach))


def counted(make: Callable[[], Program]) -> dict[str, int]:
    """The ledger of any program."""
    with FakeTensorMode(), Live() as live:
        what = make()
        what.start()
        before = live.bytes
        result = what.forward()
        columns = {"weights": size_of(what.weights), "gradients": 0, "optimizer": 0}
        columns["saved"] = live.bytes - before - result.nbytes  # for the backward pass
        if what.optimizer:
            what.update(result)
            columns["gradients"] = size_of(p.grad for p in what.trained)
            columns["optimizer"] = size_of(x for state in what.optimizer.state.values() for x in state.values())
        return columns | {"peak": live.peak}


def measured(case: Case, size: Size, device: torch.device, rank: int) -> int:
    """Peak bytes in this process, beyond what it holds once its libraries are set up."""
    foreach = device.type == "cuda"
    program(case, SMALLEST, device, rank, foreach).run()
    return peak_bytes(lambda: program(case, size, device, rank, foreach).run, device)


def attention(keep: bool) -> AbstractContextManager:
    """Fused, without a matrix of attention weights; or in separate operations, which keep theirs for the backward."""
    return sdpa_kernel(SDPBackend.MATH) if keep else nullcontext()


def measured_elsewhere(args: Settings, size: str, case: str) -> int:
    flags = ["--row", case, "--size", size, "--device", args.device, "--rank", str(args.rank)]
    return printed_elsewhere(
        "minidistill.bench.memory", flags + ["--keep-attention"] * args.keep_attention, **HAND_BACK
    )


def markdown(size: str, rows: dict[str, dict]) -> str:
    """Megabytes; beside each peak how far it is from full fine-tuning's, which is how the paper states it."""
    columns = ("weights", "gradients", "optimizer", "saved", "peak")
    titles = [size, "dtype", "recompute", *columns, "to full", "measured", "to ledger"]
    lines = [titles, ["---"] * len(titles)]
    for row in rows.values():
        baseline = rows[str(Case("full", row["dtype"], row["recompute"]))]["peak"]
        line = [ROWS[row["row"]].label, row["dtype"], "yes" if row["recompute"] else "no"]
        line += [f"{row[column] / 1e6:,.0f}" for column in columns] + [f"{row['peak'] / baseline - 1:+.0%}"]
        found = row["measured"]
        lines.append(line + ([f"{found / 1e6:,.0f}", f"{found / row['peak'] - 1:+.0%}"] if found else ["", ""]))
    return markdown_table(lines)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(Settings, __doc__, argv)
    device, sizes = torch.device(args.device), args.size or list(SIZES)
    if (args.measure or args.row) and device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here to measure on: use --device cpu.")
    if args.row:
        if args.row not in CASES or len(sizes) > 1:
            raise ValueError(f"--row takes one --size and one of {', '.join(CASES)}.")
        with attention(args.keep_attention):
            print(measured(CASES[args.row], SIZES[sizes[0]], device, args.rank))
        return

    report = made_by("minidistill.bench.memory", argv) | {
        "device": device_name(device) if args.measure else device.type,
        "torch": torch.__version__,
        "rank": args.rank,
        "keep_attention": args.keep_attention,
        "sizes": {},
    }
    cases = {name: case for name, case in CASES.items() if case.dtype in args.dtype}
    for size in sizes:
        rows = {}
        for name, case in tqdm(cases.items(), size):
            with attention(args.keep_attention):
                row = ledger(case, SIZES[size], args.rank, foreach=device.type == "cuda")
            fits = args.measure and row["peak"] <= LARGEST_MEASURED
            row["measured"] = measured_elsewhere(args, size, name) if fits else None
            rows[name] = case._asdict() | row
        report["sizes"][size] = {"batch": SIZES[size].batch, "rows": rows}
        print(f"\n{markdown(size, rows)}\n\nMB, batch {SIZES[size].batch}.\n", flush=True)
        write_json(args.out, report)  # after each size, as all of them take a while
    print(NOTES)
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    with one_sentence("minidistill.bench.memory", "stopped."):
        main()
