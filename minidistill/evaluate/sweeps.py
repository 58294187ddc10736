"""Measure what matters when training a student: vary one setting of train.py at a time, all others alike.

  python -m minidistill.evaluate sweeps                   all of them, in short runs: about 50 minutes on one CPU core
  python -m minidistill.evaluate sweeps rank --updates 400 --out runs/longer

Run from the repository root. Each value is a run of train.py in --runs, measured by the noise error share on held-out
prompts. Runs with the same teacher share its trajectories. Finished runs are not repeated.
"""

import shlex
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from minidistill.data.prompts import prompt_split, spread
from minidistill.data.shards import teacher_fingerprint
from minidistill.evaluate.figures import figure_file, plot_estimates
from minidistill.evaluate.metrics import Estimate, estimate, noise_error_share
from minidistill.evaluate.tables import markdown_table
from minidistill.formats.files import read_json, write_json
from minidistill.formats.load_model import load
from minidistill.formats.lora_formats import read_lora
from minidistill.formats.lora_io import add_student
from minidistill.lora import DEFAULT_TARGETS
from minidistill.training.command_line import (
    DEFAULT_DEVICE,
    DEFAULT_GUIDANCE,
    DEFAULT_MODEL,
    out_folder,
    positive,
    positive_int,
)

POSITIONAL = "[SWEEP ...] "
LAYERS = {  # patterns of layer names
    "attention": ["*.attn?.to_*"],  # as in the paper's code
    "linear": ["*.attn?.to_*", "*.ff.net.*", "*.time_emb_proj"],
    "linear and convolution": list(DEFAULT_TARGETS),
}
VALUES = {
    "rank": (1, 4, 16, 64),
    "layers": tuple(LAYERS),
    "guidance": (2, 4, 7.5, 10),
    "trajectories": (60, 120, 240, 480),
    "updates": (100, 200, 400, 800),
    "lr": (0.001, 0.002, 0.004),
    "weighting": ("even", "min-snr"),
}
STAMP = ("command", "prompts", "teacher")  # a row with the same stamp is not measured again


def add_flags(parser: ArgumentParser) -> None:
    flag = parser.add_argument
    flag("sweeps", nargs="*", metavar="SWEEP", help=f"any of {', '.join(VALUES)} (default: all)")
    flag("--model", type=Path, default=DEFAULT_MODEL, metavar="PATH", help="as in train.py (default: %(default)s)")
    flag("--prompts", type=positive_int, default=24, metavar="N", help="held-out prompts (default: %(default)s)")
    flag("--runs", type=out_folder, default="runs/sweeps", metavar="FOLDER", help="the runs (default: %(default)s)")
    flag("--out", type=out_folder, default="results", metavar="FOLDER",
         help="sweeps.json and the figures (default: %(default)s)")  # fmt: skip
    flag = parser.add_argument_group("the settings that are not swept").add_argument
    flag("--rank", type=positive_int, default=16, metavar="N", help="(default: %(default)s)")
    flag("--layers", choices=tuple(LAYERS), default="linear and convolution", help="(default: %(default)s)")
    flag("--guidance", type=positive, default=DEFAULT_GUIDANCE, metavar="SCALE", help="(default: %(default)s)")
    flag("--trajectories", type=positive_int, default=240, metavar="N", help="(default: %(default)s)")
    flag("--updates", type=positive_int, default=200, metavar="N", help="(default: %(default)s)")
    flag("--lr", type=positive, metavar="RATE", help="(default: train.py's)")
    flag("--weighting", choices=("even", "min-snr"), help="(default: train.py's)")


