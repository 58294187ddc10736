"""What a run leaves to look at: pictures of teacher and student, the loss, a table on the screen and in report.md."""

from pathlib import Path

from matplotlib.figure import Figure

from minidistill.evaluate import ClipScore, Drawn, comparison_grid, draw, noise_error_share, psnr
from minidistill.guidance import Interval
from minidistill.formats.files import written_whole
from minidistill.lora import merge_lora, unmerge_lora
from minidistill.pipeline import StableDiffusion


def write_report(
    sd: StableDiffusion,
    out: Path,
    prompts: list[str],
    losses: list[float],
    *,
    guidance: float,
    steps: int,
    negative_prompt: str,
    interval: Interval | None,
    batch: int,
) -> None:
    """Evaluate the student in ``sd.unet`` on ``prompts`` it never saw; write pictures, plot and table into ``out``."""
    print(f"Evaluating on {len(prompts)} held-out prompts ...")
    options = dict(steps=steps, guidance=guidance, negative_prompt=negative_prompt, interval=interval)
    options |= dict(batch=batch, progress=True)
    share = noise_error_share(sd, prompts, **options).pooled
    sd.sample(prompts[:1], steps=1)  # the first calls of everything are slower: off the clock
    rows = [draw(sd, method, prompts, **options) for method in ("teacher", "no guidance")]
    merge_lora(sd.unet)
    rows.append(draw(sd, "student", prompts, **options))
    unmerge_lora(sd.unet)

    shares = dict(zip(("teacher", "no guidance", "student"), (0.0, 1.0, share)))
    table = markdown_table(sd, rows, shares, prompts)
    frozen, trained = (
        sum(p.numel() * p.element_size() for p in sd.unet.parameters() if p.requires_grad == learns) / 1e6
        for learns in (False, True)
    )
    memory = f"Weights: W {frozen:.1f} MB, and {trained:.1f} MB beside it that learned."

    with written_whole(out / "teacher_vs_student.png") as beside:
        comparison_grid(rows, prompts).save(beside, "png")
    with written_whole(out / "loss.png") as beside:
        plot_loss(losses, beside)
    with written_whole(out / "report.md") as beside:
        beside.write_text(
            f"# Teacher and student on {len(prompts)} held-out prompts\n\n{table}\n\n{memory}\n\n"
            f"Guidance {guidance:g}, {steps} DDIM steps, {len(losses)} updates. The noise error share is the student's "
            "squared error on the teacher's guided trajectories over the squared gap that guidance makes there; PSNR "
            "compares pictures of the same prompt and seed.\n\n"
            "![pictures](teacher_vs_student.png)\n\n![loss](loss.png)\n",
            encoding="utf-8",
        )
    print(f"\n{table}\n\n{memory}\nPictures: {out / 'teacher_vs_student.png'}; all of it: {out / 'report.md'}")


def markdown_table(sd: StableDiffusion, rows: list[Drawn], shares: dict[str, float], prompts: list[str]) -> str:
    """Cost of a picture, distance to the teacher, and, where the model folder has a CLIP, agreement with the prompt."""
    clip = ClipScore(sd.path / "clip", sd.tokenizer) if (sd.path / "clip").is_dir() else None
    heads = ["", "UNet calls", "s / picture", "noise error share", "PSNR to teacher", *(["CLIP score"] if clip else [])]
    lines = [" | ".join(heads), " | ".join(["---"] + ["---:"] * (len(heads) - 1))]
    for row in rows:
        near = "" if row.method == "teacher" else f"{psnr(row.images, rows[0].images).mean():.1f} dB"
        cells = [row.method, str(row.unet_calls), f"{row.seconds:.3f}", f"{shares[row.method]:.2f}", near]
        cells += [f"{clip(row.images, prompts).mean():.1f}"] if clip else []
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def plot_loss(losses: list[float], path: Path) -> None:
    """The loss of every update, and its running mean."""
    window = max(len(losses) // 40, 1)
    recent = (losses[max(i - window, 0) : i + 1] for i in range(len(losses)))
    mean = [sum(some) / len(some) for some in recent]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, color="0.75", linewidth=0.8, label="each update")
    axes.plot(mean, color="black", label=f"mean of {window + 1}")
    axes.set(xlabel="update", ylabel="squared error of the guided prediction", yscale="log")
    axes.legend()
    figure.savefig(path, format="png", dpi=120)
