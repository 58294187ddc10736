"""The stages of quarter_hour.py that measure. Each yields (name of a figure, figure); times are in milliseconds."""

import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from quarter_hour import ROOT, Task
from tiny import TINY_SIZE

from minidistill.bench import kernel, memory
from minidistill.bench.output import device_name
from minidistill.bench.timing import timed
from minidistill.bench.workloads import IMAGES, PEERS, SIZES, Setup, distil, error, sample
from minidistill.bench.workloads import forward as unet_call
from minidistill.kernels.build import obstacle
from minidistill.training.command_line import provenance
from minidistill.training.cuda_graph import graphed
from minidistill.training.recompute import low_memory

RANK = 16
Figures = Iterator[tuple[str, object]]
HAVE_PEERS = all(map(importlib.util.find_spec, PEERS))
SIDES = ("ours", "peer") if HAVE_PEERS else ("ours",)


# Shared by the stages.


def device(task: Task) -> torch.device:
    return torch.device("cpu" if task.dry else "cuda")


def new_setup(task: Task, batch: int = 1, kernel: str = "torch") -> Setup:
    """SD 1.5 with random weights in bfloat16; dry: a tiny one."""
    size = replace(TINY_SIZE if task.dry else SIZES["sd15"], batch=batch)
    return Setup(size, device(task), torch.bfloat16, RANK, timed_steps=size.steps, kernel=kernel)


def attempt(function: Callable, *args: object, **options: object) -> object:
    """What ``function`` returns; if it raises, a text that starts with "failed: "."""
    try:
        return function(*args, **options)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return f"failed: {error!r}"[:300]


def milliseconds(
    task: Task, run: Callable[[], object], repeats: int = 10, warm_up: int = 3, graph: bool = False
) -> float:
    """The median time of a call, launched kernel by kernel or as one CUDA graph."""
    run = graphed(run) if graph and not task.dry else run
    for _ in range(1 if task.dry else warm_up):
        run()
    return 1e3 * median(timed(run, device(task)) for _ in range(2 if task.dry else repeats))


