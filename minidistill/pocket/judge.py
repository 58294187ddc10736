"""Judge from the pixels alone whether images show what their captions say, without the model or its CLIP.

  python -m minidistill.pocket.judge --lora weights/pocket-emoji/guidance-lora.safetensors --out results/pocket.json
  python -m minidistill.pocket.judge --check

An image is right if its background is, and if each thing is where it belongs, by both ways to recognise it
(recognition.py). Both need the images of the emoji.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minidistill import load
from minidistill.evaluate import draw, estimate, pixels
from minidistill.evaluate.metrics import Estimate
from minidistill.evaluate.students import one_teacher, read_students
from minidistill.evaluate.tables import markdown_table
from minidistill.formats.files import write_json
from minidistill.formats.float8 import merge_to_sample
from minidistill.pipeline import pil_images
from minidistill.pocket.compositions import COLOURS, Composition, all_compositions, read_compositions
from minidistill.pocket.images import NOTHING, PACKAGE, WORK, Renderer, as_tensors, render
from minidistill.pocket.recognition import (
    background,
    blur,
    border_colour,
    crops,
    identity_by_classifier,
    identity_by_template,
    load_classifier,
    templates,
)
from minidistill.training import command_line as cli

JUDGING_SEED = 1002  # of rendered images; those that the model and the classifier learn from have others
MEASURES = ("identity by template", "identity by classifier", "background", "all right")


def read_flags(argv: list[str]) -> Namespace:
    parser = cli.new_parser(__doc__, prog="python -m minidistill.pocket.judge")
    flag, number = parser.add_argument, dict(type=cli.positive_int, metavar="N")
    flag("--lora", type=cli.ScaledFile.parse, nargs="+", default=[], metavar="RUN_OR_LORA[:SCALE]",
         help="judge these students too, beside their teacher")  # fmt: skip
    flag("--check", action="store_true", help="check the judges instead, on rendered images, plain and degraded")
    flag("--guidance", type=cli.finite, metavar="SCALE",
         help=f"the teacher's guidance (default: the students', or {cli.DEFAULT_GUIDANCE:g})")  # fmt: skip
    flag("--steps", **number, default=25, help="DDIM steps (default: %(default)s)")
    flag("--seeds", **number, default=4, help="images per composition (default: %(default)s)")
    flag("--limit", **number, help="judge N compositions, evenly spread (default: all held-out)")
    flag("--batch", **number, default=32, help="images to sample at once (default: %(default)s)")
    flag("--out", type=cli.out_file, metavar="FILE", help="write the numbers to this JSON file")
    flag("--work", type=cli.out_folder, default=WORK, metavar="FOLDER", help="for the judge (default: %(default)s)")
    flag("--emoji", type=Path, default=PACKAGE, metavar="FOLDER", help="the npm package (default: %(default)s)")
    cli.add_model_flags(parser)
    return parser.parse_args(argv)


def judge(
    images: Tensor, compositions: Sequence[Composition], classifier: nn.Module, stamps: Tensor
) -> dict[str, Tensor]:
    """Judge uint8 [C * S, 3, H, W], S consecutive images per composition, by each of MEASURES: 1 if right, [C, S].

    The compositions must be all single, or all pairs. Both things of a pair must be right, each in its place.
    """
    each = len(images) // len(compositions)
    things, _ = as_tensors(compositions)
    pair = bool((things[:, 1] != NOTHING).all())
    seen = crops(images, pair)  # [N, T, 3, h, w]
    expected = things[:, : seen.shape[1]].repeat_interleave(each, 0)  # [N, T]
    backgrounds = border_colour(images)[:, None].expand(-1, seen.shape[1], -1)
    flat = seen.flatten(0, 1)
    found = [identity_by_template(flat, backgrounds.flatten(0, 1), stamps), identity_by_classifier(flat, classifier)]
    right = [(f.view_as(expected) == expected).all(1) for f in found]
    colour = torch.tensor([list(COLOURS).index(c.colour) for c in compositions]).repeat_interleave(each)
    right.append(background(images) == colour)
    right.append(right[0] & right[1] & right[2])
    return {measure: r.view(-1, each).float() for measure, r in zip(MEASURES, right)}


def compositions_of(captions: Sequence[str]) -> list[Composition]:
    """The compositions with these captions. Raises ValueError for an unknown caption."""
    known = {c.caption: c for c in all_compositions()}
    if unknown := [caption for caption in captions if caption not in known]:
        raise ValueError(f"This judge knows only the embedded model's captions, not: {', '.join(unknown[:5])}.")
    return [known[caption] for caption in captions]


def measures(images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    """uint8 [N, 3, H, W] -> MEASURES of each image, [N]. ``evaluate --judge`` calls this and ``rendered``."""
    compositions, classifier = compositions_of(captions), load_classifier(WORK, PACKAGE)
    result = {measure: torch.empty(len(images)) for measure in MEASURES}
    for length in (1, 2):
        rows = [i for i, c in enumerate(compositions) if len(c.emoji) == length]
        if rows:
            right = judge(images[rows], [compositions[i] for i in rows], classifier, templates(PACKAGE))
            for measure, values in right.items():
                result[measure][rows] = values.flatten()
    return result


def rendered(captions: Sequence[str], side: int) -> list[Image.Image]:
    """Reference images of the captions, ``side`` pixels wide."""
    compositions = compositions_of(captions)
    return pil_images(render(Renderer(PACKAGE, side), compositions, 1, JUDGING_SEED))


def mean_distance(images: Tensor, each: int) -> float:
    """Mean RMS distance in [0, 1] between two images of one composition, which has ``each`` consecutive images."""
    sets = (images.float() / 255).flatten(1).view(-1, each, images[0].numel())  # [C, S, 3 H W]
    distances = [(sets[:, i] - sets[:, j]).square().mean(-1).sqrt() for i in range(each) for j in range(i)]
    return torch.stack(distances).mean().item()


def row(method: str, kind: str, right: dict[str, Tensor], images: Tensor, compositions: Sequence[Composition]) -> dict:
    """One method's numbers for the JSON file; ``wrong`` counts, by caption, the images that are not all right."""
    each = right[MEASURES[0]].shape[1]
    numbers = {m: estimate(values)._asdict() for m, values in right.items()}
    counts = (each - right["all right"].sum(1)).int().tolist()
    wrong = {c.caption: n for c, n in zip(compositions, counts) if n}
    distance = mean_distance(images, each)
    return {"method": method, "things": kind, **numbers, "distance over seeds": distance, "wrong": wrong}


