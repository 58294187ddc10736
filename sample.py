"""Sample images with Stable Diffusion: guided, two UNet calls a step; or with a distilled LoRA, one call a step.

  python sample.py "a rocket on a purple background" --compare
  python sample.py "a red apple" "a green pear" --model FOLDER --lora runs/NAME/lora.safetensors

A LoRA that says which guidance it has learned is the student. Any other is a style: it is merged into the weights, and
teacher and student both sample in it.
"""

import argparse
import io
import re
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from minidistill import load
from minidistill.evaluate import comparison_grid, draw
from minidistill.formats.files import atomic_write, digest
from minidistill.formats.float8 import merge_to_sample
from minidistill.formats.lora_formats import LoRAFile, read_lora
from minidistill.formats.lora_io import add_student, merge_file, student_and_styles
from minidistill.schedule import SPACINGS
from minidistill.training import command_line as cli

SHIPPED_LORA = "guidance-lora.safetensors"  # beside the model that ships


def main() -> None:
    args = parse()
    student, styles = student_and_styles([read_lora(*file) for file in args.lora or []])
    if args.compare and student is None:
        shipped = args.model / SHIPPED_LORA
        if not shipped.is_file():
            raise ValueError(f"--compare needs a student: there is no {shipped}, so name one with --lora.")
        student = read_lora(shipped)
    if styles and args.weights:
        raise ValueError(
            f"{styles[0].path} is a style, and nothing can be merged into --weights {args.weights}: merge it into the "
            "model first (python -m minidistill.export STYLE --to checkpoint --model MODEL)."
        )
    if student:
        student = at_strength(student, args)
    options = sampling_options(args, student)

    sd = load(args.model, **cli.load_options(args))
    cli.prepare(sd.device, compiled=False)
    if sd.few_steps:  # of a student that was merged into the model
        options["steps"] = args.steps or sd.few_steps[0]
        if sd.few_steps[0] < sd.few_steps[1] and args.spacing == "leading":
            raise ValueError(f"{args.model} was taught with trailing spacing: leave out --spacing leading.")
    cli.check_interval(args.interval, sd.schedule.timesteps(options["steps"], options["spacing"]))
    for style in styles:
        merge_file(sd.unet, style)
    if student:
        add_student(sd, student)
    (args.out.parent if is_png(args.out) else args.out).mkdir(parents=True, exist_ok=True)
    if args.compare:
        sd.sample(args.prompt[:1], steps=1)  # not timed: first calls are slower
        teacher = draw(sd, "teacher", args.prompt, **options)
        merge_to_sample(sd.unet)
        rows = [teacher, draw(sd, "student", args.prompt, **options)]
        words = words_for_name("\n".join(args.prompt))
        out = args.out if is_png(args.out) else args.out / f"compare-{args.seed}-{words}.png"
        save(comparison_grid(rows, args.prompt, columns=len(args.prompt)), out, "")  # replaces an older comparison
        return
    if student:
        merge_to_sample(sd.unet)
    one_batch = len(args.prompt) <= args.batch  # its bar counts steps; the bar of several batches counts batches
    for first in tqdm(range(0, len(args.prompt), args.batch), unit="batch", disable=one_batch):
        prompts, seed = args.prompt[first : first + args.batch], args.seed + first
        options |= dict(seed=seed, progress=one_batch)
        images = draw(sd, "student" if student else "teacher", prompts, **options).images
        for i, (image, prompt) in enumerate(zip(images, prompts)):
            save(image, args.out, f"{seed + i}-{words_for_name(prompt)}")


def words_for_name(prompt: str) -> str:
    """The prompt as part of a file's name. If that leaves something out, a digest keeps two prompts apart."""
    words = re.sub("[^a-z0-9]+", "-", prompt.lower())[:60].strip("-")
    return words if words.replace("-", " ") == prompt else f"{words}-{digest(prompt.encode())[:8]}".strip("-")


def is_png(out: Path) -> bool:
    """True for one file, False for a folder. Raises ValueError for a file in another format."""
    suffix = out.suffix.lower()
    if out.is_dir() or suffix not in Image.registered_extensions():
        return False
    if suffix != ".png":
        raise ValueError(f"--out {out}: images are written as .png only. Name a .png file, or a folder.")
    return True


def at_strength(student: LoRAFile, args: argparse.Namespace) -> LoRAFile:
    """The student at the strength that --lora-scale gives, or that stands for --guidance."""
    if args.guidance is not None and args.lora_scale != 1:
        raise ValueError("--guidance and --lora-scale turn the same dial: give one of them.")
    if args.guidance in (None, student.guidance):
        return student.scaled(args.lora_scale)
    if student.scale != 1 or student.dial is None:
        raise ValueError(
            f"{student.path} at strength {student.scale:g} samples only at the guidance it has learned: leave out "
            "--guidance. Other scales need a student that has learned guidance above 1, at strength 1, with as many "
            "steps as its teacher."
        )
    return student.scaled(student.dial.strength(args.guidance))


