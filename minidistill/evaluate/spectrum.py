"""What was learned: how many ranks the change of each layer has, in a full student and in a LoRA.

  python -m minidistill.evaluate.spectrum runs/full runs/NAME

The change of a layer is dW = W_student - W_teacher, as a matrix [out, in k k]; of a LoRA it is (alpha / rank) B A. Of
its singular values sigma_i, the first r hold the share sum_{i<=r} sigma_i^2 / sum sigma_i^2 of its square: what a LoRA
of rank r could keep of it at best. How alike two students changed W is the cosine between their changes.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from minidistill.evaluate.students import full_student, read_full
from minidistill.formats.checkpoint import read_checkpoint
from minidistill.formats.files import written_whole
from minidistill.formats.lora_formats import read_run
from minidistill.formats.model_configs import write_json
from minidistill.lora import low_rank
from minidistill.training.settings import ModelSettings, made_by, one_sentence, parse, setting

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
ENDS = torch.tensor([0.1, 0.5, 0.9])  # the middle 80% of the layers, and the median


@dataclass
class Settings(ModelSettings):
    full: Path = setting(..., "a run of train.py --method full", "what", type=Path, metavar="FULL_RUN")
    lora: Path = setting(..., "a run with a LoRA, or its file", "what", type=Path, metavar="RUN_OR_LORA")
    out: Path = setting(Path("runs/spectrum"), "folder for the results", "how")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(Settings, __doc__, argv)
    whole = full_student(args.full)
    if whole is None:
        raise ValueError(f"{args.full} is no run of --method full: it holds no student/ and no student.safetensors.")
    pairs = read_run(args.lora, 1.0).layers
    teacher = read_checkpoint(args.model, torch.float32, variant=args.variant, ema=args.ema).unet.state_dict()
    student = read_full(whole, torch.float32, args.variant).state_dict()
    rows = []
    for name, pair in tqdm(pairs.items(), desc="layers", unit="layer"):
        full = student[f"{name}.weight"] - teacher[f"{name}.weight"]
        lora = low_rank(pair.down.float(), pair.up.float(), pair.scale)
        rows.append(dict(layer=name, **compare(full, lora)))

    write_json(args.out / "spectrum.json", made_by("minidistill.evaluate.spectrum", argv) | {"rows": rows})
    with written_whole(args.out / "spectrum.png") as beside:
        plot(rows, beside)
    print(f"{markdown(rows)}\n\nFigure and JSON: {args.out}")


@torch.no_grad()
def compare(full: Tensor, lora: Tensor) -> dict:
    """Of one layer's changes [out, in, ...]: sizes, what each of RANKS holds, and their cosine."""
    full, lora = full.flatten(1).double(), lora.flatten(1).double()
    return {
        "norm": {"full": full.norm().item(), "lora": lora.norm().item()},
        "held": {"full": at_ranks(held(full)), "lora": at_ranks(held(lora))},
        "cosine": F.cosine_similarity(full.flatten(), lora.flatten(), dim=0).item(),
    }


def held(change: Tensor) -> Tensor:
    """The share of a matrix's square that its first 1, 2, ... singular values hold; of zero, 0."""
    squares = torch.linalg.svdvals(change).square()
    return squares.cumsum(0) / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)


def at_ranks(shares: Tensor) -> list[float]:
    return [shares[min(rank, len(shares)) - 1].item() for rank in RANKS]


def by_rank(rows: Sequence[Mapping], who: str) -> Tensor:
    """What the layers' first singular values hold, at each of ENDS, [3, ranks]."""
    return torch.tensor([row["held"][who] for row in rows]).quantile(ENDS, 0)


def markdown(rows: Sequence[Mapping]) -> str:
    """Medians over the layers, and the middle 80% of them."""
    lines = ["| held by rank | full student | LoRA |", "| ---: | ---: | ---: |"]
    for rank, *both in zip(RANKS, by_rank(rows, "full").T, by_rank(rows, "lora").T):
        cells = [f"{middle:.0%} ({low:.0%} to {high:.0%})" for low, middle, high in both]
        lines.append(f"| {rank} | {' | '.join(cells)} |")
    low, middle, high = torch.tensor([row["cosine"] for row in rows]).quantile(ENDS)
    text = f"Medians over {len(rows)} layers, and the middle 80% of them."
    return "\n".join(lines) + f"\n\n{text} Cosine between the two changes: {middle:.2f} ({low:.2f} to {high:.2f})."


def plot(rows: Sequence[Mapping], path: Path) -> None:
    """What each rank holds, the median over layers and the middle 80%; the cosine of every layer."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for who, style, label in (("full", "-o", "full student"), ("lora", "--s", "LoRA")):
        low, middle, high = by_rank(rows, who)
        left.plot(RANKS, middle, "k" + style, markersize=4, label=label)
        left.fill_between(RANKS, low, high, color="0.5", alpha=0.25, linewidth=0)
    left.set(xlabel="rank", ylabel="share of |dW|² held", ylim=(0, 1.02))
    left.set_xscale("log", base=2)
    left.set_xticks(RANKS, RANKS)
    left.legend()
    kinds = ("attentions", "resnets")  # of blocks, by the names of their layers
    for place, kind in enumerate(kinds):
        cosines = [row["cosine"] for row in rows if f".{kind}." in row["layer"]]
        right.scatter([place] * len(cosines), cosines, s=14, facecolors="none", edgecolors="black")
    right.axhline(0, color="0.7", linewidth=0.8)
    right.set(
        xticks=range(len(kinds)),
        xticklabels=["attention", "residual"],
        ylabel="cosine(dW of full, of LoRA), a layer each",
    )
    right.margins(x=0.3)
    figure.savefig(path, format="png", dpi=120)


if __name__ == "__main__":
    with one_sentence("minidistill.evaluate.spectrum", "stopped."):
        main()