def table(rows: Sequence[dict]) -> str:
    """A Markdown table of percentages with their intervals."""
    lines = [["", "things", *MEASURES, "distance over seeds"]]
    for r in rows:
        percentages = (f"{Estimate(**r[measure]):.1%}" for measure in MEASURES)
        lines.append([r["method"], r["things"], *percentages, f"{r['distance over seeds']:.3f}"])
    return markdown_table(lines, text_columns=2)


def degraded(images: Tensor) -> dict[str, Tensor]:
    """uint8 [N, 3, H, W], plain and degraded in the ways that sampled images may be."""
    x, generator = images.float() / 255, torch.Generator().manual_seed(JUDGING_SEED)
    coarse = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    versions = {
        "rendered": x,
        "rendered, blurred (sigma 1)": blur(x, 1.0),
        "rendered, noisy (sigma 0.1)": x + 0.1 * torch.randn(x.shape, generator=generator),
        "rendered, smoothed (half the size and back)": blur(coarse, 0.7),
        "rendered, faded (contrast 0.7)": 0.5 + 0.7 * (x - 0.5),
    }
    return {name: (255 * v.clamp(0, 1)).round().to(torch.uint8) for name, v in versions.items()}


def held_out(compositions: Sequence[Composition], limit: int | None = None) -> list[Composition]:
    """The held-out compositions, or ``limit`` of them, evenly spread."""
    held_out = [c for c in compositions if c.held_out]
    chosen = np.linspace(0, len(held_out) - 1, min(limit or len(held_out), len(held_out))).round().astype(int)
    return [held_out[i] for i in chosen]


def sample_all(args: Namespace, prompts: list[str]) -> dict[str, Tensor]:
    """Images of the prompts by teacher, unguided model and students: uint8 [N, 3, H, W] each."""
    students = read_students(args.lora, args)
    teacher = one_teacher(students, args.guidance)
    options = dict(steps=args.steps, batch=args.batch, progress=True, **teacher._asdict())
    sd = load(args.model, **cli.load_options(args))
    rows = {f"teacher, guidance {teacher.guidance:g}": draw(sd, "teacher", prompts, **options)}
    rows["no guidance"] = draw(sd, "no guidance", prompts, **options)
    for label, student in students.items():
        sd = load(args.model, **cli.load_options(args))
        student.install(sd)
        merge_to_sample(sd.unet)
        rows[f"student, {label}"] = draw(sd, "student", prompts, **options | student.sampling)
    return {method: pixels(drawn.images) for method, drawn in rows.items()}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = read_flags(argv)
    if args.seeds < 2:
        raise ValueError("--seeds must be at least 2, to measure a distance over seeds.")
    if args.check and args.lora:
        raise ValueError("--check is for the judges, without a model: leave out --lora.")
    path = args.model / "compositions.json"
    compositions = held_out(all_compositions() if args.check else read_compositions(path), args.limit)
    reference = render(Renderer(args.emoji), compositions, args.seeds, JUDGING_SEED)
    if args.check:
        judged = degraded(reference)
    else:
        prompts = [c.caption for c in compositions for _ in range(args.seeds)]
        judged = sample_all(args, prompts) | {"rendered": reference}
    classifier, stamps = load_classifier(args.work, args.emoji), templates(args.emoji)
    rows = []
    for number, things in enumerate(("one", "two"), start=1):
        chosen = [i for i, c in enumerate(compositions) if len(c.emoji) == number]
        some = [compositions[i] for i in chosen]
        if not some:  # --limit left out this kind
            continue
        for method, images in judged.items():
            images = images.unflatten(0, (-1, args.seeds))[chosen].flatten(0, 1)
            rows.append(row(method, things, judge(images, some, classifier, stamps), images, some))
    print(f"{len(compositions)} held-out compositions, {args.seeds} images each\n\n{table(rows)}")
    if args.out:
        report = cli.provenance("-m minidistill.pocket.judge", argv)
        counts = dict(compositions=len(compositions), seeds=args.seeds, steps=args.steps)
        write_json(args.out, report | counts | dict(rows=rows))


if __name__ == "__main__":
    with cli.one_line_errors("minidistill.pocket.judge", "stopped."):
        main()
