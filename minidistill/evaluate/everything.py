"""results/ made again, as its README says: the commands in their order, and summary.json of what they found."""

import importlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from minidistill.bench.workloads import PEERS
from minidistill.formats.files import digest
from minidistill.formats.model_configs import write_json

RESULTS = Path("results")
DONE = Path("runs/all/done.json")  # steps that need not be run again: delete it to begin anew
JUDGE = "minidistill.pocket.judge"
SHIPPED = "weights/pocket-emoji/guidance-lora.safetensors"
GOES_ON = "--no-report --resume --save-every 25"
STEPS = {
    # Three students of the same teacher, with as many updates; the two that learn from trajectories share them.
    "a LoRA from trajectories": f"train.py --out runs/all/trajectories --states runs/all/states {GOES_ON}",
    "a LoRA from noised latents": f"train.py --method noised --out runs/all/noised {GOES_ON}",
    "a full copy": f"train.py --method full --out runs/all/full --states runs/all/states {GOES_ON}",
    # How good they are, beside the student that ships; needs the emoji font.
    "quality": f"-m minidistill.evaluate {SHIPPED} runs/all/trajectories runs/all/noised runs/all/full "
    f"--selective 0.2 0.5 --judge {JUDGE} --work runs/all/evaluation --out results/evaluation",
    "the dial": f"-m minidistill.evaluate.dial {SHIPPED} --out results/dial",
    "what was learned": "-m minidistill.evaluate.spectrum runs/all/full runs/all/trajectories --out results/spectrum",
    # What they cost.
    "memory": "-m minidistill.bench.memory",
    "memory, step by step": "-m minidistill.bench.memory_steps",
    "memory, measured": "-m minidistill.bench.memory --size pocket --device cpu --measure --out results/memory-pocket.json",
    "memory, measured at full size": "-m minidistill.bench.memory --size sd15 --device cpu --dtype float32 --measure "
    "--out results/memory-sd15.json",
    "time, embedded model": "-m minidistill.bench.speed --size pocket --memory --compile --out results/bench-pocket.json",
    "time, Stable Diffusion 1.5": "-m minidistill.bench.speed --size sd15 --memory --out results/bench-sd15.json",
}


def run() -> None:
    """Every step that is not done, then the summary. Run from the repository's folder.

    Raises ValueError when a step ends with an error, or what some step needs is not installed.
    """
    if missing := [package for package in PEERS if not find_spec(package)]:
        raise ValueError(f"--all compares with {' and '.join(missing)}: pip install -r requirements-dev.txt.")
    importlib.import_module(JUDGE).find_font(None)  # refused now, if it is not there, and not after the training
    done = read(DONE) if DONE.exists() else {}
    student = digest(Path(SHIPPED).read_bytes())
    for number, (step, command) in enumerate(STEPS.items(), 1):
        found = done.get(step, {})
        if found.get("command") == command and found["student"] == student:
            print(f"[{number} of {len(STEPS)}] {step}: done, says {DONE}")
            continue
        print(f"\n[{number} of {len(STEPS)}] {step}: python {command}", flush=True)
        start = time.perf_counter()
        if subprocess.run([sys.executable, *shlex.split(command)]).returncode:
            raise ValueError(f'the step "{step}" ended with an error (above). The same command goes on from there.')
        minutes = round((time.perf_counter() - start) / 60, 1)
        done[step] = {"command": command, "student": student, "minutes": minutes}
        write_json(DONE, done)
    write_json(RESULTS / "summary.json", summary(RESULTS))
    minutes = sum(done[step]["minutes"] for step in STEPS)
    print(f"\nresults/ is made, in {minutes:.0f} minutes. Wrote {RESULTS / 'summary.json'}")


MEASURES = {
    "noise_error_share": "noise error share",
    "clip_score": "CLIP score",
    "identity": "identity by template",
    "background": "background",
    "frechet": "Fréchet to rendered",
}


def summary(results: Path) -> dict:
    """The figures that the method is judged by, out of the files in ``results``, each with its command and commit."""
    quality, memory = read(results / "evaluation/results.json"), read(results / "memory.json")
    measured, benches = (
        {size: read(results / f"{what}-{size}.json") for size in ("pocket", "sd15")} for what in ("memory", "bench")
    )
    methods = {row["method"]: row for row in quality["rows"]}
    teacher, unguided, student = methods["teacher"], methods["no guidance"], methods[Path(SHIPPED).stem]
    for row, share in ((teacher, 0.0), (unguided, 1.0)):  # by its definition
        row["noise error share"] = dict(value=share, low=share, high=share)
    found = {
        name: {measure: row[title] for measure, title in MEASURES.items()} | source(quality)
        for name, row in (("teacher", teacher), ("unguided", unguided), ("student", student))
    }
    full_size = benches["sd15"]["sizes"]["sd15"]["rows"]
    guided, merged = (median(full_size[row]["turns_s"]["ours"]) for row in ("guided", "merged"))
    found["time"] = {"unet_ratio": merged / guided, "picture_ratio": full_size["merged"]["to_guided"]}
    found["time"] |= source(benches["sd15"])
    found["memory"] = memory["sizes"] | source(memory)
    found["memory"]["measured"] = {size: made["sizes"][size] | source(made) for size, made in measured.items()}
    found["peers"] = {
        size: peer_ratios(bench["sizes"][size]["rows"]) | source(bench) for size, bench in benches.items()
    }
    return found


def peer_ratios(rows: Mapping[str, dict]) -> dict[str, dict]:
    """Ours to the peer's, of time and of peak memory; from trajectories also to the peer's step with its teacher."""
    found = {
        name: {"time": row["ours_to_peer"]}
        | ({"memory": row["ours_bytes"] / row["peer_bytes"]} if "peer_bytes" in row else {})  # not of what is compiled
        for name, row in rows.items()
        if row["peer_s"]
    }
    ours, usual = rows["trajectories"], rows["noised"]  # what the peers' users run
    ratios = {"time": ours["ours_s"] / usual["peer_s"], "memory": ours["ours_bytes"] / usual["peer_bytes"]}
    return found | {"trajectories to the peer's teacher in the loop": ratios}


def source(report: Mapping) -> dict[str, str]:
    return {name: report[name] for name in ("command", "commit")}


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))