def run(args: Namespace) -> None:
    if unknown := set(args.sweeps) - set(VALUES):
        raise ValueError(f"There is no sweep called {', '.join(sorted(unknown))}: choose from {', '.join(VALUES)}.")
    file = args.out / "sweeps.json"
    report = read_json(file) if file.exists() else {}
    sd = load(args.model)
    teacher = teacher_fingerprint(sd)  # the same path may hold other weights than before
    done = {tuple(map(row.get, STAMP)): row for sweep in report.values() for row in sweep["rows"]}
    for sweep in args.sweeps or VALUES:
        rows = []
        for value in tqdm(VALUES[sweep], desc=f"sweep of {sweep}", unit="run"):
            command = train_command(args, **{sweep: value})
            key = shlex.join(["python", *command]), args.prompts, teacher
            if key not in done:
                done[key] = dict(zip(STAMP, key), commit=args.provenance["commit"]) | train_and_measure(args, command)
            rows.append(done[key] | {"value": value})
            report[sweep] = {"command": args.provenance["command"], "rows": rows}
            write_json(file, report)  # after every run
            plot(sweep, rows, args.out / f"sweep-{sweep}.png")
    print(f"{table(report)}\n\nFigures and JSON: {args.out}")


def train_command(args: Namespace, **swept: object) -> list[str]:
    """The command line of a run; equal settings give equal lines."""
    s = vars(args) | swept
    name = f"rank {s['rank']}, {s['layers']}, guidance {s['guidance']:g}, {s['trajectories']}, {s['updates']} updates"
    states = args.runs / f"states of guidance {s['guidance']:g}"
    command = ["train.py", "--model", args.model, "--rank", s["rank"], "--targets", *LAYERS[s["layers"]]]
    command += ["--guidance", f"{s['guidance']:g}", "--trajectories", s["trajectories"], "--steps", s["updates"]]
    for flag in ("lr", "weighting"):
        if s[flag] is not None:
            command += [f"--{flag}", s[flag]]
            name += f", {flag} {s[flag]}"
    return [str(word) for word in [*command, "--states", states, "--out", args.runs / name, "--resume", "--no-report"]]


def train_and_measure(args: Namespace, command: Sequence[str]) -> dict:
    """Finish the run if necessary, and measure its LoRA."""
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL) as train:  # stderr has progress bars
        try:
            failed = train.wait()
        except KeyboardInterrupt:
            train.terminate()  # on Ctrl-C it has a signal already; it saves a checkpoint, which takes a while
            train.wait()
            raise
    if failed:
        raise ValueError(
            f"python {shlex.join(command)} ended with an error (above). If {args.runs} holds runs of another teacher, "
            "choose another folder with --runs."
        )
    sd, lora = load(args.model, device=DEFAULT_DEVICE), read_lora(Path(command[command.index("--out") + 1]))
    add_student(sd, lora)
    prompts = spread(prompt_split(args.model)[1], args.prompts)
    share = noise_error_share(sd, prompts, steps=25, guidance=lora.guidance, batch=len(prompts))
    return {
        "parameters": sum(pair.down.numel() + pair.up.numel() for pair in lora.layers.values()),
        "noise error share": estimate(share.errors, share.gaps)._asdict(),
    }


def table(report: Mapping[str, Mapping]) -> str:
    """A line for each run."""
    lines = [["sweep", "value", "trained parameters", "noise error share"]]
    for sweep in report:
        for row in report[sweep]["rows"]:
            share = Estimate(**row["noise error share"])
            lines.append([sweep, str(row["value"]), f"{row['parameters']:,}", f"{share:.3f}"])
    return markdown_table(lines)


def plot(sweep: str, rows: Sequence[dict], path: Path) -> None:
    """Plot the noise error share by value, with its 95% interval."""
    shares = [Estimate(**row["noise error share"]) for row in rows]
    style = "ko" if isinstance(rows[0]["value"], str) else "ko-"  # a line only between numbers
    with figure_file(path, 4.5, 3) as figure:
        axes = figure.subplots()
        plot_estimates(axes, [str(row["value"]) for row in rows], shares, style)
        axes.set(xlabel=sweep, ylabel="noise error share", ylim=(0, None))
