"""Compare teacher, cheaper teachers and students on the same prompts and from the same noise.

  python -m minidistill.evaluate runs/NAME [runs/OTHER ...] --prompts held-out
  python -m minidistill.evaluate runs/pocket-emoji --judge minidistill.pocket.judge

Writes a table (Markdown and JSON), images side by side and the noise error by time step. The images of each method are
cached, so that an interrupted evaluation continues with the method it stopped in. A LoRA as FILE:SCALE is compared with
a teacher of guidance 1 + SCALE (s - 1).
"""

import importlib
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from minidistill.data.prompts import prompt_split, read_prompts, spread
from minidistill.data.shards import (
    read_shard,
    schedule_fingerprint,
    teacher_fingerprint,
    vae_fingerprint,
    write_shard,
)
from minidistill.evaluate import metrics
from minidistill.evaluate.figures import figure_file
from minidistill.evaluate.image_grid import write_grid
from minidistill.evaluate.metrics import ClipScore, ErrorShare, Estimate, Make, noise_error_share, pixels
from minidistill.evaluate.sampling import Drawn, draw
from minidistill.evaluate.students import one_teacher, read_students
from minidistill.evaluate.tables import markdown_table
from minidistill.formats.files import digest, write_json, write_text
from minidistill.formats.float8 import merge_to_sample
from minidistill.formats.load_model import load
from minidistill.pipeline import StableDiffusion, pil_images
from minidistill.training import command_line as cli

POSITIONAL = "[RUN_OR_LORA[:SCALE] ...] "
Row = dict[str, Estimate]  # the measures of one method


def add_flags(parser: ArgumentParser) -> None:
    flag, number = parser.add_argument_group("what to compare").add_argument, dict(type=cli.positive_int, metavar="N")
    flag("runs", nargs="*", type=cli.ScaledFile.parse, metavar="RUN_OR_LORA[:SCALE]", help="run folders or LoRA files")
    flag("--prompts", default="held-out", metavar="FILE", help="one prompt per line, or %(default)s (the default)")
    flag("--pictures", **number, default=1000, help="images per method, rounded up to the same number for each "
         "prompt (default: %(default)s)")  # fmt: skip
    flag("--guidance", type=cli.finite, metavar="SCALE", help="the teacher's guidance (default: the students', or "
         f"{cli.DEFAULT_GUIDANCE:g})")  # fmt: skip
    flag("--selective", type=cli.fraction, nargs="+", default=[], metavar="SHARE", help="add a teacher that is not "
         "guided in this share of the steps, counted from the last")  # fmt: skip
    flag("--interval", type=cli.finite, nargs=2, action="append", default=[], metavar=("LOW", "HIGH"), help="add a "
         "teacher that is guided only at time steps t from LOW to HIGH; can be repeated")  # fmt: skip
    flag = parser.add_argument_group("how to measure").add_argument
    flag("--clip", metavar="PATH", help="a CLIP model, as folder or hub id (default: the model's own, if it has one)")
    flag("--judge", metavar="MODULE", help="a module with measures for this model's images")
    flag("--steps", **number, default=25, help="DDIM steps (default: %(default)s)")
    flag("--batch", **number, default=32, help="images to sample at once (default: %(default)s)")
    out = "runs/evaluation"
    flag("--out", type=cli.out_folder, default=out, metavar="FOLDER", help="the results (default: %(default)s)")
    flag("--work", type=cli.out_folder, default=out, metavar="FOLDER", help="folder for the cache: gigabytes for a "
         "full-size model (default: %(default)s)")  # fmt: skip
    cli.add_model_flags(parser)


