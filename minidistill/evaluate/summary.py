"""Collect the figures that the method is judged by, each with the command and the commit that measured it.

  python -m minidistill.evaluate summary

The last step of results/make.sh: reads the other results and writes summary.json beside them.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from minidistill.formats.files import read_json, write_json

STUDENT = "guidance-lora"  # the one that ships
MEASURES = {
    "noise_error_share": "noise error share",
    "clip_score": "CLIP score",
    "identity": "identity by template",
    "background": "background",
    "frechet": "Fréchet to rendered",
}


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="FOLDER", help="(default: results)")


def run(args: Namespace) -> None:
    write_json(args.results / "summary.json", summary(args.results))
    print(f"Wrote {args.results / 'summary.json'}")


def summary(results: Path) -> dict:
    """The contents of summary.json for a folder of results."""
    quality, memory = read_json(results / "evaluation/results.json"), read_bench(results / "memory.json")
    measured = {size: read_bench(results / f"memory-{size}.json") for size in ("pocket", "sd15")}
    benches = {size: read_bench(results / f"bench-{size}.json") for size in ("pocket", "sd15")}
    methods = {row["method"]: row for row in quality["rows"]}
    if STUDENT not in methods or not set(MEASURES.values()) <= set(methods[STUDENT]):
        raise ValueError(
            f"{results}/evaluation needs a row {STUDENT} with {', '.join(MEASURES.values())}: add --judge."
        )
    for method, share in (("teacher", 0.0), ("no guidance", 1.0)):  # by definition
        methods[method]["noise error share"] = dict(value=share, low=share, high=share)
    report = {
        name: {measure: methods[method][title] for measure, title in MEASURES.items()} | source(quality)
        for name, method in (("teacher", "teacher"), ("unguided", "no guidance"), ("student", STUDENT))
    }
    full_size = benches["sd15"]["sizes"]["sd15"]["rows"]
    guided, merged = (median(full_size[row]["turns_s"]["ours"]) for row in ("guided", "merged"))
    report["time"] = {"unet_ratio": merged / guided, "picture_ratio": full_size["merged"]["to_guided"]}
    report["time"] |= source(benches["sd15"])
    report["memory"] = memory["sizes"] | source(memory)
    report["memory"]["measured"] = {size: one["sizes"][size] | source(one) for size, one in measured.items()}
    report["peers"] = {size: peer_ratios(one["sizes"][size]["rows"]) | source(one) for size, one in benches.items()}
    return report


def read_bench(file: Path) -> dict:
    """What a benchmark wrote. Raises ValueError if it was stopped before its end."""
    report = read_json(file)
    if report.get("partial"):
        raise ValueError(f"{file} was stopped before its end: run {report['command']} again.")
    return report


def peer_ratios(rows: Mapping[str, dict]) -> dict[str, dict]:
    """Time and peak memory relative to the peer's, and a step from trajectories to the peer's with its teacher."""
    ratios = {}
    for name, row in rows.items():
        if row["peer_s"]:
            ratios[name] = {"time": row["ours_to_peer"]}
            if "peer_bytes" in row:  # the memory of compiled code is not measured
                ratios[name]["memory"] = row["ours_bytes"] / row["peer_bytes"]
    ours, usual = rows["trajectories"], rows["noised"]  # the latter is what the peers' users run
    ratios["trajectories to the peer's teacher in the loop"] = {
        "time": ours["ours_s"] / usual["peer_s"],
        "memory": ours["ours_bytes"] / usual["peer_bytes"],
    }
    return ratios


def source(report: Mapping) -> dict[str, str]:
    return {name: report[name] for name in ("command", "commit")}
