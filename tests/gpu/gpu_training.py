"""The stages of quarter_hour.py that train: the next embedded model, its student, and a student of a large model."""

import io
import json
import runpy
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from gpu_measurements import Figures, attempt, free_memory, new_setup, peak_gigabytes
from quarter_hour import ROOT, Task
from safetensors.torch import save_file
from tiny import write_emoji, write_tiny
from transformers import CLIPTextModel

from minidistill.bench.workloads import SIZES
from minidistill.config import POCKET_UNET
from minidistill.formats.single_file import to_single_file
from minidistill.pocket.emoji3d import __main__ as emoji3d
from minidistill.pocket.emoji3d import images, judge
from minidistill.pocket.emoji3d.compositions import all_compositions
from minidistill.unet import UNet
from minidistill.vae import VAE

TOKENIZER = ROOT / "weights/pocket-emoji/tokenizer"
RESERVE = 50  # seconds of retraining: when only these are left, the model is made of what has been learned so far

# Estimated for an H100: 3,000 updates of the CLIP (both of its stages) in 40 s, the VAE's in 70 and the UNet's in 120,
# as 139 updates of 256 a second is what the UNet's arithmetic allows, and half of that is usual. To this come 40 s for
# each of two compilations, and 30 for drawing and encoding the images.
STEPS = {"clip-steps": 1500, "clip-batch": 256, "vae-steps": 8000, "vae-batch": 128}
STEPS |= {"unet-steps": 8000, "unet-batch": 256}
BRIEF_STEPS = {"clip-steps": 1, "clip-batch": 4, "vae-steps": 1, "vae-batch": 2, "unet-steps": 1, "unet-batch": 2}
BRIEF_RUN = ["--trajectories", 2, "--steps", 1, "--batch", 2, "--sample-steps", 2]  # of train.py


