"""Show a training run: previews on the way; at the end a report with images, losses and a table (report.md)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from minidistill.data.prompts import spread
from minidistill.evaluate.figures import figure_file
from minidistill.evaluate.image_grid import write_grid
from minidistill.evaluate.metrics import ClipScore, noise_error_share, psnr
from minidistill.evaluate.sampling import Drawn, draw
from minidistill.evaluate.tables import markdown_table
from minidistill.formats.files import write_text
from minidistill.formats.float8 import merge_to_sample
from minidistill.guidance import Interval
from minidistill.lora import unmerge_lora
from minidistill.pipeline import StableDiffusion


def write_preview(sd: StableDiffusion, out: Path, held_out: Sequence[str], step: int, **options) -> None:
    """Images of the student as it is after ``step`` updates. ``options`` are those of ``draw``."""
    prompts = spread(held_out, 8)
    write_grid(out / f"pictures/step-{step:06d}.png", [draw(sd, "student", prompts, **options)], prompts)


def write_report(
    sd: StableDiffusion,
    out: Path,
    held_out: Sequence[str],
    losses: Sequence[float],
    *,
    steps: int,
    guidance: float,
    interval: Interval | None,
    student_steps: int | None,
    **options,
) -> None:
    """Evaluate the student in ``sd.unet`` on ``held_out`` prompts; write images, a plot and a table into ``out``.

    The keywords are those of ``draw``.
    """
    # Of large images only 8: more would take longer than the training.
    prompts = spread(held_out, 24 if sd.height * sd.width <= 256**2 else 8)
    print(f"Evaluating on {len(prompts)} held-out prompts ...")
    options |= dict(steps=steps, guidance=guidance, interval=interval, student_steps=student_steps, progress=True)
    share = noise_error_share(sd, prompts, **options).pooled
    sd.sample(prompts[:1], steps=1)  # warm up: the first calls are slower
    rows = [draw(sd, method, prompts, **options) for method in ("teacher", "no guidance")]
    merge_to_sample(sd.unet)
    rows.append(draw(sd, "student", prompts, **options))
    unmerge_lora(sd.unet)

    table = report_table(sd, rows, {"teacher": 0.0, "no guidance": 1.0, "student": share}, prompts)
    trained = sum(p.nbytes for p in sd.unet.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in sd.unet.parameters()) - trained
    memory = f"Weights: {frozen / 1e6:.1f} MB frozen, {trained / 1e6:.1f} MB trained."
    where = f" for {interval.low:g} <= t <= {interval.high:g}" if interval else ""
    few = f", the student {student_steps}" if student_steps else ""
    on = "what leads from one state to the next that it visits" if student_steps else "the guided prediction"

    write_grid(out / "teacher_vs_student.png", rows, prompts)
    plot_loss(losses, out / "loss.png")
    write_text(
        out / "report.md",
        f"# Teacher and student on {len(prompts)} held-out prompt{'s' * (len(prompts) > 1)}\n\n"
        f"{table}\n\n{memory}\n\n"
        f"Guidance {guidance:g}{where}, {steps} DDIM steps{few}, {len(losses)} updates. The noise error share is "
        f"the student's squared error in {on}, on the teacher's guided trajectories, divided by that of the model "
        "without guidance. PSNR compares images of the same prompt and seed.\n\n"
        "![images](teacher_vs_student.png)\n\n![loss](loss.png)\n",
    )
    print(f"\n{table}\n\n{memory}\nImages: {out / 'teacher_vs_student.png'}. Full report: {out / 'report.md'}")


def report_table(
    sd: StableDiffusion, rows: Sequence[Drawn], shares: Mapping[str, float], prompts: Sequence[str]
) -> str:
    """The cost of an image, the distance to the teacher and, if the model has a CLIP, agreement with the prompt."""
    clip = ClipScore.in_model(sd)
    heads = ["", "UNet calls", "s / image", "noise error share", "PSNR to teacher", *(["CLIP score"] if clip else [])]
    lines = [heads]
    for row in rows:
        distance = "" if row.method == "teacher" else f"{psnr(row.images, rows[0].images).mean():.1f} dB"
        cells = [row.method, str(row.unet_calls), f"{row.seconds:.3f}", f"{shares[row.method]:.2f}", distance]
        lines.append(cells + ([f"{clip(row.images, prompts).mean():.1f}"] if clip else []))
    return markdown_table(lines)


def plot_loss(losses: Sequence[float], path: Path) -> None:
    """Plot the loss of every update and its running mean."""
    window = max(len(losses) // 40, 1)
    recent = (losses[max(i - window, 0) : i + 1] for i in range(len(losses)))
    means = [sum(some) / len(some) for some in recent]
    with figure_file(path, 7, 3.5) as figure:
        axes = figure.subplots()
        axes.plot(losses, color="0.75", linewidth=0.8, label="each update")
        axes.plot(means, color="black", label=f"mean of {window + 1}")
        axes.set(xlabel="update", ylabel="squared error of the guided prediction", yscale="log")
        axes.legend()
