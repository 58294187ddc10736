"""The memory ledger against a network counted by hand, the sizes of parameters, and torch's own allocator."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY_SIZE as TINY
from tiny import real_tensors
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from minidistill.bench import __main__ as bench
from minidistill.bench import memory
from minidistill.bench.counting import Live
from minidistill.bench.memory import CASES, Case, ledger
from minidistill.bench.peak_memory import in_fresh_process
from minidistill.bench.workloads import SIZES, attention
from minidistill.lora import inject_lora
from minidistill.unet import UNet

RANK = 4
COUNTED = dict.fromkeys(("weights", "gradients", "optimizer", "saved", "peak"), 100)
CPU = torch.device("cpu")


@cache
@real_tensors()
def tiny(case: Case, **how) -> dict[str, int]:
    return ledger(case, TINY, RANK, **how)


def parameters(lora: bool = False) -> list[nn.Parameter]:
    with torch.device("meta"):
        unet = UNet(TINY.unet)
        return list((inject_lora(unet, RANK) if lora else unet).parameters())


@pytest.mark.parametrize("fake", [True, False])
def test_a_network_counted_by_hand(fake: bool) -> None:
    """x [2, 4] -> x w^T [2, 8] -> relu -> sum, 4 bytes a number."""
    with FakeTensorMode() if fake else nullcontext(), Live() as live:
        x, w = torch.ones(2, 4), torch.ones(8, 4, requires_grad=True)
        assert live.bytes == 32 + 128
        y = F.linear(x, w)
        assert live.bytes == 160 + 64
        y = y.relu()  # its backward pass needs the result, not the input
        assert live.bytes == 160 + 64 and live.peak == 160 + 64 + 64
        view = y.view(4, 4)[1:]
        assert live.bytes == 160 + 64
        del view
        loss = y.sum()
        del y
        assert live.bytes == 160 + 64 + 4
        loss.backward()
        del loss
        assert live.bytes == 160 + 128  # the gradient
        assert live.peak == 160 + 4 + 4 + 64 + 128  # with the loss, and the gradients of loss and relu
    del x, w
    assert live.bytes == 0


@pytest.mark.parametrize("dtype, itemsize", [("float32", 4), pytest.param("bfloat16", 2, marks=pytest.mark.slow)])
def test_columns_match_the_parameters(dtype: str, itemsize: int) -> None:
    numbers, tensors = sum(p.numel() for p in parameters()), len(parameters())
    pairs = [p for p in parameters(lora=True) if p.requires_grad]
    low_rank = sum(p.numel() for p in pairs)
    weights = itemsize * numbers
    step = 4  # AdamW counts the updates of each tensor

    sampling = tiny(CASES[f"sampling/{dtype}"])
    assert (sampling["weights"], sampling["saved"]) == (weights, 0) and weights < sampling["peak"]
    assert sampling["gradients"] == sampling["optimizer"] == 0

    full, plain = tiny(CASES[f"full/{dtype}"]), tiny(CASES[f"plain/{dtype}"])
    assert full["weights"] == full["gradients"] == plain["gradients"] == weights
    assert full["optimizer"] == plain["optimizer"] == 2 * weights + step * tensors
    assert plain["weights"] == 2 * weights
    assert plain["saved"] == full["saved"] + 4 * TINY.batch * 4 * 8 * 8  # the teacher's prediction

    noised, trajectories = tiny(CASES[f"noised/{dtype}"]), tiny(CASES[f"trajectories/{dtype}"])
    assert noised["weights"] == trajectories["weights"] == weights + 4 * low_rank  # the LoRA is always float32
    assert noised["gradients"] == trajectories["gradients"] == 4 * low_rank
    assert noised["optimizer"] == 8 * low_rank + step * len(pairs)
    assert noised["saved"] >= trajectories["saved"]


@pytest.mark.parametrize("row", ["full", "noised"])
def test_recomputation_lowers_saved_and_no_other_column(row: str) -> None:
    kept, recomputed = tiny(CASES[f"{row}/float32"]), tiny(CASES[f"{row}/float32/recompute"])
    assert recomputed["saved"] < kept["saved"] / 2 and recomputed["peak"] < kept["peak"]
    assert all(recomputed[column] == kept[column] for column in ("weights", "gradients", "optimizer"))


def test_on_cuda_adamw_copies_what_it_trains() -> None:
    recompute = tiny(CASES["full/float32/recompute"]), tiny(CASES["full/float32/recompute"], foreach=True)
    assert 5 * recompute[1]["weights"] <= recompute[1]["peak"] and recompute[0]["peak"] < recompute[1]["peak"]


def test_keeping_attention_matrices() -> None:
    fused = tiny(CASES["full/float32"])["saved"]
    with attention(fused=False):
        kept = tiny.__wrapped__(CASES["full/float32"])["saved"]  # not the one in the cache
    heads, tokens = 2, 64
    assert kept - fused >= 3 * 4 * TINY.batch * heads * tokens**2  # at the finer level: once down, twice up


def test_8_bits_halve_w_and_change_no_other_column() -> None:
    """W of the blocks: a byte a number, and a scale of four bytes a tensor. The peak has one product of W at a time."""
    plain, small = (tiny(Case("noised", "bfloat16", float8=how)) for how in (False, True))
    with torch.device("meta"):
        stored = [p for name, p in UNet(TINY.unet).named_parameters() if p.ndim > 1 and "block" in name]
    assert plain["weights"] - small["weights"] == sum(p.numel() - 4 for p in stored)
    assert all(small[column] == plain[column] for column in ("gradients", "optimizer"))
    assert small["saved"] == pytest.approx(plain["saved"], rel=0.01)
    assert plain["peak"] - small["peak"] > sum(p.numel() for p in stored) - 2 * 2 * max(p.numel() for p in stored)


def test_fake_tensors_are_counted_as_real_ones() -> None:
    case = Case("noised", "bfloat16", below=math.inf, float8=True)
    fake, real = ledger(case, TINY, RANK), tiny(case)
    assert fake.keys() == real.keys() and all(0 <= real[column] - fake[column] < 2048 for column in fake)


def saved_bytes(case: Case) -> int:
    """What autograd's own hooks see it keep of real tensors, without parameters and inputs."""
    update = case.update(TINY, CPU, RANK, foreach=False)
    known = {p.untyped_storage().data_ptr() for p in update.weights}
    saved: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        saved.setdefault(x.untyped_storage().data_ptr(), x)  # kept alive, so that its address is not reused
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = update.loss()
    assert loss.grad_fn is not None
    return sum(x.untyped_storage().nbytes() for address, x in saved.items() if address not in known)


