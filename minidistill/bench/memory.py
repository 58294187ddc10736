"""Where the memory goes: sampling, full fine-tuning, plain and LoRA-enhanced distillation (the paper's Table 1).

  python -m minidistill.bench memory                                       a table for SD 1.5, SD 2.1-base and pocket
  python -m minidistill.bench memory --size pocket --device cpu --measure  measured peaks too
  python -m minidistill.bench memory --steps                               what each way to save memory saves
  python -m minidistill.bench memory --cards                               what fits on GPUs of several sizes

The tables are counted, not measured (see counting.py), and need no GPU. The libraries of a GPU take a few hundred
megabytes more.
"""

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from minidistill.bench.counting import Live, Work, count_bytes
from minidistill.bench.output import device_name, find_device, megabytes, new_report, save_report, save_so_far
from minidistill.bench.peak_memory import in_fresh_process, peak_bytes
from minidistill.bench.workloads import (
    GUIDANCE,
    SIZES,
    SMALLEST,
    Networks,
    Setup,
    Size,
    Update,
    attention,
    decode,
    lora_student,
)
from minidistill.data.trajectories import PROMPTS_AT_ONCE
from minidistill.evaluate.tables import markdown_table
from minidistill.guidance import guided_noise
from minidistill.text import TwoTextEncoders, encode_tokens
from minidistill.training.command_line import out_file, positive_int
from minidistill.training.recompute import LOW_MEMORY, low_memory
from minidistill.vae import VAE

DTYPES = ("float32", "bfloat16")
LARGEST_MEASURED = 16e9  # bytes
NOTES = """"saved" is what the forward pass keeps for the backward pass; "to full" compares peaks with full fine-tuning.
In bfloat16, frozen weights and activations are bfloat16, and the LoRA, its gradients and AdamW's state float32. Where
all weights are trained, they, their gradients and AdamW's state are bfloat16 too: plain PyTorch without a float32 copy.
"""


def add_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--measure", action="store_true", help="also measure peaks up to 16 GB, each in a new process")
    what.add_argument("--steps", action="store_true", help="count what each way to save memory saves (sd15, sd21)")
    what.add_argument("--cards", action="store_true", help="print settings for GPUs of several sizes, and what they "
        "take (sd15, sd21, sdxl)")  # fmt: skip
    add("--size", nargs="+", choices=SIZES, help="which networks (default: sd15 sd21 pocket)")
    add("--device", help="device whose memory to count; only --measure needs it (default: cuda)")
    add("--dtype", nargs="+", choices=DTYPES, help="dtypes of W and activations (default: both)")
    add("--batch", type=positive_int, nargs="+", metavar="N", help="sizes for --steps (default: 1 8)")
    add("--rank", type=positive_int, default=16, metavar="N", help="rank of the LoRA (default: %(default)s)")
    add("--keep-attention", action="store_true", help="keep attention matrices, as before fused attention was common")
    add("--out", type=out_file, metavar="FILE", help="JSON file (default: results/memory.json, or memory-steps.json)")


# The rows of the table: networks, and what sampling or each kind of training computes with them.


def sampling(setup: Setup) -> Networks:
    unet, (z_t, t, cond, uncond, _) = setup.unet(), setup.inputs()
    return [unet], torch.no_grad()(partial(guided_noise, unet, z_t, t, cond, uncond, GUIDANCE))


def full(setup: Setup) -> Networks:
    """The paper's baseline: all weights learn from noised images, without a teacher."""
    unet, (z_t, t, cond, _, noise) = setup.unet().requires_grad_(), setup.inputs()
    return [unet], lambda: F.mse_loss(unet(z_t, t, cond), noise)


def plain(setup: Setup) -> Networks:
    """The student is a whole copy of its frozen teacher."""
    unet, (z_t, t, cond, uncond, _) = setup.unet(), setup.inputs()
    copy = setup.unet(copy=True).requires_grad_()

    def loss() -> Tensor:
        with torch.no_grad():
            eps_hat = guided_noise(unet, z_t, t, cond, uncond, GUIDANCE)
        return F.mse_loss(copy(z_t, t, cond), eps_hat)

    return [unet, copy], loss


