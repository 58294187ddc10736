"""A LoRA for other tools: in the formats that they read, or merged into a whole checkpoint.

  python -m minidistill.export runs/NAME --to peft          for diffusers
  python -m minidistill.export runs/NAME --to kohya         for ComfyUI, AUTOMATIC1111 and diffusers
  python -m minidistill.export runs/NAME --to checkpoint --model FOLDER     the student as a model of its own

A student has guidance in it: draw with a guidance scale (CFG) of 1.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from minidistill.checkpoint import read_weights
from minidistill.files import CheckpointError, folder_written_whole
from minidistill.layout import MODEL_INDEX, read_json, write_json
from minidistill.lora_files import check_fit, student_and_styles
from minidistill.lora_formats import LoRAFile, kohya_tensors, peft_tensors, read_lora, write_tensors
from minidistill.settings import ScaledFile, parse, setting


@dataclass
class Settings:
    lora: list[ScaledFile] = setting(
        ...,
        "a run's folder or a LoRA file in any format, FILE:SCALE for more or less of it; a checkpoint takes several",
        nargs="+",
        type=ScaledFile.parse,
        metavar="RUN_OR_LORA[:SCALE]",
    )
    to: str = setting(None, "what to write", required=True, choices=("peft", "kohya", "checkpoint"))
    out: Path = setting(None, "file, or folder of a checkpoint (default: beside the LoRA)", type=Path)
    model: Path = setting(Path("weights/pocket-emoji"), "Stable Diffusion to merge into, for a checkpoint")


def main(argv: list[str] | None = None) -> None:
    args = parse(Settings, __doc__, argv)
    files = [read_lora(path / "lora.safetensors" if path.is_dir() else path, scale) for path, scale in args.lora]
    first = files[0].path
    out = args.out or first.with_name(f"{first.stem}-{args.to}{'' if args.to == 'checkpoint' else '.safetensors'}")
    if args.to == "checkpoint":
        write_folder(args.model, files, out)
    elif len(files) > 1:
        raise ValueError(f"--to {args.to} is of one LoRA: give them one by one, or --to checkpoint to merge them.")
    elif args.to == "peft":
        write_tensors(out, peft_tensors(files[0]), plain_metadata(files[0]))
    else:
        tensors = kohya_tensors(files[0])
        write_tensors(out, tensors, plain_metadata(files[0]) | kohya_metadata(files[0], tensors))
    print(f"Wrote {out}")


def plain_metadata(file: LoRAFile) -> dict[str, str]:
    """What the file says of itself, less what it says of alpha, which is in the tensors that are written."""
    return {key: value for key, value in file.metadata.items() if key not in ("alpha", "lora_adapter_metadata")}


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


def write_folder(source: Path, files: list[LoRAFile], out: Path) -> None:
    """The model folder ``source`` with the LoRAs merged into its UNet, dtype kept; all other parts as they are."""
    student, styles = student_and_styles(files)
    tensors, weights_file = read_weights(source / "unet", "diffusion_pytorch_model")
    for file in [*styles, *([student] if student else [])]:
        check_fit(file, tensors)
        tensors |= {f"{name}.weight": pair.added_to(tensors[f"{name}.weight"]) for name, pair in file.layers.items()}
    # Only the parts of the pipeline: beside them people keep other weights, which would not be merged.
    index = read_json(source / "model_index.json") if (source / "model_index.json").exists() else MODEL_INDEX
    with folder_written_whole(out) as beside:
        for part in source.iterdir():
            if part.is_dir() and part.name in index and part.name != "unet":
                shutil.copytree(part, beside / part.name)
        (beside / "unet").mkdir()
        shutil.copy(source / "unet/config.json", beside / "unet/config.json")
        save_file(tensors, beside / "unet" / weights_file.name, {"format": "pt"})
        write_json(beside / "model_index.json", index)
        card = {"base": source.resolve().name, "merged": [file.path.name for file in files]} | (
            plain_metadata(student) | {"draw with guidance": "1"} if student else {}
        )
        (beside / "README.md").write_text(
            f"# {out.name}\n\nMade by minidistill.\n\n```json\n{json.dumps(card, indent=2)}\n```\n", encoding="utf-8"
        )


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, ValueError, OSError) as error:
        sys.exit(f"minidistill.export: {error}")
