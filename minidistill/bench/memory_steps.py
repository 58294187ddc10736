"""What each way to save memory saves, one after the other; and what ``train.py`` takes on cards of four sizes.

  python -m minidistill.bench.memory_steps              by the ledger of memory.py, for one update
  python -m minidistill.bench.memory_steps --cards      the recipes of the README, by the same ledger

No card is needed, and none has been measured. Its libraries take a few hundred megabytes more, which are not in here.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

from minidistill.bench.loading import SD15_TEXT
from minidistill.bench.memory import SIZES, Live, Program, counted, lora, sampling
from minidistill.bench.timing import markdown_table
from minidistill.bench.workloads import Setup, Size, decode
from minidistill.blocks import Conv2d
from minidistill.formats.model_configs import write_json
from minidistill.training.recompute import LOW_MEMORY, multiply_adds
from minidistill.training.settings import count, made_by, one_sentence, parse, setting
from minidistill.vae import VAE

RANK = 16
CAPTIONS = 480  # as many as train.py's trajectories
SD21_TEXT = CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)
TEXTS = {"sd15": SD15_TEXT, "sd21": SD21_TEXT}


@dataclass
class Settings:
    size: list[str] = setting(None, "which networks (default: both)", type=str, nargs="+", choices=tuple(TEXTS))
    batch: list[int] = setting(None, "examples an update (default: 1 8)", type=count, nargs="+")
    cards: bool = setting(False, "only print the recipes for cards of four sizes, and what they take")
    out: Path = setting(Path("results/memory-steps.json"), "where the figures of the steps go as JSON")


class Step(NamedTuple):
    """A way to do an update with the teacher in the loop."""

    label: str
    dtype: str = "bfloat16"
    beside: bool = False  # text encoder, VAE and the captions' embeddings are on the device too
    usual: bool = False  # convolutions are as autograd has them
    recompute_below: float = 0.0
    accumulates: bool = False  # one example at a time


STEPS = (  # each with what the ones before it have
    Step("float32; text encoder, VAE and embeddings on the device", "float32", beside=True, usual=True),
    Step("W and activations in bfloat16", beside=True, usual=True),
    Step("text encoder, VAE and embeddings on the host", usual=True),
    Step("frozen convolutions keep W alone"),
    Step("`--memory low`", recompute_below=LOW_MEMORY),
    Step("`--accumulate`, one example at a time", recompute_below=LOW_MEMORY, accumulates=True),
)
INSTEAD = (
    Step("in place of low: norms, activations and sums recomputed", recompute_below=100),
    Step("in place of low: whole blocks recomputed", recompute_below=math.inf),
)


class Card(NamedTuple):
    """A recipe for a card of so many gigabytes."""

    gigabytes: int
    batch: int
    accumulate: int = 1
    memory: str = "normal"

    def __str__(self) -> str:
        flags = f"--dtype bfloat16 --batch {self.batch}"
        flags += f" --accumulate {self.accumulate}" if self.accumulate > 1 else ""
        return flags + (" --memory low" if self.memory == "low" else "")


CARDS = (Card(4, 8, 8, "low"), Card(8, 8, 1, "low"), Card(24, 16), Card(80, 64))


class Work(TorchDispatchMode):
    """Counts the multiply-adds of a forward pass, or of what a backward pass recomputes of one and its own matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        each = multiply_adds(operation, args)
        if each > 1:
            self.multiply_adds += each * (result if isinstance(result, Tensor) else result[0]).numel()
        return result


@cache
def work(size: Size, recompute_below: float) -> tuple[int, int]:
    """Of a student's call, and of its backward pass, convolutions' own gradients apart."""
    with FakeTensorMode():
        (unet,), forward = lora(setup(size, "bfloat16"), teacher_in_loop=False)
        unet.base.recompute_below = recompute_below
        with Work() as there:
            loss = forward()
        with Work() as back:
            loss.backward()
    return there.multiply_adds, back.multiply_adds


def recomputed(size: Size, recompute_below: float) -> float:
    """The multiply-adds done over again, as a share of the student's call."""
    there, back = work(size, recompute_below)
    return (back - work(size, 0.0)[1]) / there


def setup(size: Size, dtype: str) -> Setup:
    return Setup(size, torch.device("cpu"), getattr(torch, dtype), RANK, timed_steps=1)


