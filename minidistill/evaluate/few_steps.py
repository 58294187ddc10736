"""Compare ways to teach a LoRA few steps: what helps, what does not, and what others do.

  python -m minidistill.evaluate few-steps --student-steps 2 --one-pass weights/pocket-emoji/guidance-lora.safetensors

Every way has the teacher's trajectories, the same updates unless its name says more, and one seed. Measured on held-out
prompts against the teacher in all its steps: PSNR, CLIP score, sharpness (mean squared Laplacian of the image, the
teacher's is 1), and what --judge measures. Finished ways are not repeated.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minidistill.data.prompts import prompt_split, spread
from minidistill.evaluate import few_step_ways
from minidistill.evaluate.few_step_ways import (
    WAYS,
    check_teacher,
    load_merged,
    read_lesson,
    sample_renoised,
    train_way,
)
from minidistill.evaluate.image_grid import write_grid
from minidistill.evaluate.metrics import EVALUATION_SEED, ClipScore, Estimate, estimate, pixels, psnr
from minidistill.evaluate.quality import cached, model_stamp, read_judge, results_table
from minidistill.evaluate.sampling import Drawn
from minidistill.evaluate.students import label_of
from minidistill.formats.files import write_json
from minidistill.formats.load_model import load
from minidistill.formats.lora_formats import LoRAFile, read_lora
from minidistill.pipeline import StableDiffusion, pil_images
from minidistill.training.command_line import load_options, positive_int

UNGUIDED = "no guidance"  # learns nothing, and costs as much as a student
SAMPLING = dict(spacing="trailing", seed=EVALUATION_SEED, batch=32, progress=True)


def add_flags(parser: ArgumentParser) -> None:
    flag = parser.add_argument
    flag("--student-steps", type=positive_int, metavar="N", nargs="+", default=[2], help="how many steps to learn: "
         "divisors of --teacher-steps and of the largest, at least 8 with one LoRA for all (default: 2)")  # fmt: skip
    ways = [*WAYS, UNGUIDED]
    flag("--ways", nargs="+", choices=ways, default=ways, metavar="WAY",
         help=f"any of {', '.join(map(repr, ways))} (default: all)")  # fmt: skip
    flag("--one-pass", type=Path, metavar="RUN_OR_LORA", help="a student that takes as many steps as its teacher")
    flag("--loras", type=Path, nargs="+", default=[], metavar="RUN_OR_LORA", help="students of train.py "
         "--student-steps to measure as well")  # fmt: skip
    few_step_ways.add_flags(parser)


def run(args: Namespace) -> None:
    taught = [name for name in args.ways if name != UNGUIDED]
    if args.one_pass is None and any(WAYS[name].needs_one_pass for name in taught):
        raise ValueError("--ways: some begin from a student that takes as many steps as its teacher: give --one-pass.")
    one_pass, finished = args.one_pass and read_lora(args.one_pass), [read_lora(path) for path in args.loras]
    if one_pass and (not one_pass.is_student or one_pass.skips_steps):
        raise ValueError(f"--one-pass {one_pass.path} is no student that takes as many steps as its teacher.")
    labels = [label_of(path) for path in args.loras]
    if len(set(labels)) < len(labels):
        raise ValueError(f"--loras: two would have the same name in the table ({', '.join(labels)}): rename one.")
    for lora in finished:
        if not lora.few_steps or lora.few_steps[0] not in args.student_steps:
            numbers = " or ".join(map(str, args.student_steps))
            raise ValueError(f"--loras {lora.path} has not learned {numbers} steps at guidance {args.guidance:g}.")
    steps = {*args.student_steps, *(WAYS[name].steps for name in taught)} - {None}
    if odd := [n for n in steps if max(steps) % n or args.teacher_steps % n]:
        raise ValueError(f"{odd[0]} steps must divide both {max(steps)}, the most to learn, and --teacher-steps.")
    sd, (captions, held_out) = load(args.model, **load_options(args)), prompt_split(args.model)
    for lora in filter(None, [one_pass, *finished]):
        check_teacher(sd, lora, args.guidance)
    prompts = [prompt for prompt in spread(held_out, args.prompts) for _ in range(args.each)]
    measures = make_measures(sd, prompts, args)  # raises for a wrong --judge, before the teacher samples
    lesson = read_lesson(sd, captions, args, max(steps))

    def teacher_images() -> dict[str, Tensor]:
        return {"images": pixels(sd.sample(prompts, steps=args.teacher_steps, guidance=args.guidance, **SAMPLING))}

    stamp = model_stamp(sd, args, prompts) | dict(steps=args.teacher_steps, guidance=args.guidance)
    teacher = pil_images(cached(args.out / "teacher.safetensors", stamp, teacher_images)["images"])
    report = args.provenance | {"prompts": len(prompts) // args.each, "each": args.each}

    def compare(N: int) -> None:
        # Before anything is written: train_way raises for a LoRA of other settings, and an earlier table must survive.
        learned = {name: train_way(name, WAYS[name].steps or N, lesson, one_pass, args) for name in taught}
        rows, drawn = [], []

        def add(name: str, images: list[Image.Image], calls: int, seconds: str = "0") -> None:
            row = {"way": name, "calls": calls, "seconds of learning": float(seconds)}
            rows.append(row | {"measures": measures(images, teacher)})
            drawn.append(Drawn(name, images[:: args.each], calls, 0.0))
            write_json(args.out / f"few-steps-{N}.json", report | {"rows": rows})
            write_grid(args.out / f"few-steps-{N}.png", drawn, prompts[:: args.each], side=96)
            print(table(rows).splitlines()[-1], flush=True)

        def add_lora(name: str, *loras: LoRAFile) -> None:
            images = load_merged(loras, args).sample(prompts, steps=N, guidance=1, **SAMPLING)
            add(name, images, N, loras[-1].metadata.get("seconds", "0"))

        add(f"teacher, {args.teacher_steps} steps", teacher, 2 * args.teacher_steps)
        add("teacher", sd.sample(prompts, steps=N, guidance=args.guidance, **SAMPLING), 2 * N)
        if one_pass:
            add_lora("one-pass student", one_pass)
        for label, lora in zip(labels, finished):
            if lora.few_steps[0] == N:
                add_lora(label, lora)
        for name, lora in learned.items():
            way = WAYS[name]
            if way.renoise:
                images = sample_renoised(load_merged([lora], args), prompts, N)
                add(name, images, N, lora.metadata["seconds"])
            else:
                add_lora(name, *([one_pass, lora] if way.on_top else [lora]))
        if UNGUIDED in args.ways:
            add(UNGUIDED, sd.sample(prompts, steps=N, guidance=1, **SAMPLING), N)
        print(f"\n{table(rows)}\n")

    for N in args.student_steps:
        compare(N)
    print(f"Images and JSON: {args.out}")


def make_measures(
    sd: StableDiffusion, prompts: Sequence[str], args: Namespace
) -> Callable[[list[Image.Image], list[Image.Image]], dict[str, dict]]:
    """A function of images and the teacher's images that returns each measure with its interval."""
    clip, judge = ClipScore.in_model(sd), read_judge(args.judge)

    def by_prompt(values: Tensor) -> Tensor:
        return values.view(-1, args.each)

    def measures(images: list[Image.Image], teacher: list[Image.Image]) -> dict[str, dict]:
        estimates = {}
        if images is not teacher:
            estimates["PSNR"] = estimate(by_prompt(psnr(images, teacher)))
        # The ratio of two means over the same prompts: both are resampled together.
        estimates["sharpness"] = estimate(by_prompt(sharpness(images)), by_prompt(sharpness(teacher)))
        if clip:
            estimates["CLIP score"] = estimate(by_prompt(clip(images, prompts)))
        if judge:
            estimates |= {name: estimate(by_prompt(x)) for name, x in judge.measures(pixels(images), prompts).items()}
        return {name: x._asdict() for name, x in estimates.items()}

    return measures


def sharpness(images: Sequence[Image.Image]) -> Tensor:
    """The mean squared Laplacian of each image, [N]."""
    x = pixels(images).double().mean(1, keepdim=True)  # grey, [N, 1, H, W]
    laplacian = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=x.dtype)
    return F.conv2d(x, laplacian[None, None]).square().mean((1, 2, 3))


def table(rows: Sequence[dict]) -> str:
    """A line for each way, with 95% intervals."""
    lines = []
    for row in rows:
        measures = {name: Estimate(**value) for name, value in row["measures"].items()}
        seconds = {"seconds of learning": row["seconds of learning"]} if row["seconds of learning"] else {}
        lines.append((row["way"], row["calls"], measures | seconds))
    return results_table(lines)
