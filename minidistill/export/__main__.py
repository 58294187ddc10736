"""A LoRA for other tools: in the formats that they read, or merged into a whole checkpoint.

  python -m minidistill.export runs/NAME --to peft          for diffusers
  python -m minidistill.export runs/NAME --to kohya         for ComfyUI, AUTOMATIC1111 and diffusers
  python -m minidistill.export runs/NAME --to checkpoint --model MODEL      the student as a model of its own

A student has guidance in it: draw with a guidance scale (CFG) of 1.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from minidistill.formats.lora_files import student_and_styles
from minidistill.formats.lora_formats import LoRAFile, kohya_tensors, peft_tensors, read_run
from minidistill.formats.merged_checkpoint import with_loras, write_checkpoint
from minidistill.formats.tensor_files import write_tensors
from minidistill.training.settings import ScaledFile, one_sentence, parse, setting

FORMATS = ("peft", "kohya", "checkpoint")


@dataclass
class Settings:
    lora: list[ScaledFile] = setting(
        ...,
        "a run's folder or a LoRA file in any format, FILE:SCALE for more or less of it; a checkpoint takes several",
        "what",
        nargs="+",
        type=ScaledFile.parse,
        metavar="RUN_OR_LORA[:SCALE]",
    )
    to: str = setting(None, "for diffusers, for everybody, or a whole model", "what", required=True, choices=FORMATS)
    out: Path = setting(
        None, "file, or folder of a checkpoint that is no .safetensors (default: beside the LoRA)", "what", type=Path
    )
    model: Path = setting(
        Path("weights/pocket-emoji"), "folder, single file or hub id to merge into", "model of a checkpoint"
    )
    variant: str = setting(
        None, 'which weights of a folder or hub id, for example "fp16"', "model of a checkpoint", type=str
    )
    ema: bool = setting(False, "merge into the UNet's averaged copy of a single file", "model of a checkpoint")


def main(argv: list[str] | None = None) -> None:
    args = parse(Settings, __doc__, argv)
    files = [read_run(path, scale) for path, scale in args.lora]
    first = files[0].path
    suffix = "" if args.to == "checkpoint" and not args.model.is_file() else ".safetensors"
    out = args.out or first.with_name(f"{first.stem}-{args.to}{suffix}")
    if args.to == "checkpoint":
        student, styles = student_and_styles(files)
        metadata = plain_metadata(student) if student else {}
        change = with_loras([*styles, *([student] if student else [])])
        write_checkpoint(args.model, change, out, metadata, variant=args.variant, ema=args.ema)
    elif len(files) > 1:
        raise ValueError(f"--to {args.to} is of one LoRA: give them one by one, or --to checkpoint to merge them.")
    elif args.to == "peft":
        write_tensors(out, peft_tensors(files[0]), plain_metadata(files[0]))
    else:
        tensors = kohya_tensors(files[0])
        write_tensors(out, tensors, plain_metadata(files[0]) | kohya_metadata(files[0], tensors))
    print(f"Wrote {out}")


def plain_metadata(file: LoRAFile) -> dict[str, str]:
    """What the file says of itself, less what it says of alpha, which is in the tensors that are written.

    The guidance is that of the scale it was read at: half a student of guidance 4 is one of 2.5.
    """
    said = {key: value for key, value in file.metadata.items() if key not in ("alpha", "lora_adapter_metadata")}
    return said | ({"guidance": f"{file.guidance:g}"} if file.is_student else {})


SD_VERSIONS = {768: "sd_v1", 1024: "sd_v2"}  # by the width of the context


def kohya_metadata(file: LoRAFile, tensors: dict[str, Tensor]) -> dict[str, str]:
    """What kohya's scripts say in a header, as far as tools read it: AUTOMATIC1111 offers no LoRA without ss_v2 for
    SD 2, others show rank, alpha and base model."""
    ranks = {pair.rank for pair in file.layers.values()}
    alphas = {tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")}
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }
    if "base" in file.metadata:
        header["ss_sd_model_name"] = file.metadata["base"]
    widths = {pair.down.shape[1] for name, pair in file.layers.items() if name.endswith("attn2.to_k")}
    if version := SD_VERSIONS.get(max(widths, default=0)):
        v = "_v" if file.metadata.get("prediction") == "v" else ""
        header |= {"ss_base_model_version": version + v, "ss_v2": str(version == "sd_v2")}
    return header


if __name__ == "__main__":
    with one_sentence("minidistill.export", "stopped."):
        main()