@pytest.mark.parametrize(
    "name", ["full/float32", "noised/float32", pytest.param("noised/bfloat16", marks=pytest.mark.slow)]
)
def test_saved_is_what_autograd_keeps_of_real_tensors(name: str) -> None:
    """The inputs, which the ledger does not count, are less than one per cent."""
    assert saved_bytes(CASES[name]) == pytest.approx(ledger(CASES[name], TINY, RANK)["saved"], rel=0.01)


@pytest.mark.parametrize(
    "case",
    [
        CASES["full/float32"],
        pytest.param(CASES["noised/float32/recompute"], marks=pytest.mark.slow),
        pytest.param(Case("noised", "float32", below=100, float8=True), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_peak_is_the_allocators(case: Case, tmp_path: Path) -> None:
    """On real tensors: torch's profiler logs every allocation, also inside kernels.

    The batch is so large that activations take more memory than weights.
    """
    size = replace(TINY, batch=16)
    update = case.update(size, CPU, RANK, foreach=False)
    update()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        update()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    logged = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    totals = [e["args"]["Total Allocated"] for e in logged]
    above = max(totals) - (totals[0] - logged[0]["args"]["Bytes"])
    row = ledger(case, size, RANK)
    assert above + row["weights"] + row["optimizer"] == pytest.approx(row["peak"], rel=0.01)


def test_table_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(SIZES, "pocket", TINY)
    monkeypatch.setattr(memory, "LARGEST_MEASURED", 0)
    counted = {"weights": 2_000_000, "gradients": 0, "optimizer": 0, "saved": 0}
    peaks = {"full": 5_000_000}
    monkeypatch.setattr(memory, "ledger", lambda case, *_, **__: counted | {"peak": peaks.get(case.row, 4_000_000)})
    bench.main(["memory", "--size", "pocket", "--out", str(tmp_path / "memory.json"), "--measure", "--device", "cpu"])
    report = json.loads((tmp_path / "memory.json").read_text())
    rows = report["sizes"]["pocket"]["rows"]
    assert "partial" not in report
    assert list(rows) == list(CASES) and rows["full/float32"]["measured"] is None  # too large
    assert "| plain distillation | bfloat16 | yes | 2 | 0 | 0 | 0 | 4 | -20% |  |  |" in capsys.readouterr().out
    assert report["command"].startswith("python -m minidistill.bench memory --size pocket --out")
    bench.main(["memory", "--size", "pocket", "--out", str(tmp_path / "half.json"), "--dtype", "bfloat16"])
    half = json.loads((tmp_path / "half.json").read_text())["sizes"]["pocket"]["rows"]
    assert list(half) == [name for name in CASES if "bfloat16" in name]


def test_a_table_that_is_stopped_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where all rows of the first size are there."""
    rows = [COUNTED] * len(CASES)
    monkeypatch.setattr(memory, "ledger", lambda *_, **__: dict(rows.pop()))
    with pytest.raises(IndexError):
        bench.main(["memory", "--size", "pocket", "sd15", "--out", str(tmp_path / "memory.json")])
    report = json.loads((tmp_path / "memory.json").read_text())
    assert report["partial"] and list(report["sizes"]["pocket"]["rows"]) == list(CASES)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
convolutions = pytest.mark.xfail(reason="the CPU's convolutions take workspaces, which count at so small a size")


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("size", ["sd15", pytest.param("pocket", marks=convolutions)])
def test_measured_against_the_ledger(size: str) -> None:
    case = CASES["noised/float32"]
    peak = in_fresh_process(memory.measured, case, SIZES[size], CPU, 16, **memory.RETURN_FREED_MEMORY)
    assert peak == pytest.approx(ledger(case, SIZES[size])["peak"], rel=0.1)


def test_measured_peaks_are_of_fresh_processes_with_the_case_and_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setitem(SIZES, "pocket", TINY)
    monkeypatch.setattr(memory, "ledger", lambda *_, **__: dict(COUNTED))
    monkeypatch.setattr(memory, "in_fresh_process", lambda *args, **env: calls.append((args, env)) or 110)
    flags = ["--size", "pocket", "--device", "cpu", "--rank", "3", "--keep-attention", "--measure"]
    bench.main(["memory", *flags, "--out", str(tmp_path / "memory.json")])
    rows = json.loads((tmp_path / "memory.json").read_text())["sizes"]["pocket"]["rows"]
    assert all(row["measured"] == 110 for row in rows.values())
    expected = [((memory.measured, case, TINY, CPU, 3, True), memory.RETURN_FREED_MEMORY) for case in CASES.values()]
    assert calls == expected
