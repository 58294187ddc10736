"""Measure what was learned: how many ranks the change of each layer has, in a full student and in a LoRA.

  python -m minidistill.evaluate spectrum runs/full runs/NAME

The change of a layer is dW = W_student - W_teacher, as a matrix [out, in k k]; for a LoRA it is (alpha / rank) B A.
The first r of its singular values sigma_i hold the share sum_{i<=r} sigma_i^2 / sum sigma_i^2 of its squared norm: the
most that a LoRA of rank r could represent. The cosine between two changes says how alike they are.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minidistill.evaluate.figures import figure_file
from minidistill.evaluate.students import full_student, one_teacher, read_student
from minidistill.evaluate.tables import markdown_table
from minidistill.formats.files import write_json
from minidistill.formats.load_model import load
from minidistill.formats.lora_formats import read_lora
from minidistill.formats.lora_io import add_student
from minidistill.lora import lora_layers
from minidistill.training.command_line import add_weight_flags, out_folder

POSITIONAL = "FULL_RUN RUN_OR_LORA "
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
QUANTILES = torch.tensor([0.1, 0.5, 0.9])  # the middle 80% of the layers, and the median


def add_flags(parser: ArgumentParser) -> None:
    flag = parser.add_argument
    flag("full", type=Path, metavar="FULL_RUN", help="a run of train.py --method full")
    flag("lora", type=Path, metavar="RUN_OR_LORA", help="a run with a LoRA, or a LoRA file")
    flag("--out", type=out_folder, default="runs/spectrum", metavar="FOLDER", help="results (default: %(default)s)")
    add_weight_flags(parser)


def run(args: Namespace) -> None:
    if full_student(args.full) is None:
        raise ValueError(f"{args.full} is no run of --method full: it holds no student/ and no student.safetensors.")
    full, lora = (read_student(run, 1, args) for run in (args.full, args.lora))
    one_teacher({str(student.file): student for student in (full, lora)}, None)  # raises if they differ
    sd = load(args.model, variant=args.variant, ema=args.ema)
    full.install(sd)  # raises for a student of another model
    student, sd.unet = sd.unet.student.state_dict(), sd.unet.base
    add_student(sd, read_lora(args.lora))
    rows = []
    for name, layer in tqdm(lora_layers(sd.unet).items(), desc="layers", unit="layer"):
        rows.append(dict(layer=name, **compare(student[f"{name}.weight"] - layer.weight, layer.delta())))

    write_json(args.out / "spectrum.json", args.provenance | {"rows": rows})
    plot(rows, args.out / "spectrum.png")
    print(f"{table(rows)}\n\nFigure and JSON: {args.out}")


@torch.no_grad()
def compare(full: Tensor, lora: Tensor) -> dict:
    """The norms of one layer's two changes [out, in, ...], the share within each of RANKS, and their cosine."""
    full, lora = full.flatten(1).double(), lora.flatten(1).double()
    return {
        "norm": {"full": full.norm().item(), "lora": lora.norm().item()},
        "held": {"full": at_ranks(share_by_rank(full)), "lora": at_ranks(share_by_rank(lora))},
        "cosine": F.cosine_similarity(full.flatten(), lora.flatten(), dim=0).item(),
    }


def share_by_rank(change: Tensor) -> Tensor:
    """The share of a matrix's squared norm within its first 1, 2, ... singular values; 0 for a matrix of zeros."""
    squares = torch.linalg.svdvals(change).square()
    return squares.cumsum(0) / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)


def at_ranks(shares: Tensor) -> list[float]:
    return [shares[min(rank, len(shares)) - 1].item() for rank in RANKS]


def quantiles(rows: Sequence[Mapping], student: str) -> Tensor:
    """QUANTILES over the layers of the shares within each of RANKS, [3, ranks]."""
    return torch.tensor([row["held"][student] for row in rows]).quantile(QUANTILES, 0)


def table(rows: Sequence[Mapping]) -> str:
    """Medians over the layers, and the middle 80% of them."""
    lines = [["rank", "full student", "LoRA"]]
    for rank, *both in zip(RANKS, quantiles(rows, "full").T, quantiles(rows, "lora").T):
        lines.append([str(rank), *(f"{median:.0%} ({low:.0%} to {high:.0%})" for low, median, high in both)])
    low, median, high = torch.tensor([row["cosine"] for row in rows]).quantile(QUANTILES)
    text = f"Medians over {len(rows)} layers, and the middle 80% of them. Cosine between the two changes:"
    return f"{markdown_table(lines, text_columns=0)}\n\n{text} {median:.2f} ({low:.2f} to {high:.2f})."


def plot(rows: Sequence[Mapping], path: Path) -> None:
    """Plot the share within each rank (median and middle 80% over the layers), and the cosine of every layer."""
    with figure_file(path, 9, 3.4) as figure:
        left, right = figure.subplots(1, 2)
        for student, style, label in (("full", "-o", "full student"), ("lora", "--s", "LoRA")):
            low, median, high = quantiles(rows, student)
            left.plot(RANKS, median, "k" + style, markersize=4, label=label)
            left.fill_between(RANKS, low, high, color="0.5", alpha=0.25, linewidth=0)
        left.set(xlabel="rank", ylabel="share of |dW|²", ylim=(0, 1.02))
        left.set_xscale("log", base=2)
        left.set_xticks(RANKS, RANKS)
        left.legend()
        for x, block in enumerate(("attentions", "resnets")):
            cosines = [row["cosine"] for row in rows if f".{block}." in row["layer"]]
            right.scatter([x] * len(cosines), cosines, s=14, facecolors="none", edgecolors="black")
        right.axhline(0, color="0.7", linewidth=0.8)
        right.set(xticks=range(2), xticklabels=["attention", "residual"], ylabel="cosine of full and LoRA dW, by layer")
        right.margins(x=0.3)
