"""The LoRA's strength as a guidance dial: at lambda times the LoRA, how much guidance is there?

  python -m minidistill.evaluate.dial runs/NAME --strengths 0.25 0.5 0.75 1 1.25

A student of guidance s at the strength lambda should be the teacher at w = 1 + lambda (s - 1). Two measures say whether
it is: the share of that teacher's guidance which it misses, and how far along the whole gap eps_hat - eps_cond it goes.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from minidistill.data.trajectories import prompt_split, spread
from minidistill.evaluate.drawing import comparison_grid, draw
from minidistill.evaluate.metrics import EVALUATION_SEED, interval, noise_error_share, psnr, with_interval
from minidistill.evaluate.students import read_student
from minidistill.formats.files import written_whole
from minidistill.formats.model_configs import write_json
from minidistill.lora import merge_lora
from minidistill.pipeline import load
from minidistill.training.settings import ModelSettings, count, made_by, one_sentence, parse, positive, setting

SHOWN = 6  # columns of pictures


@dataclass
class Settings(ModelSettings):
    run: Path = setting(..., "the student: a run's folder, or a LoRA file", "what", type=Path, metavar="RUN_OR_LORA")
    strengths: list[float] = setting(
        None, "strengths of the LoRA (default: 0.25 0.5 0.75 1 1.25)", "what", type=positive, nargs="+"
    )
    prompts: int = setting(24, "held-out prompts", "what", type=count)
    steps: int = setting(25, "DDIM steps", "how", type=count)
    batch: int = setting(24, "pictures drawn at once", "how", type=count)
    out: Path = setting(Path("runs/dial"), "folder for the results", "how")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(Settings, __doc__, argv)
    prompts = spread(prompt_split(args.model)[1], args.prompts)
    learned = read_student(args.run, 1.0, args)
    s = learned.guidance
    options = dict(steps=args.steps, batch=args.batch, negative_prompt=learned.negative_prompt)
    whole: dict[str, dict[str, Tensor]] = {}  # the states of the teacher at guidance s, the same for every strength

    def keep(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if name not in whole:
            whole[name] = make()
        return whole[name]

    rows, drawn = [], []
    for strength in args.strengths or (0.25, 0.5, 0.75, 1.0, 1.25):
        turned = read_student(args.run, strength, args)
        w = turned.guidance
        print(f"strength {strength:g}, guidance {w:g}", flush=True)
        sd = load(args.model, **args.load_options())
        teacher = draw(sd, "teacher", prompts, guidance=w, **options)
        sd.unet = turned.beside(sd.unet)
        missed = noise_error_share(sd, prompts, guidance=w, progress=True, **options)
        along = noise_error_share(sd, prompts, guidance=s, progress=True, keep=keep, **options)
        merge_lora(sd.unet)
        student = draw(sd, "student", prompts, guidance=w, **options)
        rows.append({
            "strength": strength,
            "guidance": w,
            "noise error share": interval(missed.errors, missed.gaps)._asdict(),
            "found guidance": interval(along.gaps + (s - 1) * along.along, along.gaps)._asdict(),
            "PSNR": interval(psnr(student.images, teacher.images)[:, None])._asdict(),
        })  # fmt: skip
        student.method, teacher.method = f"student x {strength:g}", f"guidance {w:g}"
        drawn += [student, teacher]

    report = made_by("minidistill.evaluate.dial", argv) | {"prompts": len(prompts), "seed": EVALUATION_SEED}
    write_json(args.out / "dial.json", report | {"rows": rows})
    with written_whole(args.out / "dial.png") as beside:
        plot(rows, beside)
    with written_whole(args.out / "dial-pictures.png") as beside:
        comparison_grid(drawn, prompts, columns=SHOWN, side=96).save(beside, "png")
    print(f"\n{markdown(rows)}\n\nFigure, pictures and JSON: {args.out}")


def markdown(rows: Sequence[dict]) -> str:
    """A line a strength, with 95% intervals."""
    lines = ["| strength | guidance it stands for | guidance found | noise error share | PSNR to that teacher |"]
    lines.append("| ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        forms = (("found guidance", "{:.2f}"), ("noise error share", "{:.3f}"), ("PSNR", "{:.1f} dB"))
        found, share, near = (with_interval(row[name], form) for name, form in forms)
        lines.append(f"| {row['strength']:g} | {row['guidance']:g} | {found} | {share} | {near} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict], path: Path) -> None:
    """What the dial says and what is found; the share that is missed."""
    strengths = [row["strength"] for row in rows]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(strengths, [row["guidance"] for row in rows], "k--", label="1 + λ (s - 1)")
    for axes, name, label in ((left, "found guidance", "found"), (right, "noise error share", None)):
        found = torch.tensor([[row[name][end] for end in ("value", "low", "high")] for row in rows])
        value, low, high = found.T
        axes.errorbar(strengths, value, (value - low, high - value), fmt="ko-", capsize=3, label=label)
    left.set(xlabel="strength λ of the LoRA", ylabel="guidance scale", xlim=(0, None))
    right.set(xlabel="strength λ of the LoRA", ylabel="noise error share", xlim=(0, None), ylim=(0, None))
    left.legend()
    figure.savefig(path, format="png", dpi=120)


if __name__ == "__main__":
    with one_sentence("minidistill.evaluate.dial", "stopped."):
        main()
