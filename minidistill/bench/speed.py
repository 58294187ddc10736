"""How fast, and how much memory: this code beside diffusers and peft, on the same random weights, in one run.

  python -m minidistill.bench                         both sizes; on two CPU cores some minutes
  python -m minidistill.bench --size pocket --memory
  python -m minidistill.bench --size sd15 --device cuda --dtype bfloat16
  python -m minidistill.bench train                   an update, with each technique that speeds it up (bench_train)
  python -m minidistill.bench kernel                  LoRA layers alone, on a GPU (bench_kernel)

The contestants take turns (A, B, A, B, ...) and medians are compared, after ours and the peers' outputs were found to
agree. Without diffusers and peft, ours stands alone. How fast a checkpoint loads is measured by bench_load.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from minidistill.bench import kernel as bench_kernel
from minidistill.bench import updates as bench_train
from minidistill.bench.timing import device_name, markdown_table, timed
from minidistill.bench.workloads import GUIDANCE, PEERS, PICTURES, ROWS, SIZES, Setup, contestants, sd15_step
from minidistill.formats.model_configs import write_json
from minidistill.guidance import steps_without
from minidistill.training.settings import count, made_by, one_sentence, parse, setting

# How far apart the outputs of right implementations may lie, relative to the largest value.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}
SELECTIVE = (0.2, 0.5)  # shares of the steps, the last ones, that selective guidance leaves without


@dataclass
class Settings:
    size: list[str] = setting(None, "what to measure (default: both)", type=str, nargs="+", choices=tuple(SIZES))
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "where to compute")
    dtype: str = setting("float32", "of the weights", choices=("float32", "bfloat16", "float16"))
    rank: int = setting(16, "of the LoRA", type=count)
    repeats: int = setting(None, "turns of each contestant (default: 10; on a CPU pocket 9, sd15 2)", type=count)
    memory: bool = setting(False, "measure peak memory too, each contestant in a process of its own")
    compile: bool = setting(False, "time the UNet's forward pass under torch.compile too")
    out: Path = setting(Path("results/bench.json"), "where the measurements go as JSON")
    row: str = setting(None, "only print one contestant's peak bytes (unet/ours, unet/peer, ...): what --memory runs")


def check_agreement(outputs: dict[tuple[str, str], tuple[Tensor, ...]], tolerance: float) -> dict[str, float]:
    """Row -> the largest difference between ours and the peer's, relative to the largest value. Raises ValueError."""
    differences = {}
    for row in [row for row, who in outputs if who == "peer"]:
        differences[row] = bench_kernel.error(outputs[row, "ours"], outputs[row, "peer"])
        if not differences[row] <= tolerance:  # NaN is no agreement either
            raise ValueError(f"{row}: ours and the peer's differ by {differences[row]:.1e} of the largest value.")
    return differences


def measure(setup: Setup, repeats: int, compiled: bool = False) -> dict[str, dict]:
    """Row -> seconds of ours and of the peer, their ratio, and how well the two agree."""
    runs = {(row, who): ROWS[row].make(setup, who) for row, who in contestants(compiled)}
    tf32 = setup.device.type == "cuda" and setup.dtype == torch.float32  # its convolutions are as precise as float16
    outputs = {key: run() for key, run in tqdm(runs.items(), "warming up and comparing")}
    differences = check_agreement(outputs, TOLERANCE[torch.float16 if tf32 else setup.dtype])
    del outputs

    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in tqdm(range(repeats), "timing"):
        for key, run in runs.items():
            times[key].append(timed(run, setup.device))

    seconds = {key: median(values) for key, values in times.items()}
    for row, who in seconds:
        if row in PICTURES:
            seconds[row, who] *= setup.size.steps / setup.timed_steps
            seconds[row, who] += seconds["decode", "ours"]
    rows = {}
    for name in dict.fromkeys(row for row, _ in runs):
        label, calls, _ = ROWS[name]
        ours, peer = seconds[name, "ours"], seconds.get((name, "peer"))
        rows[name] = {
            "label": label,
            "calls": calls * (setup.size.steps if name in PICTURES else 1),
            "ours_s": ours,
            "peer_s": peer,
            "ours_to_peer": ours / peer if peer else None,
            "to_guided": ours / seconds["guided", "ours"] if name in PICTURES else None,
            "difference": differences.get(name),
            "turns_s": {who: turns for (row, who), turns in times.items() if row == name},
        }
    # Selective guidance is some steps of the guided picture and some of a one-pass picture's: no turns of its own.
    for part in SELECTIVE:
        dropped = steps_without(part, setup.size.steps)
        share = dropped / setup.size.steps
        seconds_of_it = (1 - share) * rows["guided"]["ours_s"] + share * rows["merged"]["ours_s"]
        rows[f"selective_{part:g}"] = {
            "label": f"guided picture, the last {part:.0%} of steps without",
            "calls": 2 * setup.size.steps - dropped,
            "ours_s": seconds_of_it,
            "peer_s": None,
            "to_guided": seconds_of_it / rows["guided"]["ours_s"],
            "difference": None,
        }
    return rows


