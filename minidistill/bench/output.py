"""The JSON file that a benchmark writes, and the machine it was measured on."""

import platform
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

from minidistill.formats.files import write_json
from minidistill.training.command_line import out_file


def add_out_flag(parser: ArgumentParser, default: str) -> None:
    out = "JSON file for the measurements (default: %(default)s)"
    parser.add_argument("--out", type=out_file, default=default, metavar="FILE", help=out)


def find_device(name: str, needed: bool = True) -> torch.device:
    """The device called ``name``. Raises ValueError for no device, and for a CUDA device that is needed and absent."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if needed and device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here: use --device cpu.")
    return device


def device_name(device: torch.device) -> str:
    """The model of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return models[0].split(": ")[1] if models else platform.processor() or platform.machine()


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f}"


def new_report(args: Namespace, device: str, **facts: object) -> dict:
    """What every report begins with: the command, the git commit, the machine; then ``facts``."""
    machine = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return args.provenance | machine | facts


def save_so_far(report: dict, out: Path) -> None:
    """Keep the measurements so far; ``evaluate summary`` refuses them, as a table may lack rows and columns."""
    write_json(out, report | {"partial": True})


def save_report(report: dict, out: Path) -> None:
    write_json(out, report)
    print(f"Wrote {out}", flush=True)
