"""Can a LoRA that has learned few steps still sample at other guidance scales?

  python -m minidistill.evaluate steering --student-steps 4 --one-pass weights/pocket-emoji/guidance-lora.safetensors

At each guidance w two methods are compared with the teacher, which takes all its steps at w. "coupled": one LoRA has
learned guidance and steps together, and its strength is scaled to (w - 1) / (s - 1), where s is what it has learned.
"added": the guidance LoRA, at the strength that its dial has for w, and a LoRA of steps learned on top of it, at full
strength.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from minidistill.data.prompts import prompt_split, spread
from minidistill.evaluate import few_step_ways
from minidistill.evaluate.few_step_ways import check_teacher, load_merged, read_lesson, train_way
from minidistill.evaluate.few_steps import SAMPLING, make_measures, table
from minidistill.evaluate.image_grid import write_grid
from minidistill.evaluate.sampling import Drawn
from minidistill.formats.files import write_json
from minidistill.formats.load_model import load
from minidistill.formats.lora_formats import read_lora
from minidistill.training.command_line import load_options, positive, positive_int


def add_flags(parser: ArgumentParser) -> None:
    flag = parser.add_argument
    flag("--student-steps", type=positive_int, metavar="N", default=4, help="steps to learn (default: %(default)s)")
    flag("--one-pass", type=Path, required=True, metavar="RUN_OR_LORA", help="the guidance LoRA")
    flag("--scales", type=positive, nargs="+", default=[1.25, 1.5, 2, 3, 4], metavar="W",
         help="guidance scales to steer to (default: 1.25 1.5 2 3 4)")  # fmt: skip
    few_step_ways.add_flags(parser)


def run(args: Namespace) -> None:
    N, one_pass = args.student_steps, read_lora(args.one_pass)
    if one_pass.dial is None:
        raise ValueError(
            f"--one-pass {one_pass.path}: it must be a one-pass student that has learned guidance {args.guidance:g}."
        )
    if any(w <= 1 for w in args.scales):
        raise ValueError("--scales: each must be above 1, which is no guidance.")
    sd, (captions, held_out) = load(args.model, **load_options(args)), prompt_split(args.model)
    check_teacher(sd, one_pass, args.guidance)
    prompts = [prompt for prompt in spread(held_out, args.prompts) for _ in range(args.each)]
    measures = make_measures(sd, prompts, args)  # raises for a wrong --judge, before the teacher samples
    lesson = read_lesson(sd, captions, args, N)
    coupled, steps = (
        train_way(way, N, lesson, one_pass, args) for way in ("train.py", "on top of the one-pass student")
    )

    report = args.provenance | {"prompts": len(prompts) // args.each, "each": args.each}
    rows, drawn = [], []
    for w in args.scales:
        guidance = one_pass.scaled(one_pass.dial.strength(w))
        pairs = {"coupled": [coupled.scaled((w - 1) / (args.guidance - 1))], "added": [guidance, steps]}
        pairs |= {"one-pass student": [guidance]}
        teacher = sd.sample(prompts, steps=args.teacher_steps, guidance=w, **SAMPLING)
        images = {f"teacher, {args.teacher_steps} steps": (teacher, 2 * args.teacher_steps)}
        images["teacher"] = sd.sample(prompts, steps=N, guidance=w, **SAMPLING), 2 * N
        for name, loras in pairs.items():
            images[name] = load_merged(loras, args).sample(prompts, steps=N, guidance=1, **SAMPLING), N
        for name, (sampled, calls) in images.items():
            row = {"way": f"w = {w:g}: {name}", "calls": calls, "measures": measures(sampled, teacher)}
            rows.append(row | {"guidance": w, "seconds of learning": 0.0})
            drawn.append(Drawn(rows[-1]["way"], sampled[:: args.each], calls, 0.0))
        write_json(args.out / f"steering-{N}.json", report | {"rows": rows})
        write_grid(args.out / f"steering-{N}.png", drawn, prompts[:: args.each], columns=6, side=96)
    print(f"{table(rows)}\n\nImages and JSON: {args.out}")
