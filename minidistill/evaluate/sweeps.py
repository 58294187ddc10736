"""What matters for a student: one setting of train.py at a time, all others alike, and a figure for each.

  python -m minidistill.evaluate.sweeps                    all of them, in short runs: 75 minutes on two CPU cores
  python -m minidistill.evaluate.sweeps rank --updates 400 --out runs/longer

Run from the repository's folder. Every value is a run of train.py under --runs, measured by the noise error share on
held-out prompts; runs with the same teacher share its trajectories. What is there already is not done again.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

from minidistill.data.trajectories import fingerprint, prompt_split, spread
from minidistill.evaluate.metrics import interval, noise_error_share, with_interval
from minidistill.formats.files import written_whole
from minidistill.formats.lora_files import inject_file
from minidistill.formats.lora_formats import read_run
from minidistill.formats.model_configs import write_json
from minidistill.lora import DEFAULT_TARGETS
from minidistill.pipeline import load
from minidistill.training.settings import ModelSettings, count, made_by, one_sentence, parse, positive, setting

LAYERS = {  # patterns of layers' names
    "attention": ["*.attn?.to_*"],  # as in the paper's code
    "linear": ["*.attn?.to_*", "*.ff.net.*", "*.time_emb_proj"],
    "linear and convolution": list(DEFAULT_TARGETS),
}
VALUES = {
    "rank": (1, 2, 4, 8, 16, 32, 64),
    "layers": tuple(LAYERS),
    "guidance": (2, 2.5, 3, 5, 7.5, 10),
    "trajectories": (48, 96, 240, 480, 960),
    "updates": (50, 100, 200, 400, 800),
    "lr": (0.0005, 0.001, 0.002, 0.004, 0.008),
    "weighting": ("even", "min-snr"),
}
STAMP = ("command", "prompts", "teacher")  # in each row: what has these is done


@dataclass
class Settings:
    sweeps: list[str] = setting(..., f"of {', '.join(VALUES)} (default: all)", "what", nargs="*", metavar="SWEEP")
    model: Path = setting(ModelSettings.model, "a Stable Diffusion, as train.py takes it", "what")
    rank: int = setting(16, "where it is not what is swept", "elsewhere", type=count)
    layers: str = setting("linear and convolution", "likewise", "elsewhere", choices=tuple(LAYERS))
    guidance: float = setting(2.5, "likewise", "elsewhere", type=positive)
    trajectories: int = setting(240, "likewise", "elsewhere", type=count)
    updates: int = setting(200, "likewise", "elsewhere", type=count)
    lr: float = setting(None, "likewise (default: as train.py sets it)", "elsewhere", type=positive)
    weighting: str = setting(None, "likewise (default: as train.py sets it)", "elsewhere", choices=VALUES["weighting"])
    prompts: int = setting(24, "held-out prompts", "how", type=count)
    runs: Path = setting(Path("runs/sweeps"), "folder of the runs", "how")
    out: Path = setting(Path("results"), "folder for sweeps.json and the figures", "how")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(Settings, __doc__, argv)
    if unknown := set(args.sweeps) - set(VALUES):
        raise ValueError(f"There is no sweep called {', '.join(sorted(unknown))}: {', '.join(VALUES)}.")
    file, made = args.out / "sweeps.json", made_by("minidistill.evaluate.sweeps", argv)
    report = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    sd = load(args.model)
    teacher = fingerprint(sd.unet, sd.text_encoder)  # other weights may lie under the same name
    done = {tuple(map(row.get, STAMP)): row for sweep in report.values() for row in sweep["rows"]}
    for sweep in args.sweeps or VALUES:
        rows = []
        for value in tqdm(VALUES[sweep], desc=f"sweep of {sweep}", unit="run"):
            command = training(args, **{sweep: value})
            key = shlex.join(["python", *command]), args.prompts, teacher
            if key not in done:
                done[key] = dict(zip(STAMP, key)) | {"commit": made["commit"]} | measured(args, command)
            rows.append(done[key] | {"value": value})
            report[sweep] = {"command": made["command"], "rows": rows}
            write_json(file, report)  # as far as it is
        with written_whole(args.out / f"sweep-{sweep}.png") as beside:
            plot(sweep, rows, beside)
    print(f"{markdown(report)}\n\nFigures and JSON: {args.out}")


def training(args: Settings, **swept: object) -> list[str]:
    """The command line of a run; with the same settings it is the same."""
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


def measured(args: Settings, command: Sequence[str]) -> dict:
    """Train, if that is not done yet, and measure."""
    run = Path(command[command.index("--out") + 1])
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True)  # with its progress bars
    if done.returncode:
        raise ValueError(
            f"python {shlex.join(command)} ended with an error (above). If {args.runs} is of another teacher: name "
            "another --runs."
        )
    sd, learned = load(args.model, device=ModelSettings.device), read_run(run, 1.0)
    sd.unet = inject_file(sd.unet, learned)
    prompts = spread(prompt_split(args.model)[1], args.prompts)
    found = noise_error_share(sd, prompts, steps=25, guidance=learned.guidance, batch=len(prompts))
    return {
        "parameters": sum(pair.down.numel() + pair.up.numel() for pair in learned.layers.values()),
        "noise error share": interval(found.errors, found.gaps)._asdict(),
    }


def markdown(report: dict) -> str:
    """A line a run."""
    lines = ["| sweep | value | trained parameters | noise error share |", "| --- | ---: | ---: | ---: |"]
    for sweep in report:
        for row in report[sweep]["rows"]:
            share = with_interval(row["noise error share"], "{:.3f}")
            lines.append(f"| {sweep} | {row['value']} | {row['parameters']:,} | {share} |")
    return "\n".join(lines)


def plot(sweep: str, rows: Sequence[dict], path: Path) -> None:
    """The noise error share by value, with its 95% interval."""
    shares = [row["noise error share"] for row in rows]
    apart = [[x["value"] - x["low"] for x in shares], [x["high"] - x["value"] for x in shares]]
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.subplots()
    names = [str(row["value"]) for row in rows]
    look = "ko" if isinstance(rows[0]["value"], str) else "ko-"  # between two names lies nothing
    axes.errorbar(names, [x["value"] for x in shares], apart, fmt=look, capsize=3)
    axes.set(xlabel=sweep, ylabel="noise error share", ylim=(0, None))
    figure.savefig(path, format="png", dpi=120)


if __name__ == "__main__":
    with one_sentence("minidistill.evaluate.sweeps", "stopped. The same command goes on from what is done."):
        main()