def free_memory(task: Task) -> None:
    """Give unused memory back, and forget the peak so far."""
    if not task.dry:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gigabytes(task: Task) -> dict[str, float]:
    """Since ``free_memory``."""
    if task.dry:
        return {}
    peaks = {"tensors": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {name: size / 1e9 for name, size in peaks.items()}


# The stages.


def facts(task: Task) -> Figures:
    """What is measured, and what the GPU can do at most."""
    yield "commit", provenance("", [])["commit"]
    yield "versions", {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
    yield "cores", os.cpu_count()
    yield "device", device_name(device(task))
    yield "peers", "installed" if HAVE_PEERS else f"not installed: {' or '.join(PEERS)}"
    if task.dry:
        return
    yield "nvidia-smi", attempt(describe_gpu)
    operations, copied = kernel.limits(torch.bfloat16)
    yield "TFLOP/s", operations / 1e12
    yield "TB/s", copied / 1e12
    yield "attention", attempt(attention_kernels)


def describe_gpu() -> str:
    """Name, driver, clocks, limit of its power, memory."""
    query = "name,driver_version,clocks.sm,clocks.max.sm,power.limit,memory.total"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def gpu_kernels(profiler: torch.profiler.profile) -> list:
    """What ran on the GPU, in the order of its start."""
    return [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def attention_kernels() -> list[str]:
    """The GPU's kernels in SD 1.5's largest attention."""
    q = torch.randn(2, 8, 4096, 40, device="cuda", dtype=torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        F.scaled_dot_product_attention(q, q, q)
        torch.cuda.synchronize()
    return [event.name[:80] for event in gpu_kernels(profiler)]


def forward(task: Task) -> Figures:
    """A call of the UNet, ours and diffusers': launched one by one, and in a CUDA graph."""
    setup = new_setup(task)
    for batch, who in product((1,) if task.dry else (1, 2, 8), SIDES):
        call = unet_call(setup, who, alike=True, batch=batch)
        yield f"{who}, batch {batch}", attempt(milliseconds, task, call)
        yield f"{who}, batch {batch}, graph", attempt(milliseconds, task, call, graph=True)
    ours = unet_call(setup, "ours", batch=8)
    if HAVE_PEERS:
        yield "largest difference", error(ours(), unet_call(setup, "peer", alike=True, batch=8)())
    torch.backends.cudnn.benchmark = True
    yield "ours, batch 8, graph, cudnn.benchmark", attempt(milliseconds, task, ours, graph=True)
    torch.backends.cudnn.benchmark = False
    yield "ours, batch 8, graph, channels first", attempt(channels_first, task, setup)


@torch.no_grad()
def channels_first(task: Task, setup: Setup) -> float:
    """A call with W and activations channels first: is the copying around group norm what channels last costs?"""
    unet = setup.unet(copy=True).to(memory_format=torch.contiguous_format)
    t = torch.full((8,), 621, device=setup.device)
    return milliseconds(task, partial(unet, setup.latents(8), t, setup.contexts(8)[0]), graph=True)


def start_tests(task: Task, name: str, *flags: str) -> subprocess.Popen:
    """Run a part of the GPU tests."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/gpu/test_kernels_gpu.py", *flags]
    command += ["--version"] if task.dry else []  # without a GPU they would all be skipped
    with (task.logs / f"{name}.txt").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def finish_tests(task: Task, name: str, process: subprocess.Popen) -> str:
    """The last line of pytest, after "failed: " unless tests passed. A test that hangs is killed after this stage."""
    try:
        code = process.wait(max(task.ends - time.monotonic() - 10, 1))
    except subprocess.TimeoutExpired:
        code = "out of time"
    lines = (task.logs / f"{name}.txt").read_text(errors="replace").splitlines() or [""]
    passed = code == 0 and (task.dry or " passed" in lines[-1])  # without the kernel all tests are skipped
    return lines[-1].strip("= ") if passed else f"failed: {code}; {lines[-1]}"


def kernel_tests(task: Task) -> Figures:
    """The GPU tests, all parts at once, as nothing is timed here; several processes where pytest-xdist is installed."""
    build = task.logs / "build.txt"
    workers = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    parts = {"tests": ["-k", "not sanitizer and not convolutions", *workers], "convolutions": ["-k", "convolutions"]}
    if shutil.which("compute-sanitizer") and not task.dry:
        tools = ("memcheck", "racecheck", "synccheck", "initcheck")
        parts |= {tool: ["-k", f"sanitizer and {tool}"] for tool in tools}
    processes = {name: start_tests(task, name, *flags) for name, flags in parts.items()}
    for name, process in processes.items():
        yield name, finish_tests(task, name, process)
    yield "build", build.read_text().strip()[-600:] if build.exists() else ""


def no_kernel(task: Task) -> str | None:
    """Load the fused kernel into this process; returns what prevents it. Dry: its reference is always there."""
    return None if task.dry else obstacle(device(task))


def updates(task: Task) -> Figures:
    """An update of train.py from stored predictions: ours in plain PyTorch and with the fused kernel, and peft's."""
    cases = [("ours", "torch"), ("ours", "fused"), ("ours", "auto"), ("peer", "torch")]
    if reason := no_kernel(task):
        yield "ours, fused", f"failed: {reason}"
        cases = [case for case in cases if case[1] == "torch"]
    for batch, (who, which) in product((1,) if task.dry else (1, 4, 8, 16), cases):
        if who not in SIDES or who == "peer" and batch not in (1, 8):
            continue
        name = f"{who}, {which}, batch {batch}"
        update = attempt(distil, new_setup(task, batch, which), who, teacher_in_loop=False)
        if isinstance(update, str):  # it failed; the other cases may still work
            yield name, update
            continue
        free_memory(task)
        yield f"{name}, fused AdamW", attempt(milliseconds, task, update, 5)
        yield f"{name}, peak GB", peak_gigabytes(task)
        yield f"{name}, fused AdamW, graph", attempt(milliseconds, task, update, 5, graph=True)


def rows_of(shape: kernel.Shape) -> list[dict]:
    """What ``bench kernel`` measures for a layer."""
    return kernel.measure(shape, RANK, torch.bfloat16, repeats=8, compiled=False)


def dry_rows_of(shape: kernel.Shape) -> list[dict]:
    """The same on a CPU, where the kernel is its reference and nothing can be recorded."""
    with patch.object(kernel, "seconds", lambda run, repeats, in_graph: timed(run, torch.device("cpu"))):
        return kernel.measure(shape, RANK, torch.float32, repeats=1, compiled=False, device="cpu")


def table(task: Task) -> Figures:
    """``bench kernel`` at rank 16, without torch.compile. The figure of a layer is its rows."""
    if reason := no_kernel(task):
        raise RuntimeError(reason)
    shapes = dict.fromkeys([*kernel.STUDY, *kernel.layer_shapes()])
    rows = []
    for shape in [kernel.Shape(64, 24, 16)] if task.dry else shapes:
        if task.ends - time.monotonic() < 5:
            break
        figure = attempt(dry_rows_of if task.dry else rows_of, shape)
        yield f"{shape.M} x {shape.K} -> {shape.N}", figure
        rows += figure if isinstance(figure, list) else []
        (task.logs / "kernel-table.md").write_text(kernel.markdown(rows) if rows else "")
    yield "layers", f"{len(rows) // 4} of {len(shapes)}"


def image_time(task: Task, setup: Setup, who: str, how: str) -> float:
    return milliseconds(task, sample(setup, who, how), repeats=2, warm_up=1)


def images(task: Task) -> Figures:
    """The UNet calls of an image: guided by two a step, or one on a batch of two; the student's, merged and not."""
    setup = new_setup(task)
    cases = [("ours", how) for how in IMAGES] + [("peer", "guided")] * HAVE_PEERS
    for who, how in cases:
        yield f"{who}, {how}", attempt(image_time, task, setup, who, how)


def memory_peaks(task: Task) -> Figures:
    """Peaks beside those that the ledger counts."""
    report = json.loads((ROOT / "results/memory.json").read_text(encoding="utf-8"))
    rows = ("sampling", "full", "plain", "noised", "trajectories")
    for name in [f"{row}/bfloat16" for row in rows[: 1 if task.dry else None]]:
        case, size = memory.CASES[name], new_setup(task).size
        free_memory(task)
        yield f"{name}, measured", attempt(memory.measured, case, size, device(task), RANK)
        yield f"{name}, ledger", report["sizes"]["sd15"]["rows"][name]["peak"]
    xl = new_setup(task).size if task.dry else SIZES["sdxl"]  # docs/gpus-and-memory.md has its ledger, for batches of 4
    low = memory.Case("noised", below=low_memory(xl.unet))
    cases = {"sdxl, sampling": memory.Case("sampling"), "sdxl, noised with --memory low": low}
    cases["sdxl, the same with --weights float8"] = low._replace(float8=True)
    for name, case in cases.items():
        free_memory(task)
        yield f"{name}, measured", attempt(memory.measured, case, xl, device(task), RANK)


MOVES = ("copy", "nchwtonhwc", "nhwctonchw", "transpose")  # in the names of kernels that only move numbers


def profile(task: Task) -> Figures:
    """Where an update's time goes on the GPU."""
    update = distil(new_setup(task, batch=1 if task.dry else 8), "ours", teacher_in_loop=False)
    for _ in range(2):
        update()
    with torch.profiler.profile() as profiler:
        timed(update, device(task))
    order = "self_cpu_time_total" if task.dry else "self_cuda_time_total"
    (task.logs / "profile.txt").write_text(profiler.key_averages().table(sort_by=order, row_limit=40))
    kernels = gpu_kernels(profiler)
    moving = [e for e in kernels if any(word in e.name.lower() for word in MOVES)]
    yield "kernels", len(kernels)
    yield "kernels that only move numbers", len(moving)
    yield "ms", sum(e.self_device_time_total for e in kernels) / 1e3
    yield "ms of moving", sum(e.self_device_time_total for e in moving) / 1e3


def compiled(task: Task) -> Figures:
    """A UNet call under torch.compile, which compiles for a minute first; dry: not compiled."""
    call = unet_call(new_setup(task), "ours", compiled=not task.dry)
    yield "first call", 1e3 * timed(call, device(task))
    yield "batch 1", milliseconds(task, call)
    yield "batch 1, graph", milliseconds(task, call, graph=True)


STAGES = {
    "facts": facts,
    "forward": forward,
    "kernel": kernel_tests,
    "updates": updates,
    "table": table,
    "images": images,
    "memory": memory_peaks,
    "profile": profile,
    "compiled": compiled,
}