def run(args: Namespace) -> None:
    students = read_students(args.runs, args)
    teacher = one_teacher(students, args.guidance)
    prompts = prompt_split(args.model)[1] if args.prompts == "held-out" else read_prompts(args.prompts)
    prompts = spread(list(dict.fromkeys(prompts)), args.pictures)  # intervals are resampled over distinct prompts
    each = -(-args.pictures // len(prompts))
    repeated = [prompt for prompt in prompts for _ in range(each)]
    options = dict(steps=args.steps, batch=args.batch, **teacher._asdict())
    intervals = [cli.read_interval(ends) for ends in dict.fromkeys(map(tuple, args.interval))]
    print(f"{len(prompts)} prompts, {each} images of each, {teacher}, {args.steps} DDIM steps")

    sd = load(args.model, **cli.load_options(args))
    for interval in [*intervals, teacher.interval]:
        cli.check_interval(interval, sd.schedule.timesteps(args.steps))
    for student in students.values():  # raises for a student of another model, before anything is sampled
        student.install(load(args.model, **cli.load_options(args) | {"device": "cpu"}))
    clip = ClipScore(args.clip, CLIPTokenizer.from_pretrained(args.clip)) if args.clip else ClipScore.in_model(sd)
    judge = read_judge(args.judge)
    truth = judge.rendered(repeated, sd.height) if judge else None
    stamp = options | model_stamp(sd, args, [*repeated, teacher.negative_prompt or ""])

    def cache(name: str, make: Make, **made_with: object) -> dict[str, Tensor]:
        return cached(args.work / "cache" / f"{name}.safetensors", stamp | made_with, make)

    def images(sd: StableDiffusion, method: str, label: str, learned: str = "", **variant: object) -> Drawn:
        def make() -> dict[str, Tensor]:
            drawn = draw(sd, method, repeated, progress=True, **options | variant)
            cost = torch.tensor([drawn.unet_calls, drawn.seconds], dtype=torch.float64)
            return dict(images=pixels(drawn.images), cost=cost)

        tensors = cache(f"{label} images", make, learned=learned, **variant)
        unet_calls, seconds = tensors["cost"].tolist()
        return Drawn(label, pil_images(tensors["images"]), int(unet_calls), seconds)

    def error_share(sd: StableDiffusion, label: str, learned: str, noised: bool) -> ErrorShare:
        place = "noised latents" if noised else "trajectories"

        def teacher_cache(batch: str, make: Make) -> dict[str, Tensor]:  # made once for all students
            return cache(f"teacher on {place} {batch}", make)

        def make() -> dict[str, Tensor]:
            return vars(noise_error_share(sd, prompts, noised=noised, progress=True, cache=teacher_cache, **options))

        return ErrorShare(**cache(f"{label} error on {place}", make, learned=learned))

    rows = [images(sd, "teacher", "teacher"), images(sd, "no guidance", "no guidance")]
    for share in dict.fromkeys(args.selective):
        label = f"guided but for the last {100 * share:g}%"
        rows.append(images(sd, "teacher", label, selective=share, interval=None))
    for interval in intervals:
        rows.append(images(sd, "teacher", f"guided at t from {interval.low:g} to {interval.high:g}", interval=interval))
    teachers = {}  # those of few-step students, which took other steps
    for many in dict.fromkeys(student.few_steps[1] for student in students.values() if student.few_steps):
        rows.append(images(sd, "teacher", f"teacher, {many} trailing steps", steps=many, spacing="trailing"))
        teachers[many] = rows[-1]
    shares: dict[str, dict[str, ErrorShare]] = {}
    for label, student in students.items():
        sd = load(args.model, **cli.load_options(args))
        student.install(sd)
        learned = f"{digest(student.file.read_bytes())} {label}"
        if not student.few_steps:  # those predict what leads to their next state, not the guided prediction
            shares[label] = {
                "noise error share": error_share(sd, label, learned, noised=False),
                "on noised latents": error_share(sd, label, learned, noised=True),
            }
        merge_to_sample(sd.unet)
        rows.append(images(sd, "student", label, learned, **student.sampling))

    features = {row.method: clip.embed_images(row.images) for row in rows} if clip else {}  # [N, D] each
    rendered = clip.embed_images(truth) if clip and truth else None
    measures: dict[str, Row] = {}
    for row in rows:
        print(f"measuring: {row.method}", flush=True)
        errors = {name: metrics.estimate(x.errors, x.gaps) for name, x in shares.get(row.method, {}).items()}
        few_steps = row.method in students and students[row.method].few_steps
        own_teacher = teachers[few_steps[1]] if few_steps else rows[0]
        compared = measure(row, own_teacher, repeated, each, clip, features, rendered, judge)
        measures[row.method] = errors | compared

    write_results(args, rows, measures, shares, sd.schedule.timesteps(args.steps), prompts, each)


def read_judge(name: str | None) -> ModuleType | None:
    """Import a module with ``measures(pixels, prompts)`` and ``rendered(prompts, side)``. Raises ValueError."""
    if not name:
        return None
    if name.startswith("."):  # import_module takes it for a relative name
        raise ValueError(f"--judge {name} is not the name of a module, such as minidistill.pocket.judge.")
    try:
        judge = importlib.import_module(name)
        _ = judge.measures, judge.rendered
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--judge {name}: {error}") from error
    return judge


def model_stamp(sd: StableDiffusion, args: Namespace, prompts: list[str]) -> dict[str, object]:
    """What images depend on besides guidance: weights, settings, schedule, device, dtype, size and tokens."""
    tokens = [sd.tokenizer(prompts, verbose=False).input_ids, sd.tokenizer.pad_token_id]
    return {
        "networks": [teacher_fingerprint(sd), vae_fingerprint(sd.vae)],
        "schedule": schedule_fingerprint(sd.schedule),
        "force zeros": sd.force_zeros,
        "where": f"{args.device} {args.dtype} {sd.width}x{sd.height}",
        "tokens": digest(json.dumps(tokens).encode()),
    }


def cached(file: Path, made_with: Mapping[str, object], make: Make) -> dict[str, Tensor]:
    """Read the tensors in ``file`` if they were made with the same settings; else make and store them."""
    stamp = json.dumps(made_with)
    stored = read_shard(file)
    if stored and stored[1] == stamp:
        return stored[0]
    tensors = {name: x.cpu().contiguous() for name, x in make().items()}
    write_shard(file, tensors, stamp)
    return tensors


def measure(
    row: Drawn,
    teacher: Drawn,
    prompts: Sequence[str],
    each: int,
    clip: ClipScore | None,
    features: Mapping[str, Tensor],
    rendered: Tensor | None,
    judge: ModuleType | None,
) -> Row:
    """Compare one method's images with its teacher's, with the prompts, and with rendered images.

    Each prompt has ``each`` consecutive images. ``features`` [N, D] are the images' by method, ``rendered`` those of
    rendered images.
    """
    by_image, references = {}, {}
    if row is not teacher:
        by_image["PSNR"] = metrics.psnr(row.images, teacher.images)
        if find_spec("skimage"):  # a development extra
            by_image["SSIM"] = metrics.ssim(row.images, teacher.images)
    if clip:
        by_image["CLIP score"] = 100 * (features[row.method] * clip.embed_prompts(prompts)).sum(-1)
    if clip and row is not teacher:
        references["teacher"] = features[teacher.method]
        by_image["CLIP similarity"] = 100 * (features[row.method] * features[teacher.method]).sum(-1)
    if rendered is not None:
        references["rendered"] = rendered
    if judge:
        by_image |= judge.measures(pixels(row.images), prompts)
    estimates = {name: metrics.estimate(values.view(-1, each)) for name, values in by_image.items()}
    if len(row.images) == 1:
        return estimates  # without a Fréchet distance: one image has no covariance
    for name, others in references.items():
        estimates[f"Fréchet to {name}"] = metrics.frechet_interval(features[row.method], others, each)
    return estimates


def write_results(
    args: Namespace,
    rows: Sequence[Drawn],
    measures: Mapping[str, Row],
    shares: Mapping[str, Mapping[str, ErrorShare]],
    timesteps: list[int],
    prompts: Sequence[str],
    each: int,
) -> None:
    """Write results.json, table.md, pictures.png (the first image of some prompts) and error_by_step.png; print."""
    by_step = {
        label: {name: [x if x == x else None for x in share.per_step.tolist()] for name, share in both.items()}
        for label, both in shares.items()
    }  # None for nan, which JSON lacks
    results = [
        dict(method=row.method, unet_calls=row.unet_calls, seconds=row.seconds)
        | {name: estimate._asdict() for name, estimate in measures[row.method].items()}
        for row in rows
    ]
    report = args.provenance | {"prompts": len(prompts), "each": each, "rows": results}
    write_json(args.out / "results.json", report | {"t": timesteps, "by step": by_step})
    table = results_table([(row.method, row.unet_calls, measures[row.method]) for row in rows])
    write_text(args.out / "table.md", f"{table}\n\n`{args.provenance['command']}`\n")
    write_grid(args.out / "pictures.png", [replace(row, images=row.images[::each]) for row in rows], prompts)
    (args.out / "error_by_step.png").unlink(missing_ok=True)  # of other students
    if shares:
        curves = {label: both["noise error share"] for label, both in shares.items()}
        plot_shares(curves, timesteps, args.out / "error_by_step.png")
    print(f"\n{table}\n\nImages, plot and JSON: {args.out}")


FORMATS = {"noise error share": ".3f", "on noised latents": ".3f", "PSNR": ".1f", "SSIM": ".3f", "CLIP score": ".1f"}
FORMATS |= {"CLIP similarity": ".1f", "Fréchet to teacher": ".4f", "Fréchet to rendered": ".4f"}
FORMATS |= {"seconds of learning": ".0f"}  # others: percentages


def results_table(rows: Sequence[tuple[str, int, Row]]) -> str:
    """A line for each method: its name, its UNet calls, and its measures with their 95% intervals."""
    names = list(dict.fromkeys(name for _, _, measures in rows for name in measures))
    heads = ["PSNR, dB" if name == "PSNR" else name for name in names]
    lines = [["", "UNet calls", *heads]]
    for method, unet_calls, measures in rows:
        cells = (format(measures[name], FORMATS.get(name, ".1%")) if name in measures else "" for name in names)
        lines.append([method, str(unet_calls), *cells])
    return markdown_table(lines)


def plot_shares(shares: Mapping[str, ErrorShare], timesteps: Sequence[int], path: Path) -> None:
    """Plot the noise error share at each time step, a line for each student, over the guidance gap in grey."""
    gaps = next(iter(shares.values())).gaps.sum(0)
    with figure_file(path, 7, 3.5) as figure:
        axes = figure.subplots()
        styles = cycle(["o-", "s--", "^:", "D-."])  # distinct without colours too
        for (label, share), style in zip(shares.items(), styles):
            axes.plot(timesteps, share.per_step, style, markersize=4, label=f"{label} ({share.pooled:.2f} pooled)")
        background = axes.twinx()
        background.fill_between(timesteps, gaps / gaps.sum(), color="0.9", zorder=0)
        background.set(ylim=(0, None), ylabel="part of the squared guidance gap")
        axes.set_zorder(background.get_zorder() + 1)
        axes.patch.set_visible(False)
        axes.set(xlabel="time step t", ylabel="noise error share", ylim=(0, None))
        axes.invert_xaxis()  # from noise to image
        axes.legend()
