"""Measure the LoRA's strength as a guidance dial: which strength stands for which guidance?

  python -m minidistill.evaluate dial runs/NAME --write

A student of guidance s at strength lambda roughly matches the teacher at w = 1 + lambda (s - 1). We search the strength
whose predictions are nearest to the teacher at w, on training prompts, and compare both on held-out prompts. --write
keeps the strengths in the header of the LoRA, where `sample.py --guidance` and `sd.sample(guidance=...)` find them.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from minidistill.data.prompts import prompt_split, spread
from minidistill.distill import Dial
from minidistill.evaluate.figures import figure_file, plot_estimates
from minidistill.evaluate.image_grid import write_grid
from minidistill.evaluate.metrics import EVALUATION_SEED, Estimate, Make, estimate, noise_error_share, psnr
from minidistill.evaluate.sampling import draw
from minidistill.evaluate.students import teacher_of
from minidistill.evaluate.tables import markdown_table
from minidistill.formats.files import write_json
from minidistill.formats.load_model import load
from minidistill.formats.lora_formats import LoRAFile, read_lora
from minidistill.formats.lora_io import add_student
from minidistill.formats.tensor_files import read_tensors, write_tensors
from minidistill.lora import lora_strength
from minidistill.pipeline import StableDiffusion
from minidistill.training.command_line import (
    add_model_flags,
    check_interval,
    load_options,
    out_folder,
    positive,
    positive_int,
)

POSITIONAL = "RUN_OR_LORA "
PARTS = (1 / 6, 1 / 3, 2 / 3, 1.2)  # default scales w = 1 + part (s - 1): 1.5, 2, 3 and 4.6 for s = 4
ROUNDS = 4  # strengths tried for each scale
COLUMNS = 6  # prompts in the image grid


def add_flags(parser: ArgumentParser) -> None:
    flag, number = parser.add_argument, dict(type=positive_int, metavar="N")
    flag("run", type=Path, metavar="RUN_OR_LORA", help="the student: a run's folder, or a LoRA file")
    flag("--guidance", type=positive, nargs="+", metavar="X",
         help="guidance scales to measure (default: four, up to 1.2 times what the student has learned)")  # fmt: skip
    flag("--prompts", **number, default=24, help="training prompts, and as many held-out ones (default: %(default)s)")
    flag("--steps", **number, default=25, help="DDIM steps (default: %(default)s; a student of train.py "
         "--student-steps takes its own)")  # fmt: skip
    flag("--batch", **number, default=24, help="images to sample at once (default: %(default)s)")
    flag("--write", action="store_true", help="write the measured strengths into the header of the LoRA")
    flag("--out", type=out_folder, default="runs/dial", metavar="FOLDER", help="results (default: %(default)s)")
    add_model_flags(parser)


def run(args: Namespace) -> None:
    file = read_lora(args.run)
    teacher = teacher_of(file)
    if file.dial is None:
        raise ValueError(f"{file.path} has no dial: name a LoRA that has learned guidance, and not few steps.")
    learned = teacher.guidance
    scales = [float(f"{w:g}") for w in args.guidance or [1 + part * (learned - 1) for part in PARTS]]  # as --write does
    if any(w <= 1 or w == learned for w in scales):
        raise ValueError(
            f"--guidance: name scales above 1 other than {learned:g}, which the student has at strength 1."
        )
    sd = load(args.model, **load_options(args))
    check_interval(teacher.interval, sd.schedule.timesteps(args.steps))
    add_student(sd, file)
    training, held_out = (spread(prompts, args.prompts) for prompts in prompt_split(args.model))
    student_steps = file.few_steps and file.few_steps[0]  # a student with a dial takes as many as its teacher
    common = dict(steps=student_steps or args.steps, student_steps=student_steps, batch=args.batch, progress=True)

    report = args.provenance | {"prompts": len(held_out), "seed": EVALUATION_SEED, "learned": learned}
    rows, images = [], []
    for w in sorted(scales):
        options = common | teacher._replace(guidance=w)._asdict()
        start = (w - 1) / (learned - 1)
        strengths = {"nominal": start, "measured": nearest_strength(sd, training, start, **options)}
        images.append(draw(sd, "teacher", held_out, **options))
        images[-1].method = f"teacher, guidance {w:g}"
        row, cache, target = {"guidance": w}, memory_cache(), images[-1].images
        for name, strength in strengths.items():
            with lora_strength(sd.unet, strength):
                share = noise_error_share(sd, held_out, cache=cache, **options)
                student = draw(sd, "student", held_out, **options)
            student.method = f"student x {strength:.3g}, {name}"
            images.append(student)
            row[name] = {
                "strength": strength,
                "noise error share": estimate(share.errors, share.gaps)._asdict(),
                "PSNR": estimate(psnr(student.images, target)[:, None])._asdict(),
            }
        rows.append(row)
        write_json(args.out / "dial.json", report | {"rows": rows})
        plot(rows, learned, args.out / "dial.png")
        write_grid(args.out / "dial-pictures.png", images, held_out, columns=COLUMNS, side=96)
        print(table([row]).splitlines()[-1], flush=True)
    print(f"\n{table(rows)}\n\nFigure, images and JSON: {args.out}")
    if args.write:
        write_dial(file, [(row["guidance"], row["measured"]["strength"]) for row in rows])


def memory_cache() -> Callable[[str, Make], dict[str, Tensor]]:
    """A cache for ``noise_error_share``: the teacher's tensors are made once and kept in memory."""
    states: dict[str, dict[str, Tensor]] = {}

    def cache(name: str, make: Make) -> dict[str, Tensor]:
        if name not in states:
            states[name] = make()
        return states[name]

    return cache