def run(main: Callable[[Sequence[str]], None], *flags: object) -> str:
    """What a command prints; it goes into the log too."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            main([str(flag) for flag in flags])
    finally:
        print(printed.getvalue())
    return printed.getvalue()


def train(flags: Sequence[str]) -> None:
    """train.py, in this process, which has imported everything already."""
    with patch.object(sys, "argv", ["train.py", *flags]):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def where(task: Task) -> list[str]:
    return ["--device", "cpu" if task.dry else "cuda"]


def pack(task: Task, name: str, folder: Path, files: Sequence[Path]) -> None:
    """Put files of ``folder`` into an archive that comes home."""
    with tarfile.open(task.out / name, "w:gz") as archive:
        for file in files:
            archive.add(file, file.relative_to(folder))


# The embedded model.


def emoji_images(task: Task) -> Path:
    """The package of emoji; dry: one of coloured blobs."""
    if not task.dry:
        return ROOT / images.PACKAGE
    folder = task.scratch / "emoji"
    return folder if folder.exists() else write_emoji(folder)


def tiny_world(task: Task) -> ExitStack:
    """Dry: what the embedded model is trained and judged with, made so small that it takes seconds."""
    changes = ExitStack()
    if task.dry:
        learned, held_out = ([c for c in all_compositions() if c.held_out == kind] for kind in (False, True))
        few = [*learned[:8], held_out[0], held_out[-1]]  # one held-out thing, and one pair
        changes.enter_context(patch.object(emoji3d, "all_compositions", lambda: few))
        changes.enter_context(patch.object(emoji3d, "POCKET_UNET", replace(POCKET_UNET, widths=(16, 16, 16))))
        changes.enter_context(patch.object(images, "SIZES", 1))
        changes.enter_context(patch.object(judge, "TEMPLATE_SIZES", 1))
        changes.enter_context(patch.object(judge, "train_classifier", lambda renderer: judge.build_classifier()))
    return changes


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise KeyboardInterrupt in the block after ``seconds``."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def retrain(task: Task) -> Figures:
    """Train the next embedded model, and bring it home in two archives: its UNet, and everything else."""
    if not task.dry and not (ROOT / images.PACKAGE).is_dir():
        yield "skipped", f"there are no images in {images.PACKAGE}"
        return
    model, steps = task.scratch / "emoji3d", BRIEF_STEPS if task.dry else STEPS
    flags = ["--out", model, "--work", task.scratch / "work", "--emoji", emoji_images(task), *where(task)]
    flags += [text for name, number in steps.items() for text in (f"--{name}", number)]
    with tiny_world(task):
        try:
            with alarm(task.ends - time.monotonic() - RESERVE):
                printed = run(emoji3d.main, *flags, *([] if task.dry else ["--compile", "--bf16"]))
        except KeyboardInterrupt:
            yield "stopped early", "what was being trained is as it was when last saved"
            # The command continues from what was saved, which has more updates than one: nothing is trained further.
            printed = run(emoji3d.main, *flags, "--vae-steps", 1, "--unet-steps", 1)
    yield "printed", printed
    files = [file for file in sorted(model.rglob("*")) if file.is_file()]
    unet = [file for file in files if file.parent.name == "unet"]
    pack(task, "model-unet.tar.gz", model, unet)
    pack(task, "model.tar.gz", model, [file for file in files if file not in unet])
    yield "MB", sum(file.stat().st_size for file in files) / 1e6


def distil(task: Task) -> Figures:
    """train.py on the new embedded model, with its report, and the judge on teacher and student."""
    model = task.scratch / "emoji3d"
    model = model if (model / "model_index.json").exists() else ROOT / judge.OUT
    if not (model / "model_index.json").exists():
        yield "skipped", f"there is no new embedded model, neither from the stage retrain nor in {judge.OUT}"
        return
    out = task.scratch / "distilled"
    yield "train.py", run(train, "--model", model, "--out", out, *where(task), *(BRIEF_RUN if task.dry else []))
    results = [out / "lora.safetensors", out / "metrics.jsonl", out / "report.md", *out.rglob("*.png")]
    pack(task, "student.tar.gz", out, results)

    work = task.scratch / "judge" if task.dry else ROOT / judge.WORK
    if not task.dry and not (work / "judge.safetensors").exists():
        yield "judge", f"skipped: there is no {judge.WORK}/judge.safetensors, its classifier"
        return
    flags = ["--model", model, "--lora", out / "lora.safetensors", "--emoji", emoji_images(task), "--work", work]
    flags += ["--limit", 2, "--seeds", 2, "--steps", 1] if task.dry else ["--limit", 240, "--batch", 256]
    with tiny_world(task):
        yield "judge", run(judge.main, *flags, "--out", out / "judge.json", *where(task))
    pack(task, "student.tar.gz", out, [*results, out / "judge.json"])


# A large model.


def random_model(task: Task) -> list[object]:
    """The flags for a Stable Diffusion 1.5 of random weights; dry: a tiny one."""
    if task.dry:
        return ["--model", write_tiny(task.scratch / "tiny")]
    file, size, setup = task.scratch / "sd15.safetensors", SIZES["sd15"], new_setup(task)
    makes = (lambda: UNet(size.unet), lambda: VAE(size.vae), lambda: CLIPTextModel(size.text))
    unet, vae, text = (setup.random_weights(make, torch.contiguous_format) for make in makes)
    save_file(to_single_file(unet, size.unet, vae, size.vae, text, size.text), file)
    return ["--model", file, "--tokenizer", TOKENIZER]


def timed_training(task: Task, flags: list[object], gigabytes: float | None = None) -> dict:
    """Seconds and peak memory of a run, in a GPU that has only so many gigabytes."""
    free_memory(task)
    if gigabytes and not task.dry:
        torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / torch.cuda.mem_get_info()[1])
    start = time.perf_counter()
    try:
        run(train, *flags)
    finally:
        if not task.dry:
            torch.cuda.set_per_process_memory_fraction(1.0)
    return {"seconds": time.perf_counter() - start, "peak GB": peak_gigabytes(task)}


def end_to_end(task: Task) -> Figures:
    """train.py on a model of full size, and the settings for small GPUs with so much memory and no more."""
    model = random_model(task)
    common = [*model, "--no-report", "--guidance", 2, "--lr", 1e-5, "--dtype", "bfloat16", *where(task)]
    usual = ["--trajectories", 32, "--steps", 20, "--sample-batch", 16]
    low = ["--trajectories", 8, "--steps", 2, "--batch", 8, "--memory", "low"]
    states = ["--states", task.scratch / "batch 4/states"]
    runs: dict[str, tuple[list, float | None]] = {
        "batch 4": ([*usual, "--batch", 4], None),
        "batch 4, no graph": ([*usual, "--batch", 4, "--no-graph", *states], None),
        "two steps": (["--trajectories", 8, "--steps", 20, "--batch", 4, "--student-steps", 2], None),
        "4 GB": ([*low, "--accumulate", 8], 3.5),
        "8 GB": (low, 7.5),
        "batch 16": ([*usual, "--batch", 16], None),
    }
    for name, (flags, gigabytes) in list(runs.items())[: 4 if task.dry else None]:
        flags = [*common, *flags, *(BRIEF_RUN if task.dry else []), "--out", task.scratch / name]
        yield name, attempt(timed_training, task, flags, gigabytes)
    yield "losses", {name: attempt(losses, task.scratch / name) for name in ("batch 4", "batch 4, no graph")}


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


STAGES = {"retrain": retrain, "distil": distil, "end_to_end": end_to_end}
