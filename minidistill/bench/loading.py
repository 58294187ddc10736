"""How fast Stable Diffusion 1.5 loads, and in how much memory, beside what no loader can do without.

  python -m minidistill.bench.loading                    random weights, twice 4 GB, in a temporary folder
  python -m minidistill.bench.loading --dtype bfloat16

That is safetensors' own load_file, then touching every page and casting. Each turn is a process of its own, after its
imports, with the file in the system's cache; the two take turns, and medians are compared. Weights that stay mapped are
touched too, and count as memory.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from minidistill.bench.speed import resident
from minidistill.bench.timing import device_name
from minidistill.config import SD15_UNET, SD15_VAE, UNetConfig, VAEConfig
from minidistill.formats.checkpoint import read_checkpoint
from minidistill.formats.model_configs import write_json
from minidistill.formats.single_file import to_single_file
from minidistill.training.settings import count, made_by, one_sentence, parse, setting
from minidistill.unet import UNet
from minidistill.vae import VAE

SD15_TEXT = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Settings:
    held: list[str] = setting(
        None, "dtypes of the files (default: float32 float16)", type=str, nargs="+", choices=DTYPES
    )
    dtype: str = setting("float32", "the dtype asked for", choices=DTYPES)
    repeats: int = setting(3, "turns of each", type=count)
    out: Path = setting(Path("results/load.json"), "where the measurements go as JSON")
    turn: list[str] = setting(None, "only one turn, of FILE by ours or safetensors: what the others are", nargs=2)


def random_state(make: Callable[[], nn.Module], dtype: torch.dtype) -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in make().state_dict().items()}
    return {name: torch.rand(shape, dtype=dtype) for name, shape in shapes.items()}


def write_files(
    folder: Path, dtype: torch.dtype, unet: UNetConfig = SD15_UNET, vae: VAEConfig = SD15_VAE, text=SD15_TEXT
) -> list[Path]:
    """The same random weights as .safetensors and as .ckpt."""
    states = [random_state(make, dtype) for make in (lambda: UNet(unet), lambda: VAE(vae), lambda: CLIPTextModel(text))]
    tensors = to_single_file(states[0], unet, states[1], vae, states[2], text)
    save_file(tensors, folder / "model.safetensors")
    torch.save({"state_dict": tensors}, folder / "model.ckpt")
    return [folder / "model.safetensors", folder / "model.ckpt"]


def touch(tensors: Iterable[Tensor]) -> None:
    """Read a number of every page, in whatever order a tensor's dimensions are laid out."""
    for tensor in tensors:
        tensor.as_strided((tensor.numel(),), (1,))[:: 4096 // tensor.itemsize].sum()


def take_turn(file: Path, who: str, dtype: torch.dtype) -> dict[str, float]:
    """Seconds, and bytes: at the most beyond what the process held before; of the weights, of the largest of them."""
    before, start = resident("VmRSS"), time.perf_counter()
    if who == "ours":
        checkpoint = read_checkpoint(file, dtype)
        parts = (checkpoint.unet, checkpoint.vae, checkpoint.text_encoder)
        tensors = [p for part in parts for p in part.parameters()]
        touch(tensors)
    else:
        held = load_file(file)
        touch(held.values())
        tensors = [tensor.to(dtype) for tensor in held.values()]
    seconds = time.perf_counter() - start
    sizes = [tensor.nbytes for tensor in tensors]
    return {"seconds": seconds, "peak": resident("VmHWM") - before, "weights": sum(sizes), "largest": max(sizes)}


def turn_elsewhere(file: Path, who: str, dtype: str) -> dict[str, float]:
    command = [sys.executable, "-m", "minidistill.bench.loading", "--turn", str(file), who, "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{file.name} could not be loaded by {who}:\n{done.stderr}")
    return json.loads(done.stdout)


def measure(held: str, asked: str, repeats: int) -> list[dict]:
    """A row for each form of file: medians of the turns."""
    with TemporaryDirectory() as folder:
        files = write_files(Path(folder), getattr(torch, held))
        contestants = {f"ours, {file.suffix}": ("ours", file) for file in files}
        contestants["safetensors"] = "safetensors", files[0]
        turns: dict[str, list[dict]] = {name: [] for name in contestants}
        for turn in range(repeats + 1):
            for name, (who, file) in contestants.items():
                taken = turn_elsewhere(file, who, asked)
                turns[name] += [taken] if turn else []  # the first brings the file into the system's cache
    middle = {name: {key: median(t[key] for t in taken) for key in taken[0]} for name, taken in turns.items()}
    reference = middle.pop("safetensors")
    return [
        {"held": held, "asked": asked, "form": name.removeprefix("ours, "), **row, "reference": reference}
        for name, row in middle.items()
    ]


def markdown(rows: list[dict]) -> str:
    lines = [
        "| SD 1.5 | held | asked for | ours | load_file, touch, cast | peak MB | of the weights | its peak MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['form']} | {row['held']} | {row['asked']} | {row['seconds']:.2f} s "
            f"| {row['reference']['seconds']:.2f} s | {row['peak'] / 1e6:,.0f} | {row['peak'] / row['weights']:.2f} "
            f"| {row['reference']['peak'] / 1e6:,.0f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(Settings, __doc__, argv)
    if args.turn:
        print(json.dumps(take_turn(Path(args.turn[0]), args.turn[1], getattr(torch, args.dtype))))
        return
    rows = [row for held in args.held or ("float32", "float16") for row in measure(held, args.dtype, args.repeats)]
    print(markdown(rows))
    device = device_name(torch.device("cpu"))
    print(f"\nMedians of {args.repeats} turns, {torch.get_num_threads()} threads, {device}, torch {torch.__version__}.")
    report = made_by("minidistill.bench.loading", argv) | {"device": device, "threads": torch.get_num_threads()}
    report |= {"torch": torch.__version__, "rows": rows}
    write_json(args.out, report)
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    with one_sentence("minidistill.bench.loading", "stopped."):
        main()
