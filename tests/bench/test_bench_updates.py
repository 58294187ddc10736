"""The updates benchmark on tiny networks: every way, table and JSON, and that the ways do what they say."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import TINY_SIZE as TINY
from torch.utils._python_dispatch import TorchDispatchMode

from minidistill.bench import __main__ as bench
from minidistill.bench import timing
from minidistill.bench import updates as bench_updates
from minidistill.bench.updates import METHODS, WAYS, Way, markdown, measure, network, updates, ways
from minidistill.bench.workloads import SIZES, Setup
from minidistill.guidance import interval_noise

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "pocket", TINY)


@pytest.fixture
def setup() -> Setup:
    return Setup(TINY, CPU, torch.float32, rank=2, timed_steps=1)


def test_every_way_in_table_and_json(tmp_path: Path, capsys):
    out = tmp_path / "bench.json"
    bench.main(["updates", "--device", "cpu", "--rank", "2", "--repeats", "1", "--no-compile", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["command"].startswith("python -m minidistill.bench updates --device cpu") and report["commit"]
    result = report["sizes"]["pocket"]
    for method in METHODS:
        rows = result["methods"][method]
        assert list(rows) == ways(method, CPU, compiled=False) and rows["plain"]["to_plain"] == 1
        assert all(len(row["turns_s"]) == 1 and row["seconds"] > 0 for row in rows.values())
    printed = capsys.readouterr().out
    assert markdown("pocket", result["methods"]) in printed and "batch of 2, medians of 1 interleaved" in printed


def test_which_ways_make_a_difference_where():
    assert ways("noised", torch.device("cuda"), compiled=True) == list(WAYS)
    assert set(WAYS) - set(ways("trajectories", CPU, compiled=True)) == {
        "teacher in one call",
        "never waiting for the GPU",
        "compiled, in CUDA graphs",
    }
    assert all(not WAYS[name].compiled for name in ways("noised", CPU, compiled=False))


def test_networks_hold_the_same_numbers_in_each_dtype_and_layout(setup: Setup):
    plain = network(setup, Way())
    for way in (Way(channels_last=True), Way(weights=torch.bfloat16), WAYS["all"]):
        other = network(setup, way)
        for (name, p), (_, q) in zip(plain.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(p.to(q.dtype), q)
            assert q.dtype == (torch.float32 if "lora_" in name else way.weights)
        assert other.base.conv_in.weight.is_contiguous(memory_format=torch.channels_last) == way.channels_last
    assert plain.base.conv_in.weight.is_contiguous()


@pytest.mark.parametrize("method", METHODS)
def test_ways_learn_the_same(method: str, setup: Setup):
    expected = updates(setup, Way(), method, 2)()
    assert expected.shape == (2,) and expected[0] != expected[1]
    for name in ways(method, CPU, compiled=False):
        losses = updates(setup, WAYS[name], method, 2)()
        exact = WAYS[name].dtype == torch.float32
        assert (losses / expected - 1).abs().max() < (1e-4 if exact else 5e-2), name
        assert exact or not torch.equal(losses, expected), name


class Operations(TorchDispatchMode):
    """The names of the operations that the block calls."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.called.add(str(operation))
        return operation(*args, **(kwargs or {}))


def test_ways_compute_as_they_say(setup: Setup, unet_calls: list[int]):
    """The teacher in two calls on the batch of two, or in one on four; attention in one operation, or in several."""
    for name, sizes in (("plain", [2, 2, 2]), ("teacher in one call", [4, 2]), ("fused attention", [2, 2, 2])):
        unet_calls.clear()
        with Operations() as operations:
            updates(setup, WAYS[name], "noised", 1)()
        fused = any("flash_attention" in operation for operation in operations.called)
        assert unet_calls == sizes and fused == (name == "fused attention"), name


def test_losses_that_disagree_are_not_timed(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    def unguided(unet, z_t, t, cond, uncond, guidance, batched):
        return interval_noise(unet, z_t, t, cond, uncond, 1.0 if batched else guidance, batched=batched)

    monkeypatch.setattr(bench_updates, "interval_noise", unguided)
    monkeypatch.setattr(timing, "timed", lambda *args: pytest.fail("timed"))
    with pytest.raises(ValueError, match="noised, teacher in one call: the loss differs from the plain loop's by"):
        measure(setup, 1, 1, compiled=False)


def test_times_are_per_update(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_updates, "WAYS", {"plain": Way()})
    monkeypatch.setattr(timing, "timed", lambda turn, device: 6.0)
    rows = measure(setup, repeats=2, number=3, compiled=False)
    assert rows["noised"]["plain"] | {"difference": 0} == dict(seconds=2, to_plain=1, difference=0, turns_s=[2, 2])


@pytest.mark.slow
def test_compiled_ways(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda unet, mode, **how: partial(compile, backend="aot_eager")(unet, **how))
    torch._dynamo.reset()
    rows = measure(setup, 1, 1, compiled=True)
    assert {"compiled", "all"} <= set(rows["noised"]) and rows["noised"]["compiled"]["difference"] < 1e-4
    torch._dynamo.reset()
