"""Measure the LoRA's strength as a guidance dial: how much guidance is there at lambda times the LoRA?

  python -m minidistill.evaluate dial runs/NAME --strengths 0.25 0.5 0.75 1 1.25

A student of guidance s at strength lambda should match the teacher at w = 1 + lambda (s - 1). We measure the share of
that teacher's guidance which the student misses, and how far along the gap eps_hat - eps_cond its predictions are.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from minidistill.data.prompts import prompt_split, spread
from minidistill.evaluate.figures import figure_file
from minidistill.evaluate.image_grid import comparison_grid
from minidistill.evaluate.metrics import EVALUATION_SEED, Estimate, interval, noise_error_share, psnr
from minidistill.evaluate.sampling import draw
from minidistill.evaluate.students import read_student
from minidistill.evaluate.tables import markdown_table
from minidistill.formats.files import atomic_write, write_json
from minidistill.formats.load_model import load
from minidistill.lora import merge_lora
from minidistill.training.command_line import add_model_flags, load_options, positive, positive_int

POSITIONAL = "RUN_OR_LORA "
STRENGTHS = [0.25, 0.5, 0.75, 1.0, 1.25]
COLUMNS = 6  # of images


def add_flags(parser: ArgumentParser) -> None:
    flag = parser.add_argument
    flag("run", type=Path, metavar="RUN_OR_LORA", help="the student: a run's folder, or a LoRA file")
    flag("--strengths", type=positive, nargs="+", default=STRENGTHS, metavar="STRENGTH",
         help="strengths of the LoRA (default: 0.25 0.5 0.75 1 1.25)")  # fmt: skip
    flag("--prompts", type=positive_int, default=24, metavar="N", help="held-out prompts (default: %(default)s)")
    flag("--steps", type=positive_int, default=25, metavar="N", help="DDIM steps (default: %(default)s)")
    flag("--batch", type=positive_int, default=24, metavar="N", help="images to sample at once (default: %(default)s)")
    flag("--out", type=Path, default=Path("runs/dial"), metavar="FOLDER", help="results (default: %(default)s)")
    add_model_flags(parser)


def run(args: Namespace) -> None:
    prompts = spread(prompt_split(args.model)[1], args.prompts)
    read = read_student(args.run, 1.0, args)
    if read.few_steps and read.few_steps[0] < read.few_steps[1]:
        raise ValueError(f"{args.run} takes fewer steps than its teacher: measure the dial of one that takes as many.")
    learned = read.teacher
    s = learned.guidance
    states: dict[str, dict[str, Tensor]] = {}  # of the teacher at guidance s, the same for every strength
    rows, images = [], []
    for strength in args.strengths:
        scaled = read_student(args.run, strength, args)
        w = scaled.teacher.guidance
        print(f"strength {strength:g}, guidance {w:g}", flush=True)
        whole = dict(steps=args.steps, batch=args.batch, **learned._asdict())
        partial = whole | dict(guidance=w)
        sd = load(args.model, **load_options(args))
        teacher = draw(sd, "teacher", prompts, **partial)
        sd.unet = scaled.install(sd.unet)
        share = noise_error_share(sd, prompts, progress=True, **partial)
        gap = noise_error_share(
            sd, prompts, progress=True, cache=lambda n, make: states.get(n) or states.setdefault(n, make()), **whole
        )
        merge_lora(sd.unet)
        student = draw(sd, "student", prompts, **partial)
        rows.append({
            "strength": strength,
            "guidance": w,
            "noise error share": interval(share.errors, share.gaps)._asdict(),
            "found guidance": interval(gap.gaps + (s - 1) * gap.along, gap.gaps)._asdict(),
            "PSNR": interval(psnr(student.images, teacher.images)[:, None])._asdict(),
        })  # fmt: skip
        student.method, teacher.method = f"student x {strength:g}", f"guidance {w:g}"
        images += [student, teacher]

    report = args.provenance | {"prompts": len(prompts), "seed": EVALUATION_SEED}
    write_json(args.out / "dial.json", report | {"rows": rows})
    plot(rows, args.out / "dial.png")
    with atomic_write(args.out / "dial-pictures.png") as file:
        comparison_grid(images, prompts, columns=COLUMNS, side=96).save(file, "png")
    print(f"\n{table(rows)}\n\nFigure, images and JSON: {args.out}")


def table(rows: Sequence[dict]) -> str:
    """A line for each strength, with 95% intervals."""
    lines = [["strength", "nominal guidance", "measured guidance", "noise error share", "PSNR to that teacher"]]
    lines.append(["---:"] * 5)
    for row in rows:
        found, share, distance = (Estimate(**row[name]) for name in ("found guidance", "noise error share", "PSNR"))
        strength, guidance = f"{row['strength']:g}", f"{row['guidance']:g}"
        lines.append([strength, guidance, f"{found:.2f}", f"{share:.3f}", f"{distance:.1f} dB"])
    return markdown_table(lines)


def plot(rows: Sequence[dict], path: Path) -> None:
    """Plot nominal and measured guidance, and the share of it that the student misses."""
    strengths = [row["strength"] for row in rows]
    with figure_file(path, 8, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        left.plot(strengths, [row["guidance"] for row in rows], "k--", label="1 + λ (s - 1)")
        for axes, name, label in ((left, "found guidance", "measured"), (right, "noise error share", None)):
            value, low, high = torch.tensor([[row[name][end] for end in Estimate._fields] for row in rows]).T
            axes.errorbar(strengths, value, (value - low, high - value), fmt="ko-", capsize=3, label=label)
        left.set(xlabel="strength λ of the LoRA", ylabel="guidance scale", xlim=(0, None))
        right.set(xlabel="strength λ of the LoRA", ylabel="noise error share", xlim=(0, None), ylim=(0, None))
        left.legend()