def sampling_options(args: argparse.Namespace, student: LoRAFile | None) -> dict:
    """How to sample. The teacher takes the guidance, negative prompt and interval of a student beside it.

    A student is led away from a negative prompt that it has not learned. Raises ValueError for flags that do not fit.
    """
    guidance, student_negative = cli.DEFAULT_GUIDANCE, None
    negative_prompt, interval = args.negative_prompt, args.interval
    if student is None:
        if args.lora_scale != 1:
            raise ValueError("--lora-scale is the strength of a student: name its file with --lora.")
        if args.guidance == 1 and (negative_prompt or interval or args.selective):
            raise ValueError("--guidance 1 is no guidance: leave out --negative-prompt, --interval and --selective.")
    else:
        guidance, learned = student.guidance, student.metadata.get("negative_prompt")
        negative_prompt = learned if negative_prompt is None else negative_prompt
        student_negative = None if negative_prompt == learned else negative_prompt
        if student_negative == "" and learned:
            raise ValueError(f'{student.path} has learned to avoid "{learned}" for good: leave out --negative-prompt.')
        if not args.compare and (interval or args.selective):
            raise ValueError(
                "--interval and --selective are the teacher's; a LoRA has learned its own: leave them out."
            )
        guided_elsewhere = interval not in (None, student.interval) or (args.selective and student.interval)
        another_negative = student_negative == "" or (student_negative and learned)
        if args.compare and (another_negative or guided_elsewhere):
            away = "no negative prompt" if learned is None else f'negative prompt "{learned}"'
            where = f", interval {student.interval.low:g} to {student.interval.high:g}" if student.interval else ""
            raise ValueError(
                f"{student.path} has learned guidance {guidance:g} with {away}{where}: the teacher beside it must have "
                "the same."
            )
        interval = student.interval
    guidance = guidance if args.guidance is None else args.guidance
    steps, student_steps = args.steps or 25, None
    if student and student.few_steps:
        student_steps, steps = student.few_steps
        if not student.skips_steps:  # it takes the steps that its teacher takes
            steps = args.steps or steps
        elif args.spacing == "leading":
            raise ValueError(f"{student.path} was taught with trailing spacing: leave out --spacing leading.")
        student_steps = args.steps or student_steps
    return dict(
        steps=steps, student_steps=student_steps, guidance=guidance,
        spacing=args.spacing or ("trailing" if student_steps else None),
        negative_prompt=negative_prompt, student_negative=student_negative,
        interval=interval, selective=args.selective, seed=args.seed, batch=args.batch, progress=True,
    )  # fmt: skip


def save(image: Image.Image, out: Path, name: str) -> None:
    """Write the image to the file ``out``, or into the folder ``out`` as NAME.png, NAME-2.png if another has that."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    path = out
    if not is_png(out):
        path, n = out / f"{name}.png", 1
        while path.exists() and path.read_bytes() != buffer.getvalue():
            n += 1
            path = out / f"{name}-{n}.png"
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    tqdm.write(f"Wrote {path}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises ValueError for flags that contradict each other."""
    parser = cli.new_parser(__doc__, positional="PROMPT ... ")
    n = dict(type=cli.positive_int, metavar="N")
    # fmt: off
    add = parser.add_argument_group("what to sample").add_argument
    add("prompt", nargs="+", metavar="PROMPT", help="what the image shows; one image for each prompt")
    add("--negative-prompt", metavar="TEXT", help="what to lead the image away from: by guidance, or for a "
        "student in cross-attention (default: none beyond what the student has learned)")
    add("--seed", type=cli.seed_number, default=0, metavar="N", help="seed of the first image's noise; each "
        "further image has the next (default: %(default)s)")
    add("--out", type=Path, default=Path("samples"), metavar="PATH", help="folder for the images, where another one of "
        "the same name gets a number, or one .png file (default: %(default)s)")
    add("--compare", action="store_true", help="teacher beside student, same seeds, with what each cost")
    add = cli.add_model_flags(parser).add_argument
    add("--lora", type=cli.ScaledFile.parse, action="append", metavar="RUN_OR_LORA[:SCALE]", help="a "
        "distilled LoRA (default with --compare: the one beside the model) or a style; give the flag once for each")
    add("--lora-scale", type=cli.positive, default=1.0, metavar="X", help="strength of the student's LoRA, a "
        "dial: 0.5 stands roughly for guidance 1 + 0.5 (s - 1), where s is the scale it has learned; --guidance is "
        "more exact (default: %(default)s)")
    add = parser.add_argument_group("how to sample").add_argument
    add("--guidance", type=cli.finite, metavar="X", help="guidance scale; 7.5 is usual for large models, and exactly 1 "
        f"is none, with one UNet call a step (default: {cli.DEFAULT_GUIDANCE:g}; with a LoRA the scale it has learned; "
        "others set its strength, as measured)")
    add("--selective", type=cli.fraction, default=0.0, metavar="SHARE", help="the teacher goes without guidance "
        "on this share of the steps, the last ones (default: %(default)s)")
    add("--interval", type=cli.finite, nargs=2, metavar=("LOW", "HIGH"), help="the teacher is guided only at "
        "time steps t from LOW to HIGH (default: at every step; with --compare the LoRA's own)")
    add("--steps", **n, help="DDIM steps; with a LoRA of few steps the student's (default: as many as it was taught, "
        "else 25)")
    add("--spacing", choices=SPACINGS, help="how time steps are spaced: leading, Stable Diffusion's own, or trailing, "
        "which is better for few steps (default: as the LoRA was taught, else the model's own)")
    add("--batch", **n, default=8, help="images sampled at once (default: %(default)s)")
    # fmt: on
    args = parser.parse_args(argv)
    args.interval = cli.read_interval(args.interval)
    if args.interval and args.selective:
        raise ValueError("--selective is an interval of its own: give one of --selective and --interval.")
    if is_png(args.out) and len(args.prompt) > 1 and not args.compare:
        raise ValueError(f"--out {args.out} is one file, for {len(args.prompt)} images: name a folder.")
    return args


if __name__ == "__main__":
    with cli.one_line_errors(
        "sample.py", "stopped.", "Try, in this order: --batch 1; --dtype float16 (on a CPU bfloat16)."
    ):
        main()
