"""The stages of quarter_hour.py that train: the emoji model, its student, and a student of a large model."""

import io
import runpy
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import torch
from gpu_measurements import Figures, attempt, free_memory, new_setup, peak_gigabytes
from quarter_hour import ROOT, Task
from safetensors.torch import save_file
from tiny import losses, write_emoji, write_tiny

from minidistill.bench.loading import random_tensors
from minidistill.pocket import __main__ as pocket
from minidistill.pocket import images, judge, recognition
from minidistill.pocket.compositions import all_compositions
from minidistill.training.command_line import DEFAULT_MODEL

TOKENIZER = ROOT / DEFAULT_MODEL / "tokenizer"

# Measured on an H200: the UNet begins to train after 95 s, most of them spent in compilation, and then makes 48 updates
# a second; the decoder takes 74 s in all.
FURTHER = {
    "unet": ["--unet-steps", 8000, "--unet-batch", 512, "--unet-lr", 1.5e-3, "--renders", 32, "--compile", "--bf16"],
    "vae": ["--vae-steps", 2500, "--vae-batch", 64, "--bf16"],
}
BRIEFLY_FURTHER = {
    "unet": ["--unet-steps", 1, "--unet-batch", 2, "--renders", 1],
    "vae": ["--vae-steps", 1, "--vae-batch", 2],
}
# Meant to take six minutes, of which the UNet takes half. Not measured yet.
FROM_NOTHING = ["--clip-steps", 1000, "--vae-steps", 2500, "--vae-batch", 64, "--unet-steps", 5000, "--unet-batch", 512]
FROM_NOTHING += ["--renders", 16, "--bf16"]
BRIEFLY_FROM_NOTHING = ["--clip-steps", 1, "--clip-batch", 2, *BRIEFLY_FURTHER["vae"], *BRIEFLY_FURTHER["unet"]]
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
    """Put files of ``folder`` into an archive among the results."""
    with tarfile.open(task.out / name, "w:gz") as archive:
        for file in files:
            archive.add(file, file.relative_to(folder))


# The emoji model.


def emoji_images(task: Task) -> Path:
    """The package of emoji; dry: one of coloured blobs."""
    if not task.dry:
        return ROOT / images.PACKAGE
    folder = task.scratch / "emoji"
    return folder if folder.exists() else write_emoji(folder)


def tiny_world(task: Task) -> ExitStack:
    """Dry: what the emoji model is trained and judged with, made so small that it takes seconds."""
    changes = ExitStack()
    if task.dry:
        learned, held_out = ([c for c in all_compositions() if c.held_out == kind] for kind in (False, True))
        few = [*learned[:8], held_out[0], held_out[-1]]  # one held-out thing, and one pair
        changes.enter_context(patch.object(pocket, "all_compositions", lambda: few))
        # Of few captions it would have few words: keep the model's.
        changes.enter_context(patch.object(pocket, "write_tokenizer", lambda captions, folder: None))
        changes.enter_context(patch.object(images, "SIZES", 1))
        changes.enter_context(patch.object(recognition, "TEMPLATE_SIZES", 1))
        untrained = recognition.build_classifier
        changes.enter_context(patch.object(recognition, "train_classifier", lambda renderer: untrained()))
    return changes


def missing_images(task: Task) -> str | None:
    """Why the emoji model cannot be trained; None if it can."""
    there = task.dry or (ROOT / images.PACKAGE).is_dir()
    return None if there else f"there are no images in {images.PACKAGE}"


def retrain(task: Task) -> Figures:
    """Train the emoji model further, its UNet and then its VAE's decoder; each is packed as soon as it is done."""
    if reason := missing_images(task):
        yield "skipped", reason
        return
    model = shutil.copytree(ROOT / DEFAULT_MODEL, task.scratch / "pocket-emoji")
    flags = ["--out", model, "--emoji", emoji_images(task), *where(task)]
    with tiny_world(task):
        for part, further in (BRIEFLY_FURTHER if task.dry else FURTHER).items():
            yield part, run(pocket.main, "--more", part, *flags, *further)
            pack(task, f"model-{part}.tar.gz", model, sorted((model / part).iterdir()))


def from_nothing(task: Task) -> Figures:
    """Make the whole emoji model from random weights."""
    if reason := missing_images(task):
        yield "skipped", reason
        return
    model = task.scratch / "from-nothing"
    shutil.copytree(TOKENIZER, model / "tokenizer")  # a dry run writes none
    flags, start = BRIEFLY_FROM_NOTHING if task.dry else FROM_NOTHING, time.time()
    with tiny_world(task):
        yield "printed", run(pocket.main, "--out", model, "--emoji", emoji_images(task), *where(task), *flags)
    parts = {"clip": ["clip", "text_encoder"], "vae": ["vae"], "unet": ["unet"]}
    yield "seconds until", {part: (model / part / "config.json").stat().st_mtime - start for part in parts}
    for part, folders in parts.items():
        files = [file for name in folders for file in sorted((model / name).iterdir())]
        pack(task, f"model-{part}.tar.gz", model, files)


def distil(task: Task) -> Figures:
    """train.py with its report on the emoji model, the newest complete one, and the judge on teacher and student."""
    trained = [task.scratch / "from-nothing", task.scratch / "pocket-emoji", ROOT / DEFAULT_MODEL]
    model, out = next(model for model in trained if (model / "model_index.json").exists()), task.scratch / "distilled"
    yield "train.py", run(train, "--model", model, "--out", out, *where(task), *(BRIEF_RUN if task.dry else []))
    results = [out / "lora.safetensors", out / "metrics.jsonl", out / "report.md", *out.rglob("*.png")]
    pack(task, "student.tar.gz", out, results)

    work = task.scratch / "judge" if task.dry else ROOT / images.WORK
    if not task.dry and not (work / "judge.safetensors").exists():
        yield "judge", f"skipped: there is no {images.WORK}/judge.safetensors, its classifier"
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
    file = task.scratch / "sd15.safetensors"
    save_file(random_tensors(new_setup(task)), file)
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
    common = [*model, "--no-report", "--guidance", 2, "--lr", 1e-5, "--dtype", "bfloat16", "--kernel", "torch"]
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
        flags = [*common, *where(task), *flags, *(BRIEF_RUN if task.dry else []), "--out", task.scratch / name]
        yield name, attempt(timed_training, task, flags, gigabytes)
    yield "losses", {name: attempt(losses, task.scratch / name) for name in ("batch 4", "batch 4, no graph")}


STAGES = {"retrain": retrain, "from_nothing": from_nothing, "distil": distil, "end_to_end": end_to_end}
