"""The benchmark on tiny networks: every row, the table and the JSON, and the refusal to time what does not agree."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import TINY_SIZE as TINY
from tiny import error

from minidistill.bench import speed as bench
from minidistill.bench import workloads as contestants
from minidistill.bench.workloads import PEERS, PICTURES, ROWS, WITH_PEER, Setup
from minidistill.config import POCKET_UNET
from minidistill.guidance import guided_noise
from minidistill.lora import lora_layers
from minidistill.unet import UNet

needs_peers = pytest.mark.skipif(not all(map(find_spec, PEERS)), reason="diffusers or peft is not installed")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contestants.SIZES, "pocket", TINY)


def setup(dtype: torch.dtype = torch.float64, timed_steps: int = 3) -> Setup:
    return Setup(TINY, torch.device("cpu"), dtype, rank=4, timed_steps=timed_steps)


SELECTIVE = [f"selective_{part:g}" for part in bench.SELECTIVE]
MEASURED = [row for row in ROWS if row != "unet_compiled"]  # which is asked for


def run(out: Path, *flags: str) -> dict:
    bench.main(["--size", "pocket", "--repeats", "1", "--device", "cpu", "--out", str(out), *flags])
    return json.loads(out.read_text())


def test_every_row_in_table_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(bench, "peak_memory_elsewhere", lambda args, size, row, who: 5_000_000)
    report = run(tmp_path / "new/bench.json", "--memory")
    result = report["sizes"]["pocket"]
    assert list(result["rows"]) == MEASURED + SELECTIVE
    for name in MEASURED:
        row = result["rows"][name]
        peer = name in WITH_PEER and all(map(find_spec, PEERS))
        assert row["ours_s"] > 0 and row["ours_bytes"] == 5_000_000
        assert (row["peer_s"] is not None) == (row["difference"] is not None) == ("peer_bytes" in row) == peer
    assert [result["rows"][name]["calls"] for name in ("guided", "batched", "merged", SELECTIVE[1])] == [6, 3, 3, 4]
    assert report["command"].endswith("--memory") and report["versions"]["torch"] == torch.__version__

    printed = capsys.readouterr().out
    assert bench.markdown("pocket", result) in printed  # the JSON holds all that the table shows
    assert printed.count("\n| ") == len(result["rows"]) + 2
    assert not list(tmp_path.glob("**/*.tmp"))


def test_without_peers_their_columns_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(contestants, "find_spec", lambda package: None if package in PEERS else find_spec(package))
    for package in PEERS:
        monkeypatch.setitem(sys.modules, package, None)  # importing it is an error
    rows = run(tmp_path / "bench.json")["sizes"]["pocket"]["rows"]
    assert list(rows) == MEASURED + SELECTIVE and not any(row["peer_s"] for row in rows.values())
    printed = capsys.readouterr().out
    assert "| pocket | UNet calls | ours | of guided |\n" in printed
    assert "No peer beside ours" in printed


@needs_peers
def test_ours_and_the_peers_agree() -> None:
    case = setup()
    outputs = {(row, who): ROWS[row].make(case, who)() for row, who in contestants.contestants()}
    differences = bench.check_agreement(outputs, tolerance=1e-6)  # the losses are computed in float32
    assert max(differences["unet"], differences["unet_alike"], differences["guided"]) <= 1e-9
    assert set(differences) == set(WITH_PEER) - {"unet_compiled"}
    for two_calls, one_call in zip(outputs["guided", "ours"], outputs["batched", "ours"]):
        assert error(one_call, two_calls) <= 1e-9
    assert len(outputs["guided", "peer"]) == TINY.steps


def other_weights(case: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    case.peer_weights["conv_in.weight"].mul_(1.01)


def other_guidance(case: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestants, "guided_noise", lambda *args: guided_noise(*args[:-1], 1.01 * args[-1]))


def other_lora_scale(case: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_a_student(unet, *args):
        for layer in lora_layers(unet).values():
            layer.scale = 0.5
        return unet(*args, lora_enabled=True)

    monkeypatch.setattr(contestants, "student", half_a_student)


def teacher_with_lora(case: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def teacher(unet, *args):
        return guided_noise(lambda *inputs: unet(*inputs, lora_enabled=True).detach(), *args)

    monkeypatch.setattr(contestants, "teacher", teacher)


@needs_peers
@pytest.mark.parametrize(
    "change, row",
    [
        (other_weights, "unet"),
        (other_guidance, "guided"),
        (other_lora_scale, "trajectories"),
        (teacher_with_lora, "noised"),
    ],
)
def test_what_does_not_agree_is_not_timed(change, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = setup(torch.float32)
    change(case, monkeypatch)
    monkeypatch.setattr(bench, "timed", lambda *args: pytest.fail("timed"))
    with pytest.raises(ValueError, match=rf"{row}: ours and the peer's differ by \d"):
        bench.measure(case, repeats=1)


def test_no_agreement_on_nan() -> None:
    outputs = {("unet", "ours"): (torch.tensor([1.0, torch.nan]),), ("unet", "peer"): (torch.tensor([1.0, 2.0]),)}
    with pytest.raises(ValueError, match="differ by nan"):
        bench.check_agreement(outputs, tolerance=1.0)


def test_a_picture_is_its_steps_and_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "timed", lambda run, device: 2.0)
    rows = bench.measure(setup(torch.float32, timed_steps=1), repeats=3)
    pictures = {*PICTURES, *SELECTIVE}
    assert all(rows[name]["ours_s"] == (2 * TINY.steps + 2 if name in pictures else 2) for name in rows)
    assert rows["merged"]["to_guided"] == 1 and rows["unet"]["turns_s"]["ours"] == [2.0] * 3


def test_selective_guidance_costs_what_its_steps_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps of 2 s and 1 s and a decoder of 0.5 s."""
    turns = {name: 1.0 for name in MEASURED} | {"decode": 0.5, "guided": 2.0}
    names = iter([name for name, _ in contestants.contestants()])
    monkeypatch.setattr(bench, "timed", lambda run, device: turns[next(names)])
    rows = bench.measure(setup(torch.float32, timed_steps=1), repeats=1)
    assert TINY.steps == 3  # of which half are two, and a fifth is one
    assert rows["selective_0.5"]["ours_s"] == pytest.approx(2 * 1 + 1 * 2 + 0.5)
    assert rows["selective_0.2"]["to_guided"] == pytest.approx((1 * 1 + 2 * 2 + 0.5) / (3 * 2 + 0.5))


