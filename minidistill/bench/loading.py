"""How fast Stable Diffusion 1.5 loads from a single file, and in how much memory, against what no loader can avoid.

  python -m minidistill.bench loading                    random weights, two files of 4 GB in a temporary folder
  python -m minidistill.bench loading --dtype bfloat16

That lower bound is safetensors' load_file, touching every page, and casting. Each turn is a process of its own and
starts after its imports, with the file in the system's cache. The loaders take turns, and medians are compared. Weights
that are mapped from the file are touched too, so they count as memory.
"""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from minidistill.bench.output import add_out_flag, device_name, megabytes, new_report, save_report
from minidistill.bench.peak_memory import in_fresh_process, resident
from minidistill.bench.workloads import SIZES, Setup, Size
from minidistill.evaluate.tables import markdown_table
from minidistill.formats.load_model import load
from minidistill.formats.single_file import to_single_file
from minidistill.training.command_line import positive_int
from minidistill.unet import UNet
from minidistill.vae import VAE

DTYPES = ("float32", "bfloat16", "float16")


def add_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--held", nargs="+", choices=DTYPES, default=["float32", "float16"], help="dtypes of the weights in the files")
    add("--dtype", choices=DTYPES, default="float32", help="the dtype to load them in (default: %(default)s)")
    add("--repeats", type=positive_int, default=3, metavar="N", help="turns of each loader (default: %(default)s)")
    add_out_flag(parser, "results/load.json")


def random_tensors(setup: Setup) -> dict[str, Tensor]:
    """A Stable Diffusion of random weights, as a single file holds it."""
    size = setup.size
    makes = (lambda: UNet(size.unet), lambda: VAE(size.vae), lambda: CLIPTextModel(size.text))
    unet, vae, text = (setup.random_weights(make, torch.contiguous_format) for make in makes)
    return to_single_file(unet, size.unet, vae, size.vae, (text, size.text))


def write_files(folder: Path, dtype: torch.dtype, size: Size = SIZES["sd15"]) -> list[Path]:
    """The same random weights as .safetensors and as .ckpt."""
    tensors = random_tensors(Setup(size, torch.device("cpu"), dtype, rank=1))
    save_file(tensors, folder / "model.safetensors")
    torch.save({"state_dict": tensors}, folder / "model.ckpt")
    return [folder / "model.safetensors", folder / "model.ckpt"]


def touch(tensors: Iterable[Tensor]) -> None:
    """Read one number of every memory page, whatever order the dimensions are stored in."""
    for tensor in tensors:
        tensor.as_strided((tensor.numel(),), (1,))[:: 4096 // tensor.itemsize].sum()


def take_turn(file: Path, who: str, dtype: torch.dtype) -> dict[str, float]:
    """Load a file. Returns the seconds, and bytes: the peak of this process, all weights, the largest tensor.

    The peak is what is added to the memory that the process had before.
    """
    before, start = resident("VmRSS"), time.perf_counter()
    if who == "ours":
        sd = load(file, dtype=dtype)
        tensors = [p for network in (sd.unet, sd.vae, sd.text_encoder) for p in network.parameters()]
        touch(tensors)
    else:
        stored = load_file(file)
        touch(stored.values())
        tensors = [tensor.to(dtype) for tensor in stored.values()]
    seconds = time.perf_counter() - start
    sizes = [tensor.nbytes for tensor in tensors]
    return {"seconds": seconds, "peak": resident("VmHWM") - before, "weights": sum(sizes), "largest": max(sizes)}


def measure(held: str, asked: str, repeats: int) -> list[dict]:
    """A row per file format: medians over the turns, and those of safetensors."""
    with TemporaryDirectory() as folder:
        files = write_files(Path(folder), getattr(torch, held))
        loaders = {file.suffix: ("ours", file) for file in files} | {"reference": ("safetensors", files[0])}
        turns: dict[str, list[dict]] = {name: [] for name in loaders}
        for turn in range(repeats + 1):
            for name, (who, file) in loaders.items():
                result = in_fresh_process(take_turn, file, who, getattr(torch, asked))
                if turn > 0:  # the first brings the file into the system's cache
                    turns[name].append(result)
    medians = {name: {key: median(t[key] for t in results) for key in results[0]} for name, results in turns.items()}
    reference = medians.pop("reference")
    return [
        {"held": held, "asked": asked, "form": form, **row, "reference": reference} for form, row in medians.items()
    ]


def markdown(rows: list[dict]) -> str:
    lines = [["SD 1.5", "stored as", "loaded as", "ours", "load_file", "peak MB", "/ weights", "its peak MB"]]
    for row in rows:
        reference = row["reference"]
        line = [row["form"], row["held"], row["asked"], f"{row['seconds']:.2f} s", f"{reference['seconds']:.2f} s"]
        line += [megabytes(row["peak"]), f"{row['peak'] / row['weights']:.2f}", megabytes(reference["peak"])]
        lines.append(line)
    return markdown_table(lines, text_columns=3)


def run(args: Namespace) -> None:
    report = new_report(args, device_name(torch.device("cpu")), rows=[])
    for held in args.held:
        report["rows"] += measure(held, args.dtype, args.repeats)
        save_report(report, args.out)
    print(f"\n{markdown(report['rows'])}\n")
    machine = f"{report['threads']} threads, {report['device']}, torch {report['torch']}"
    print(f"Medians of {args.repeats} turns, {machine}.")