class Row(NamedTuple):
    label: str
    make: Callable[[Setup], Networks]


ROWS = {
    "sampling": Row("sampling with guidance", sampling),
    "full": Row("full fine-tuning", full),
    "plain": Row("plain distillation", plain),
    "noised": Row("LoRA-enhanced distillation", partial(lora_student, teacher_in_loop=True)),
    "trajectories": Row("the same from stored trajectories", partial(lora_student, teacher_in_loop=False)),
}


class Case(NamedTuple):
    """A row in one dtype, and its activation checkpointing."""

    row: str
    dtype: str = "bfloat16"  # of W and activations
    below: float = 0  # recompute what took fewer multiply-adds; math.inf: whole blocks
    parts: int = 1  # into which the batch is split, one after the other (`--accumulate`)
    float8: bool = False  # W in 8 bits (`--weights float8`)

    def update(self, size: Size, device: torch.device, rank: int, foreach: bool) -> Update:
        part = replace(size, batch=size.batch // self.parts)
        setup = Setup(part, device, getattr(torch, self.dtype), rank, float8=self.float8)
        update = Update(*ROWS[self.row].make(setup), self.below)
        if update.trained:  # not train.py's fused one: the ledger counts the plain one
            update.optimizer = torch.optim.AdamW(update.trained, foreach=foreach)
        return update


CASES = {
    f"{row}/{dtype}" + ("/recompute" if below else ""): Case(row, dtype, below)
    for row, dtype, below in product(ROWS, DTYPES, (0, math.inf))
    if row != "sampling" or not below  # sampling has no backward pass
}


def ledger(case: Case, size: Size, rank: int = 16, foreach: bool = False) -> dict[str, int]:
    """Bytes by purpose, and the peak. A third part of a batch takes no more than the second."""
    return count_bytes(partial(case.update, size, torch.device("cpu"), rank, foreach), min(case.parts, 2))


# Measured peaks, each in a fresh process. By default glibc keeps most freed memory, and a process holds more than its
# tensors. With fixed thresholds it returns freed blocks above 64 kB at once.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measured(case: Case, size: Size, device: torch.device, rank: int, keep_attention: bool = False) -> int:
    """Peak bytes of this process, beyond what it holds once its libraries are set up."""
    foreach = device.type == "cuda"
    with attention(fused=not keep_attention):
        case.update(SMALLEST, device, rank, foreach)()
        return peak_bytes(lambda: case.update(size, device, rank, foreach), device)


def markdown(size: str, rows: dict[str, dict]) -> str:
    """Megabytes; the peak is compared with full fine-tuning's, as in the paper."""
    columns = ("weights", "gradients", "optimizer", "saved", "peak")
    lines = [[size, "dtype", "recompute", *columns, "to full", "measured", "to ledger"]]
    for key, row in rows.items():
        baseline = rows[key.replace(row["row"], "full")]["peak"]
        line = [ROWS[row["row"]].label, row["dtype"], "yes" if row["recompute"] else "no"]
        line += [*(megabytes(row[column]) for column in columns), f"{row['peak'] / baseline - 1:+.0%}"]
        peak = row["measured"]
        lines.append([*line, megabytes(peak), f"{peak / row['peak'] - 1:+.0%}"] if peak else [*line, "", ""])
    return markdown_table(lines, text_columns=3)


def run_ledger(args: Namespace) -> None:
    device = find_device(args.device or "cuda", needed=args.measure)
    machine = device_name(device) if args.measure else device.type
    report = new_report(args, machine, rank=args.rank, keep_attention=args.keep_attention, sizes={})
    out = args.out or Path("results/memory.json")
    cases = {key: case for key, case in CASES.items() if case.dtype in (args.dtype or DTYPES)}
    for name in args.size or ("sd15", "sd21", "pocket"):
        size, rows = SIZES[name], {}
        report["sizes"][name] = {"batch": size.batch, "rows": rows}
        for key, case in tqdm(cases.items(), name):
            with attention(fused=not args.keep_attention):
                row = ledger(case, size, args.rank, foreach=device.type == "cuda")
            row["measured"] = None
            if args.measure and row["peak"] <= LARGEST_MEASURED:
                how = (case, size, device, args.rank, args.keep_attention)
                row["measured"] = in_fresh_process(measured, *how, **RETURN_FREED_MEMORY)
            rows[key] = {"row": case.row, "dtype": case.dtype, "recompute": case.below > 0} | row
            save_so_far(report, out)
        print(f"\n{markdown(name, rows)}\n\nMB, batch {size.batch}.\n", flush=True)
    save_report(report, out)
    print(NOTES)


# --steps: what each way to save memory saves, in an update with the teacher in the loop.


class Step(NamedTuple):
    label: str
    case: Case
    all_on_device: bool = False  # text encoder, VAE and the captions' embeddings are on the device too
    one_by_one: bool = False  # gradients are accumulated, one example at a time


LOW = Case("noised", below=LOW_MEMORY)
STEPS = (  # each includes the ones before it
    Step("float32; text encoder, VAE and embeddings on the device", Case("noised", "float32"), all_on_device=True),
    Step("W and activations in bfloat16", Case("noised"), all_on_device=True),
    Step("text encoder, VAE and embeddings on the host", Case("noised")),
    Step("`--memory low`", LOW),
    Step("`--accumulate`, one example at a time", LOW, one_by_one=True),
)
INSTEAD = (
    Step("instead of low: recompute norms, activations and sums", Case("noised", below=100)),
    Step("instead of low: recompute whole blocks", Case("noised", below=math.inf)),
)
CAPTIONS = 480  # train.py's default number of images with the teacher in the loop


def step_peak(step: Step, size: Size, rank: int = 16) -> int:
    case = step.case._replace(parts=size.batch if step.one_by_one else 1)
    peak = ledger(case, size, rank, foreach=True)["peak"]
    if not step.all_on_device:
        return peak
    with torch.device("meta"):
        networks = CLIPTextModel(size.text), VAE(size.vae)
    others = sum(p.numel() for network in networks for p in network.parameters())
    others += CAPTIONS * size.tokens * size.text.hidden_size  # embeddings [captions, L, D]
    return peak + others * getattr(torch, case.dtype).itemsize


@cache
def backward_work(size: Size, below: float) -> float:
    """Multiply-adds of the backward pass, those of the student's call being 1."""
    with FakeTensorMode():
        update = Case("trajectories", below=below).update(size, torch.device("cpu"), rank=16, foreach=False)
        with Work() as forward:
            loss = update.loss()
        with Work() as backward:
            loss.backward()
    return backward.multiply_adds / forward.multiply_adds


def recomputed(size: Size, below: float) -> float:
    """The share of the student's call that the backward pass computes again."""
    return backward_work(size, below) - backward_work(size, 0)


def steps_markdown(rows: list[dict], batches: list[int]) -> str:
    """Megabytes; after each peak what the step saved."""
    lines = [["", *(title for batch in batches for title in (f"batch {batch}", "saves")), "recomputed"]]
    for before, row in zip([None, *rows], rows):
        line = [row["label"]]
        for batch in map(str, batches):
            saved = megabytes(before["peak"][batch] - row["peak"][batch]) if before and row["cumulative"] else ""
            line += [megabytes(row["peak"][batch]), saved]
        lines.append([*line, f"{row['recomputed']:.0%}"])
    return markdown_table(lines)


def chosen_sizes(args: Namespace, flag: str, *known: str) -> list[str]:
    """Those of --size, or all that the flag is for."""
    if others := [name for name in args.size or () if name not in known]:
        raise ValueError(f"{flag} is for {', '.join(known)}, not for {others[0]}.")
    return args.size or list(known)


def run_steps(args: Namespace) -> None:
    report, batches = new_report(args, "cuda", rank=args.rank, sizes={}), args.batch or [1, 8]
    for name in chosen_sizes(args, "--steps", "sd15", "sd21"):
        rows = []
        for step in tqdm([*STEPS, *INSTEAD], name, unit="step"):
            peaks = {str(batch): step_peak(step, replace(SIZES[name], batch=batch), args.rank) for batch in batches}
            again = recomputed(replace(SIZES[name], batch=1), step.case.below)
            rows.append({"label": step.label, "cumulative": step in STEPS, "peak": peaks, "recomputed": again})
        report["sizes"][name] = rows
        print(f"\n{name}\n\n{steps_markdown(rows, batches)}\n\nMB.\n", flush=True)
        save_report(report, args.out or Path("results/memory-steps.json"))


# --cards: settings of train.py for GPUs of several sizes.


class Card(NamedTuple):
    gigabytes: int
    batch: int
    accumulate: int = 1
    memory: str = "normal"
    float8: bool = False

    def __str__(self) -> str:
        flags = f"--dtype bfloat16 --batch {self.batch}"
        flags += f" --accumulate {self.accumulate}" if self.accumulate > 1 else ""
        flags += " --memory low" if self.memory == "low" else ""
        return flags + (" --weights float8" if self.float8 else "")


CARDS = (Card(4, 8, 8, "low"), Card(8, 8, 1, "low"), Card(24, 16), Card(80, 64))  # at 512x512
XL_CARDS = (  # SDXL, at 1024x1024
    Card(6, 4, 4, "low", float8=True),
    Card(8, 4, 4, "low"),
    Card(12, 4, 1, "low"),
    Card(24, 4, 2),
)


def card_peaks(card: Card, size: Size, rank: int = 16) -> dict[str, int]:
    """Peak bytes of each thing train.py does. The LoRA and AdamW's state are in memory all the time."""
    size = replace(size, batch=card.batch)
    below = low_memory(size.unet) if card.memory == "low" else 0
    case = Case("noised", below=below, parts=card.accumulate, float8=card.float8)
    training, sample = (ledger(what, size, rank, True) for what in (case, Case("sampling", float8=card.float8)))
    with FakeTensorMode(), Live() as decoding:
        decode(Setup(size, torch.device("cpu"), torch.bfloat16, rank), "ours")()  # one image
    with FakeTensorMode(allow_non_fake_inputs=True), Live() as encoding:
        encoder = CLIPTextModel._from_config(size.text, dtype=torch.bfloat16)
        if size.text_2:
            second = CLIPTextModelWithProjection._from_config(size.text_2, dtype=torch.bfloat16)
            encoder = TwoTextEncoders(encoder, second)
        encode_tokens(encoder, torch.zeros(PROMPTS_AT_ONCE, size.tokens, dtype=torch.int64))
    resident = training["weights"] + training["optimizer"]
    return {
        "training": training["peak"],
        "sampling": resident + sample["peak"] - sample["weights"],
        "decoding": resident + decoding.peak,
        "prompts": resident + encoding.peak,
    }


def run_cards(args: Namespace) -> None:
    names = chosen_sizes(args, "--cards", "sd15", "sd21", "sdxl")
    print_cards(CARDS, [name for name in names if name != "sdxl"], args.rank, side=512)
    print_cards(XL_CARDS, [name for name in names if name == "sdxl"], args.rank, side=1024)


def print_cards(cards: Sequence[Card], names: list[str], rank: int, side: int) -> None:
    if not names:
        return
    lines = []
    for card in tqdm(cards, f"{side}x{side}", unit="card"):
        peaks = {f"{name}: {what}": x for name in names for what, x in card_peaks(card, SIZES[name], rank).items()}
        lines.append([f"{card.gigabytes} GB", f"`{card}`", *(f"{peak / 1e9:.2f}" for peak in peaks.values())])
    titles = ["GPU", "flags", *peaks]  # the same for every card
    print(f"\n{markdown_table([titles, *lines], text_columns=2)}\n\nGB, at {side}x{side}, LoRA rank {rank}.")


def run(args: Namespace) -> None:
    if args.steps:
        mode, unused = run_steps, ("device", "dtype", "keep_attention")
    elif args.cards:
        mode, unused = run_cards, ("device", "dtype", "keep_attention", "batch", "out")
    else:
        mode, unused = run_ledger, ("batch",)
    for name in unused:
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} changes nothing in this table: leave it out.")
    mode(args)