@pytest.mark.slow
def test_compiled_rows_agree(tmp_path: Path) -> None:
    rows = run(tmp_path / "bench.json", "--compile")["sizes"]["pocket"]["rows"]
    assert rows["unet_compiled"]["ours_s"] > 0


def test_weights_are_shared_and_survive_the_merged_row() -> None:
    case = setup(torch.float32)
    before = {name: x.clone() for name, x in case.weights.items()}
    assert all(p.data_ptr() == case.weights[name].data_ptr() for name, p in case.unet().named_parameters())
    ROWS["merged"].make(case, "ours")()
    assert all(torch.equal(x, before[name]) for name, x in case.weights.items())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="read from /proc")
def test_memory_of_a_fresh_process() -> None:
    args = bench.Settings(size=["pocket"], device="cpu", rank=2)
    peak = bench.peak_memory_elsewhere(args, "pocket", "unet", "ours")  # of the real pocket size
    with torch.device("meta"):
        weights = 4 * sum(p.numel() for p in UNet(POCKET_UNET).parameters())
    assert weights < peak < 10 * weights


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--row", "unet/theirs"], "unet/ours"),
        (["--row", "unet/ours", "--size", "pocket", "sd15"], "one --size"),
    ],
)
def test_bad_flags(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.main(["--device", "cpu", "--size", "pocket", *flags])
