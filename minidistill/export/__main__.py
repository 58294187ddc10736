"""Export a LoRA for other tools: in the formats they read, or merged into a whole checkpoint.

  python -m minidistill.export runs/NAME --to peft          for diffusers
  python -m minidistill.export runs/NAME --to kohya         for ComfyUI, AUTOMATIC1111 and diffusers
  python -m minidistill.export runs/NAME --to checkpoint --model MODEL      the student as a model of its own

A student contains its guidance: sample with a guidance scale (CFG) of exactly 1. Even at 1.0000001 other tools call the
UNet twice a step.
"""

from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

from minidistill.formats.lora_formats import (
    UNET_PARTS,
    LoRAFile,
    context_widths,
    is_xl,
    kohya_tensors,
    peft_tensors,
    read_lora,
)
from minidistill.formats.lora_io import student_and_styles
from minidistill.formats.merged_checkpoint import with_loras, write_checkpoint
from minidistill.formats.tensor_files import without_hashes, write_tensors
from minidistill.lora import SURVIVING, Squares, surviving_change, warn_of_lost_change
from minidistill.training.command_line import DEFAULT_MODEL, ScaledFile, new_parser, one_line_errors, seed_number


def read_flags(argv: list[str] | None) -> Namespace:
    parser = new_parser(
        __doc__, "RUN_OR_LORA[:SCALE] ... --to {peft,kohya,checkpoint} ", "python -m minidistill.export"
    )
    # fmt: off
    flag = parser.add_argument
    flag("lora", nargs="+", type=ScaledFile.parse, metavar="RUN_OR_LORA[:SCALE]", help="a run's folder or a LoRA file "
         "in any format, and its strength; a checkpoint takes several")
    flag("--to", required=True, choices=("peft", "kohya", "checkpoint"), help="the format to write, see above")
    flag("--out", type=Path, metavar="PATH", help="the file to write; for a checkpoint a folder, or a .safetensors "
         "(default: next to the LoRA)")
    flag = parser.add_argument_group("the model that --to checkpoint merges into").add_argument
    flag("--model", type=Path, default=DEFAULT_MODEL, metavar="PATH", help="a folder, a single file or a hub id "
         "(default: %(default)s)")
    flag("--variant", metavar="TEXT", help='which weights of a folder or hub id, for example "fp16"')
    flag("--ema", action="store_true", help="merge into the UNet's EMA weights, for a single file")
    flag("--prediction", choices=("eps", "v"), help="what the UNet predicts, if not what the model says")
    flag("--stochastic", type=seed_number, nargs="?", const=0, metavar="SEED", help="round the merged weights up or "
         "down at random, so that small changes survive in 16 bits (seed: 0)")
    # fmt: on
    args = parser.parse_args(argv)
    merges = args.variant, args.ema or None, args.prediction, args.stochastic
    if args.to != "checkpoint" and any(flag is not None for flag in merges):
        raise ValueError(
            "--variant, --ema, --prediction and --stochastic are for a merge: give them with --to checkpoint."
        )
    return args


def main(argv: list[str] | None = None) -> None:
    args = read_flags(argv)
    files = [read_lora(path, scale) for path, scale in args.lora]
    first = files[0].path
    suffix = "" if args.to == "checkpoint" and not args.model.is_file() else ".safetensors"
    out = args.out or first.with_name(f"{first.stem}-{args.to}{suffix}")
    if out.suffix.lower() in (".ckpt", ".bin", ".pt", ".pth") or (args.to != "checkpoint" and out.is_dir()):
        raise ValueError(f"--out {out}: name a .safetensors file{' or a folder' if args.to == 'checkpoint' else ''}.")
    if out.resolve() in [path.resolve() for path in (args.model, *(file.path for file in files))]:
        raise ValueError(f"--out {out} would be written over what it is made from: name another.")
    if args.to == "checkpoint":
        merge(files, out, args)
    elif len(files) == 1:
        convert(files[0], out, args.to)
    else:
        raise ValueError(f"--to {args.to} takes one LoRA: give them one by one, or merge them with --to checkpoint.")


