"""Draw pictures with Stable Diffusion: guided, two UNet calls a step; or with a distilled LoRA, one call a step.

  python sample.py "a rocket on a purple background" --compare
  python sample.py "a red apple" "a green pear" --model FOLDER --lora runs/NAME/lora.safetensors

A LoRA that says which guidance it has learned is the student. Any other is a style, merged into the weights: teacher
and student draw in it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from minidistill import load, merge_lora
from minidistill.evaluate import comparison_grid, draw
from minidistill.formats.files import written_whole
from minidistill.formats.lora_files import inject_file, merge_file, student_and_styles
from minidistill.formats.lora_formats import read_lora, read_run
from minidistill.training.settings import (
    ModelSettings,
    ScaledFile,
    count,
    finite,
    one_sentence,
    parse,
    positive,
    seed_number,
    setting,
    share,
)

SHIPPED_LORA = "guidance-lora.safetensors"  # beside the model that ships


@dataclass
class Settings(ModelSettings):
    prompt: list[str] = setting(..., "what to draw: a picture for each", "what", nargs="+")
    negative_prompt: str = setting("", "what guidance leads away from", "what")
    seed: int = setting(0, "seed of the first picture's noise; each further one has the next", "what", type=seed_number)
    out: Path = setting(Path("samples"), "folder for the pictures, or one .png file", "what")
    compare: bool = setting(False, "teacher beside student, same seeds, with what each cost", "what")
    lora: list[ScaledFile] = setting(
        None,
        "a distilled LoRA (--compare: default is the one beside the model), a style, or each with a --lora of its own",
        "model",
        type=ScaledFile.parse,
        action="append",
        metavar="RUN_OR_LORA[:SCALE]",
    )
    lora_scale: float = setting(
        1.0,
        "strength of the student's LoRA, a dial: 0.5 draws about as guidance 1 + 0.5 (s - 1) would",
        "model",
        type=positive,
    )
    guidance: float = setting(
        None,
        "guidance scale; 7.5 is usual for the large models (default: 2.5; with --compare the LoRA's own)",
        "how",
        type=finite,
    )
    selective: float = setting(
        0.0, "the teacher does without guidance on this share of the steps, the last ones", "how", type=share
    )
    steps: int = setting(25, "DDIM steps", "how", type=count)
    batch: int = setting(8, "pictures drawn at once", "how", type=count)


def main() -> None:
    args = parse(Settings, __doc__)
    one_file = args.out.suffix == ".png"
    if one_file and len(args.prompt) > 1 and not args.compare:
        raise ValueError(f"--out {args.out} is one file for {len(args.prompt)} pictures: name a folder.")
    student, styles = student_and_styles([read_run(*file) for file in args.lora or []])
    if args.compare and student is None:
        shipped = args.model / SHIPPED_LORA
        if not shipped.is_file():
            raise ValueError(f"--compare needs a student: there is no {shipped}, so name one with --lora.")
        student = read_lora(shipped)
    if student is None and args.lora_scale != 1:
        raise ValueError("--lora-scale is the strength of a student: give its --lora.")
    if student and not args.compare and (args.guidance is not None or args.negative_prompt or args.selective):
        raise ValueError(
            "--guidance, --negative-prompt and --selective are the teacher's; a LoRA has learned its own: "
            "leave them out."
        )
    learned, learned_negative = 2.5, ""
    if student:
        student = student.scaled(args.lora_scale)
        learned = student.guidance
        learned_negative = student.metadata.get("negative_prompt", "")
    guidance = args.guidance if args.guidance is not None else learned
    negative_prompt = args.negative_prompt or learned_negative
    if student and (guidance, negative_prompt) != (learned, learned_negative):
        raise ValueError(
            f"{student.path} has learned guidance {learned:g} with the negative prompt "
            f'"{learned_negative}": beside it the teacher can have no other.'
        )

    sd = load(args.model, **args.load_options())
    options = dict(steps=args.steps, guidance=guidance, negative_prompt=negative_prompt, selective=args.selective)
    options |= dict(seed=args.seed, batch=args.batch, progress=True)
    for style in styles:
        merge_file(sd.unet, style)
    if student is None:
        pictures = draw(sd, "teacher", args.prompt, **options).images
    else:
        sd.unet = inject_file(sd.unet, student)
        if args.compare:
            sd.sample(args.prompt[:1], steps=1)  # the first calls of everything are slower: off the clock
        rows = [draw(sd, "teacher", args.prompt, **options)] if args.compare else []
        merge_lora(sd.unet)
        rows.append(draw(sd, "student", args.prompt, **options))
        pictures = [comparison_grid(rows, args.prompt, columns=len(args.prompt))] if args.compare else rows[0].images

    for i, (picture, prompt) in enumerate(zip(pictures, args.prompt)):
        name = (
            f"{'compare-' if args.compare else ''}{args.seed + i}-{re.sub('[^a-z0-9]+', '-', prompt.lower())[:60]}.png"
        )
        save(picture, args.out if one_file else args.out / name)


def save(picture: Image.Image, path: Path) -> None:
    with written_whole(path) as beside:
        picture.save(beside, "png")
    print(f"Wrote {path}")


if __name__ == "__main__":
    with one_sentence("sample.py", "stopped.", "Try, in this order: --batch 1; --dtype float16 (on a CPU bfloat16)."):
        main()
