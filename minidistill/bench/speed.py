"""How fast minidistill is, and how much memory it takes, compared with diffusers and peft on the same weights.

  python -m minidistill.bench speed                          pocket and sd15; some minutes on two CPU cores
  python -m minidistill.bench speed --size pocket --memory
  python -m minidistill.bench speed --size sd15 --row guided merged
  python -m minidistill.bench speed --size sd15 --device cuda --dtype bfloat16

Nothing is timed before the outputs of both sides agree. Then the two take turns (A, B, A, B, ...), and medians are
compared. If diffusers and peft are not both installed, minidistill is measured alone.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from minidistill.bench.output import (
    add_out_flag,
    device_name,
    find_device,
    megabytes,
    new_report,
    save_report,
    save_so_far,
)
from minidistill.bench.peak_memory import in_fresh_process, peak_bytes
from minidistill.bench.timing import take_turns
from minidistill.bench.workloads import GUIDANCE, IMAGES, PEERS, ROWS, SIZES, SMALLEST, Setup, error
from minidistill.evaluate.tables import markdown_table
from minidistill.training.command_line import DEFAULT_DEVICE, positive_int

# The largest difference between correct implementations, relative to the largest value.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}
SELECTIVE = (0.2, 0.5)  # selective guidance: the share of the steps, the last ones, without guidance


def add_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--size", nargs="+", choices=SIZES, default=["pocket", "sd15"], help="which networks (default: pocket sd15)")
    add("--row", nargs="+", choices=ROWS, help="which rows of the table (default: all but unet_compiled)")
    add("--no-peers", action="store_true", help="leave diffusers and peft out")
    add("--device", default=DEFAULT_DEVICE, help="where to compute (default: %(default)s)")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", default="float32", choices=dtypes, help="dtype of the weights (default: %(default)s)")
    add("--rank", type=positive_int, default=16, metavar="N", help="rank of the LoRA (default: %(default)s)")
    add("--repeats", type=positive_int, metavar="N", help="turns of each row (default: 10; on a CPU pocket 9, sd15 2)")
    add("--memory", action="store_true", help="also measure each row's peak memory, in a process of its own")
    add("--compile", action="store_true", help="also time the UNet under torch.compile (the row unet_compiled)")
    add_out_flag(parser, "results/bench.json")


def contestants(rows: Sequence[str], peers: bool = True) -> list[tuple[str, str]]:
    """(row, "ours") and, where the row has a peer and both packages are installed, (row, "peer")."""
    peers = peers and all(map(find_spec, PEERS))
    return [(row, who) for row in rows for who in ("ours", "peer") if who == "ours" or peers and ROWS[row].peer]


def chosen_rows(args: Namespace) -> list[str]:
    """In the table's order. Images need the decoder's time as well."""
    rows = set(args.row or ROWS.keys() - {"unet_compiled"})
    if args.compile:
        rows.add("unet_compiled")
    if rows & set(IMAGES):
        rows.add("decode")
    return [row for row in ROWS if row in rows]


def check_agreement(outputs: dict[tuple[str, str], tuple[Tensor, ...]], tolerance: float) -> dict[str, float]:
    """Row -> the largest difference between both sides, relative to the largest value.

    Raises ValueError if it is above ``tolerance``.
    """
    differences = {}
    for row in [row for row, who in outputs if who == "peer"]:
        differences[row] = error(outputs[row, "ours"], outputs[row, "peer"])
        if not differences[row] <= tolerance:  # also refuses NaN
            raise ValueError(f"{row}: our output and the peer's differ by {differences[row]:.1e} of the largest value.")
    return differences


def measure(setup: Setup, repeats: int, rows: Sequence[str], peers: bool = True) -> dict[str, dict]:
    """Row -> seconds of both sides, their ratio, and how far their outputs differ."""
    runs = {(row, who): ROWS[row].make(setup, who) for row, who in contestants(rows, peers)}
    tf32 = setup.device.type == "cuda" and setup.dtype == torch.float32  # convolutions as precise as in float16
    outputs = {key: run() for key, run in tqdm(runs.items(), "warming up and comparing")}
    differences = check_agreement(outputs, TOLERANCE[torch.float16 if tf32 else setup.dtype])
    del outputs

    turns = take_turns(runs, repeats, setup.device)
    seconds = {key: median(values) for key, values in turns.items()}
    for row, who in seconds:
        if row in IMAGES:  # all steps, and the decoder
            seconds[row, who] = seconds[row, who] * setup.size.steps / setup.timed_steps + seconds["decode", "ours"]
    guided = seconds.get(("guided", "ours"))

    table = {}
    for row in rows:
        ours, peer = seconds[row, "ours"], seconds.get((row, "peer"))
        table[row] = {
            "label": ROWS[row].label,
            "calls": ROWS[row].calls * (setup.size.steps if row in IMAGES else 1),
            "ours_s": ours,
            "peer_s": peer,
            "ours_to_peer": ours / peer if peer else None,
            "to_guided": ours / guided if guided and row in IMAGES else None,
            "difference": differences.get(row),
            "turns_s": {who: turns[row, who] for who in ("ours", "peer") if (row, who) in turns},
        }
    return table | selective_rows(table, setup.size.steps)


def selective_rows(table: dict[str, dict], steps: int) -> dict[str, dict]:
    """Rows of selective guidance, computed from the time of a guided step and of a one-pass step."""
    if not {"guided", "merged"} <= set(table):
        return {}
    guided, merged = table["guided"]["ours_s"], table["merged"]["ours_s"]
    rows = {}
    for part in SELECTIVE:
        one_call = round(part * steps)  # steps without guidance
        seconds = guided + one_call / steps * (merged - guided)
        rows[f"selective_{part:g}"] = {
            "label": f"guided image, the last {part:.0%} of the steps unguided",
            "calls": 2 * steps - one_call,
            "ours_s": seconds,
            "peer_s": None,
            "to_guided": seconds / guided,
            "difference": None,
        }
    return rows


def peak_memory(setup: Setup, row: str, who: str) -> int:
    """Peak bytes of a row, its weights included, but not Python and its packages. For a fresh process."""
    ROWS[row].make(replace(setup, size=SMALLEST), who)()  # diffusers imports its parts where they are first used
    return peak_bytes(lambda: ROWS[row].make(setup, who), setup.device)


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


COLUMNS = {  # title: key in a row, format
    "UNet calls": ("calls", str),
    "ours": ("ours_s", duration),
    "peer": ("peer_s", duration),
    "ours / peer": ("ours_to_peer", "{:.2f}".format),
    "/ guided": ("to_guided", "{:.2f}".format),
    "ours, peak MB": ("ours_bytes", megabytes),
    "peer, peak MB": ("peer_bytes", megabytes),
}


def markdown(size: str, result: dict) -> str:
    """The table, without columns that hold no measurement, and how to read it."""
    rows = list(result["rows"].values())
    columns = {title: c for title, c in COLUMNS.items() if any(row.get(c[0]) is not None for row in rows)}
    lines = [[size, *columns]]
    for row in rows:
        cells = ["" if row.get(key) is None else text(row[key]) for key, text in columns.values()]
        lines.append([row["label"], *cells])

    steps, timed_steps = result["steps"], result["timed_steps"]
    how = "all timed" if steps == timed_steps else f"{timed_steps} timed, multiplied by {steps / timed_steps:g}"
    notes = f"Medians of {result['repeats']} interleaved turns. An image is {steps} DDIM steps ({how}) and our decoder;"
    notes += f" a training step has a batch of {result['batch']}."
    if "peer" in columns:
        worst = max(row["difference"] for row in rows if row["difference"] is not None)
        notes += " The peer is diffusers, which guides in one call on a batch of two, with peft for the LoRA. Where"
        notes += " activations are recomputed, it recomputes whole blocks, we what is cheap (`--memory low`)."
        notes += f" Outputs differ by at most {worst:.0e} of the largest value."
    else:
        notes += f" Measured without {' and '.join(PEERS)}."
    if "ours, peak MB" in columns:
        notes += " Peak memory includes the weights, but not Python and its packages; for an image, not the decoder."
    return f"{markdown_table(lines)}\n\n{notes}\n"


def run(args: Namespace) -> None:
    device = find_device(args.device)
    cuda, rows, peers = device.type == "cuda", chosen_rows(args), not args.no_peers
    report = new_report(args, device_name(device), dtype=args.dtype, rank=args.rank, guidance=GUIDANCE)
    report["versions"] = {package: version(package) for package in ("torch", *PEERS) if find_spec(package)}
    report["sizes"] = {}
    for name in args.size:
        size = SIZES[name]
        repeats, steps = args.repeats or (10 if cuda else size.cpu_repeats), size.steps if cuda else size.cpu_steps
        setup = Setup(size, device, getattr(torch, args.dtype), args.rank, steps)
        table = measure(setup, repeats, rows, peers)
        counts = {"steps": size.steps, "timed_steps": steps, "batch": size.batch, "repeats": repeats}
        report["sizes"][name] = counts | {"rows": table}
        save_so_far(report, args.out)
        if args.memory:
            eager = [row for row in rows if row != "unet_compiled"]
            for row, who in tqdm(contestants(eager, peers), "peak memory"):
                table[row][f"{who}_bytes"] = in_fresh_process(peak_memory, replace(setup, timed_steps=1), row, who)
        print(f"\n{markdown(name, report['sizes'][name])}", flush=True)
        save_so_far(report, args.out)
    save_report(report, args.out)
    versions = ", ".join(map(" ".join, report["versions"].items()))
    print(f"{report['device']}, {report['threads']} threads, {args.dtype}, rank {args.rank}; {versions}")