def program(step: Step, size: Size, parts: int) -> Program:
    """An update of ``size.batch`` examples in ``parts``, of which a third takes no more than the second."""
    (unet,), forward = lora(setup(replace(size, batch=size.batch // parts), step.dtype), teacher_in_loop=True)
    unet.base.recompute_below = step.recompute_below
    for module in unet.modules():
        if step.usual and type(module) is Conv2d:
            module.__class__ = nn.Conv2d
    return Program([unet], forward, foreach=True, parts=min(parts, 2))


def beside(size: Size, text: CLIPTextConfig, dtype: torch.dtype) -> int:
    """Bytes of text encoder, VAE and embeddings [captions, L, D]."""
    with torch.device("meta"):
        networks = CLIPTextModel(text), VAE(size.vae)
    numbers = sum(p.numel() for network in networks for p in network.parameters())
    return (numbers + CAPTIONS * size.tokens * text.hidden_size) * dtype.itemsize


def peak(step: Step, size: Size, text: CLIPTextConfig) -> int:
    found = counted(partial(program, step, size, size.batch if step.accumulates else 1))["peak"]
    return found + (beside(size, text, getattr(torch, step.dtype)) if step.beside else 0)


def card(recipe: Card, size: Size) -> dict[str, int]:
    """Peak bytes of what train.py does in turn. The LoRA and AdamW's state are there all the time."""
    step = Step("", recompute_below=LOW_MEMORY if recipe.memory == "low" else 0.0)
    size = replace(size, batch=recipe.batch)
    learning = counted(partial(program, step, size, recipe.accumulate))
    drawing = counted(lambda: Program(*sampling(setup(size, step.dtype)), foreach=True))
    with FakeTensorMode(), Live() as decoding:
        decode(setup(size, step.dtype), "ours")()  # one picture
    there = learning["weights"] + learning["optimizer"]
    pictures = {"drawing": there + drawing["peak"] - drawing["weights"], "decoding": there + decoding.peak}
    return {"learning": learning["peak"]} | pictures


def markdown(lines: list[list[str]]) -> str:
    return markdown_table([lines[0], ["---"] + ["---:"] * (len(lines[0]) - 1), *lines[1:]])


def table(rows: list[dict], batches: list[int]) -> str:
    """Megabytes; beside each peak what the step saved."""
    lines = [["", *(title for batch in batches for title in (f"batch {batch}", "saves")), "recomputed"]]
    for before, row in zip([None, *rows], rows):
        line = [row["label"]]
        for batch in map(str, batches):
            line.append(f"{row['peak'][batch] / 1e6:,.0f}")
            line.append(
                f"{(before['peak'][batch] - row['peak'][batch]) / 1e6:,.0f}" if row["cumulative"] and before else ""
            )
        lines.append([*line, f"{row['recomputed']:.0%}"])
    return markdown(lines)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(Settings, __doc__, argv)
    sizes, batches = args.size or list(TEXTS), args.batch or [1, 8]
    if args.cards:
        lines = [
            ["card", "flags", *(f"{size}: {what}" for size in sizes for what in ("learning", "drawing", "decoding"))]
        ]
        for recipe in tqdm(CARDS, "cards", unit="card"):
            found = [peak for size in sizes for peak in card(recipe, SIZES[size]).values()]
            lines.append([f"{recipe.gigabytes} GB", f"`{recipe}`", *(f"{peak / 1e9:.2f}" for peak in found)])
        print(f"\n{markdown(lines)}\n\nGB, at 512x512, LoRA rank {RANK}.")
        return

    report = made_by("minidistill.bench.memory_steps", argv) | {"torch": torch.__version__, "rank": RANK, "sizes": {}}
    for name in sizes:
        rows = []
        for step in tqdm([*STEPS, *INSTEAD], name, unit="step"):
            peaks = {str(b): peak(step, replace(SIZES[name], batch=b), TEXTS[name]) for b in batches}
            again = recomputed(replace(SIZES[name], batch=1), step.recompute_below)
            rows.append(dict(label=step.label, cumulative=step in STEPS, peak=peaks, recomputed=again))
        report["sizes"][name] = rows
        print(f"\n{name}\n\n{table(rows, batches)}\n\nMB.\n", flush=True)
        write_json(args.out, report)
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    with one_sentence("minidistill.bench.memory_steps", "stopped."):
        main()