def nearest_strength(sd: StableDiffusion, prompts: Sequence[str], strength: float, **options) -> float:
    """The strength whose predictions are nearest to the teacher's, on its trajectories for ``prompts``.

    With e = eps_student - eps_cond and g = eps_hat - eps_cond, the factor (e . g) / (e . e) brings e nearest to g. As e
    is nearly proportional to the strength, we multiply the strength by it a few times, and keep the best.
    """
    tried, cache = [], memory_cache()
    for _ in range(ROUNDS):
        with lora_strength(sd.unet, strength):
            share = noise_error_share(sd, prompts, cache=cache, **options)
        tried.append((share.pooled, strength))
        e_e = share.errors + 2 * share.along - share.gaps  # as |e - g|^2 = e . e - 2 e . g + g . g
        strength *= (share.along.sum() / e_e.sum()).item()
    return min(tried)[1]


def write_dial(file: LoRAFile, points: Sequence[tuple[float, float]]) -> None:
    """Write the measured (guidance, strength) into the header of the LoRA, beside those that were measured before.

    Raises ValueError for strengths that do not grow with guidance: no dial can be read off them.
    """
    measured = {w: strength for w, strength in file.dial.points if w not in (1, file.guidance)} | dict(points)
    strengths = [strength for _, strength in Dial.through(file.guidance, list(measured.items())).points]
    if any(following <= one for one, following in pairwise(strengths)):
        raise ValueError(
            f"{file.path}: with these, the strengths do not grow with guidance ({measured}), so nothing was written: "
            "measure all scales again, or train longer."
        )
    tensors, metadata = read_tensors(file.path)
    dial = " ".join(f"{w:g}:{strength:.4g}" for w, strength in sorted(measured.items()))
    write_tensors(file.path, tensors, metadata | {"dial": dial})
    print(f"Wrote the dial into {file.path}")


def table(rows: Sequence[dict]) -> str:
    """A line for each guidance, with 95% intervals."""
    columns = ("strength", "share", "PSNR, dB")
    heads = ["guidance", *(f"{name} {column}" for name in ("nominal", "measured") for column in columns)]
    lines = [heads]
    for row in rows:
        cells = [f"{row['guidance']:g}"]
        for dial in (row["nominal"], row["measured"]):
            share, distance = Estimate(**dial["noise error share"]), Estimate(**dial["PSNR"])
            cells += [f"{dial['strength']:.3f}", f"{share:.3f}", f"{distance:.1f}"]
        lines.append(cells)
    return markdown_table(lines, text_columns=0)


def plot(rows: Sequence[dict], learned: float, path: Path) -> None:
    """Plot the strength for each guidance, and the share of the guidance that the student misses there."""
    scales = [row["guidance"] for row in rows]
    with figure_file(path, 8, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        for name, style in (("nominal", "k--"), ("measured", "ko-")):
            measured = [(row["guidance"], row[name]["strength"]) for row in rows] if name == "measured" else []
            left.plot(*zip(*Dial.through(learned, measured).points), style, label=name)
            shares = [Estimate(**row[name]["noise error share"]) for row in rows]
            plot_estimates(right, scales, shares, style, name)
        left.set(xlabel="guidance scale w", ylabel="strength λ of the LoRA", xlim=(1, None), ylim=(0, None))
        right.set(xlabel="guidance scale w", ylabel="noise error share", xlim=(1, None), ylim=(0, None))
        left.legend()