def resident(field: str) -> int:
    """Bytes this process holds ("VmRSS") or held at most ("VmHWM"); getrusage's peak would begin at its parent's."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def peak_bytes(make: Callable[[], Callable[[], object]], device: torch.device) -> int:
    """Peak bytes of making something and running it twice, beyond what this process holds before."""
    if cuda := device.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else resident("VmRSS")
    run = make()
    run(), run()  # the second update has AdamW's state beside it
    return (torch.cuda.max_memory_allocated(device) if cuda else resident("VmHWM")) - before


def peak_memory(setup: Setup, row: str, who: str) -> int:
    """Peak bytes of one contestant in a fresh process, weights included, Python and its packages not."""
    for package in PEERS if who == "peer" else ():
        import_module(package)
    return peak_bytes(lambda: ROWS[row].make(setup, who), setup.device)


def printed_elsewhere(module: str, flags: list[str], **environment: str) -> int:
    """The number that ``python -m module`` prints, in a process of its own."""
    command = [sys.executable, "-m", module, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise ValueError(f"{module} {shlex.join(flags)} could not be measured:\n{done.stderr}")
    return int(done.stdout)


def peak_memory_elsewhere(args: Settings, size: str, row: str, who: str) -> int:
    flags = ["--row", f"{row}/{who}", "--size", size, "--device", args.device, "--dtype", args.dtype]
    return printed_elsewhere("minidistill.bench.speed", [*flags, "--rank", str(args.rank)])


def markdown(size: str, result: dict) -> str:
    """A table without the columns that nothing was measured for, and how to read it."""

    def seconds(s: float) -> str:
        return f"{s:.2f} s" if s >= 1 else f"{s * 1e3:.1f} ms"

    formats = {
        size: ("label", str),
        "UNet calls": ("calls", str),
        "ours": ("ours_s", seconds),
        "peer": ("peer_s", seconds),
        "ours / peer": ("ours_to_peer", "{:.2f}".format),
        "of guided": ("to_guided", "{:.2f}".format),
        "ours, peak MB": ("ours_bytes", lambda n: f"{n / 1e6:,.0f}"),
        "peer, peak MB": ("peer_bytes", lambda n: f"{n / 1e6:,.0f}"),
    }
    rows = list(result["rows"].values())
    shown = {title: f for title, f in formats.items() if any(row.get(f[0]) is not None for row in rows)}
    lines = [list(shown), ["---"] * len(shown)]
    lines += [["" if row.get(key) is None else show(row[key]) for key, show in shown.values()] for row in rows]

    steps, timed_steps = result["steps"], result["timed_steps"]
    how = "all timed" if steps == timed_steps else f"{timed_steps} timed, times {steps / timed_steps:g}"
    text = f"Medians of {result['repeats']} interleaved turns. A picture is {steps} DDIM steps ({how}) and our decoder;"
    text += f" a distillation step is on a batch of {result['batch']}."
    if "peer" in shown:
        worst = max(row["difference"] for row in rows if row["difference"] is not None)
        text += " Peer: diffusers, which guides in one call on a batch of two, and peft for distillation; it recomputes"
        text += " whole blocks, ours what costs little (`--memory low`)."
        text += f" Its outputs differ from ours by at most {worst:.0e} of the largest value."
    else:
        text += f" No peer beside ours: {' and '.join(PEERS)} are not both installed."
    if "ours, peak MB" in shown:
        text += " Peak memory: weights included, Python and its packages not; a picture's without the decoder."
    return f"{markdown_table(lines)}\n\n{text}\n"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["kernel"]:
        return bench_kernel.main(argv[1:], sd15_step)
    if argv[:1] == ["train"]:
        return bench_train.main(argv[1:])
    args = parse(Settings, __doc__, argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    cuda = device.type == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here: use --device cpu.")
    sizes = args.size or list(SIZES)
    if args.row:
        key = tuple(args.row.split("/"))
        if key not in contestants() or len(sizes) > 1:
            raise ValueError(f"--row takes one --size and one of {', '.join(map('/'.join, contestants()))}.")
        print(peak_memory(Setup(SIZES[sizes[0]], device, dtype, args.rank, timed_steps=1), *key))
        return

    report = made_by("minidistill.bench.speed", argv) | {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "rank": args.rank,
        "guidance": GUIDANCE,
        "versions": {package: version(package) for package in ("torch", *PEERS) if find_spec(package)},
        "sizes": {},
    }
    for name in sizes:
        size = SIZES[name]
        repeats, steps = args.repeats or (10 if cuda else size.cpu_repeats), size.steps if cuda else size.cpu_steps
        rows = measure(Setup(size, device, dtype, args.rank, steps), repeats, args.compile)
        for row, who in tqdm(contestants(), "peak memory") if args.memory else ():
            rows[row][f"{who}_bytes"] = peak_memory_elsewhere(args, name, row, who)
        counts = {"steps": size.steps, "timed_steps": steps, "batch": size.batch, "repeats": repeats}
        report["sizes"][name] = counts | {"rows": rows}
        print(f"\n{markdown(name, report['sizes'][name])}", flush=True)
    versions = ", ".join(map(" ".join, report["versions"].items()))
    print(f"{report['device']}, {report['threads']} threads, {args.dtype}, rank {args.rank}; {versions}")
    write_json(args.out, report)
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    with one_sentence("minidistill.bench.speed", "stopped."):
        main()
