"""The JSON file that a benchmark writes."""

from argparse import Namespace
from pathlib import Path

import torch

from minidistill.formats.model_configs import write_json
from minidistill.training.settings import provenance


def new_report(args: Namespace, device: str, **facts: object) -> dict:
    """What every report begins with: the command, the git commit, the machine; then ``facts``."""
    machine = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return provenance(f"-m minidistill.bench {args.command}", args.argv) | machine | facts


def save_report(report: dict, out: Path) -> None:
    write_json(out, report)
    print(f"Wrote {out}", flush=True)