def merge(files: list[LoRAFile], out: Path, args: Namespace) -> None:
    """Write the model with the LoRAs merged into its UNet, and say how much of the change survives."""
    student, styles = student_and_styles(files)
    metadata = plain_metadata(student) if student else {}
    squares: Squares = {}
    generator = torch.Generator().manual_seed(args.stochastic) if args.stochastic is not None else None
    which = dict(variant=args.variant, ema=args.ema, prediction=args.prediction)
    change = with_loras([*styles, student] if student else styles, squares, generator)
    write_checkpoint(args.model, change, out, metadata, **which)
    share, sentence = surviving_change(squares)
    if generator:  # what was added is the change and independent noise, whose squares add up
        noise = max(share**2 - 1, 0) ** 0.5
        print(f"The change survives on average, with noise of {noise:.0%} of its norm.")
    elif warn_of_lost_change(squares) >= SURVIVING:  # otherwise the warning says it
        print(sentence)
    print(f"Wrote {out}")


def convert(file: LoRAFile, out: Path, to: str) -> None:
    """Write the LoRA in peft's or kohya's format, and say at which strengths it stands for which guidance.

    Raises ValueError for layers that no UNet has: other tools would leave them out in silence.
    """
    if other := next((name for name in file.layers if name.partition(".")[0] not in UNET_PARTS), None):
        raise ValueError(
            f"{file.path} is a LoRA for another kind of model, such as Flux or SD 3 (it was made for {file.base}): no "
            f"UNet of SD 1.x, 2.x or XL has {other}."
        )
    metadata = plain_metadata(file)
    if to == "peft":
        tensors = peft_tensors(file)
    else:
        tensors = kohya_tensors(file)
        metadata |= kohya_metadata(file, tensors)
    write_tensors(out, tensors, metadata)
    print(f"Wrote {out}")
    if "dial" in metadata:
        strengths = ", ".join(f"{strength:g} ({guidance:g})" for guidance, strength in file.dial.points)
        print(f"Strengths of the LoRA, each with the guidance that it stands for: {strengths}")


def plain_metadata(file: LoRAFile) -> dict[str, str]:
    """The file's metadata without alpha, which the exported tensors contain.

    The guidance is adjusted to the strength of the LoRA: half a student of guidance 4 is a student of 2.5. Its dial was
    measured at full strength.
    """
    without = {"alpha", "lora_adapter_metadata"} | ({"dial"} if file.scale != 1 else set())
    metadata = {key: value for key, value in without_hashes(file.metadata).items() if key not in without}
    if not file.is_student:
        return metadata
    hint = "guidance scale (CFG) exactly 1, no negative prompt"
    if file.skips_steps:
        hint += f", {file.few_steps[0]} steps with trailing spacing"
    return metadata | {"guidance": f"{file.guidance:g}", "modelspec.usage_hint": hint}


SD_VERSIONS = {768: "sd_v1", 1024: "sd_v2"}  # by context width


def kohya_metadata(file: LoRAFile, tensors: dict[str, Tensor]) -> dict[str, str]:
    """The metadata of kohya's scripts, as far as tools read it.

    Without the version, AUTOMATIC1111 does not offer a LoRA for SD 2 or XL; other tools show rank, alpha and base.
    """
    ranks = {pair.rank for pair in file.layers.values()}
    alpha = next(tensor for key, tensor in tensors.items() if key.endswith(".alpha")).item()  # all layers have the same
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alpha:g}",
    }
    if "base" in file.metadata:
        header["ss_sd_model_name"] = file.metadata["base"]
    if is_xl(file.layers):
        return header | {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}
    if version := SD_VERSIONS.get(max(context_widths(file.layers), default=0)):
        v = "_v" if file.metadata.get("prediction") == "v" else ""
        header |= {"ss_base_model_version": version + v, "ss_v2": str(version == "sd_v2")}
    return header


if __name__ == "__main__":
    with one_line_errors("minidistill.export", "stopped."):
        main()
