"""The speed benchmark on tiny networks: rows, table, JSON, and the refusal to time outputs that disagree."""

import json
import math
import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import ROOT, TINY_XL_UNET, error
from tiny import TINY_SIZE as TINY

from minidistill.bench import __main__ as bench
from minidistill.bench import speed, timing, workloads
from minidistill.bench.counting import Work
from minidistill.bench.output import find_device
from minidistill.bench.peak_memory import in_fresh_process
from minidistill.bench.workloads import IMAGES, PEERS, ROWS, SIZES, Setup
from minidistill.config import POCKET_UNET
from minidistill.guidance import guided, guided_noise
from minidistill.lora import LoRAModel, lora_layers
from minidistill.unet import UNet

needs_peers = pytest.mark.skipif(not all(map(find_spec, PEERS)), reason="diffusers or peft is not installed")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "pocket", TINY)


def setup(dtype: torch.dtype = torch.float64, timed_steps: int = 3) -> Setup:
    return Setup(TINY, torch.device("cpu"), dtype, rank=4, timed_steps=timed_steps)


SELECTIVE = [f"selective_{part:g}" for part in speed.SELECTIVE]
MEASURED = [row for row in ROWS if row != "unet_compiled"]  # which needs --compile
WITH_PEER = {row for row in ROWS if ROWS[row].peer}


def run(out: Path, *flags: str) -> dict:
    bench.main(["--size", "pocket", "--repeats", "1", "--device", "cpu", "--out", str(out), *flags])
    return json.loads(out.read_text())


def test_every_row_in_table_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(speed, "in_fresh_process", lambda function, setup, row, who: 5_000_000)
    report = run(tmp_path / "new/bench.json", "--memory")
    result = report["sizes"]["pocket"]
    assert list(result["rows"]) == MEASURED + SELECTIVE
    for name in MEASURED:
        row = result["rows"][name]
        peer = name in WITH_PEER and all(map(find_spec, PEERS))
        assert row["ours_s"] > 0 and row["ours_bytes"] == 5_000_000
        assert (row["peer_s"] is not None) == (row["difference"] is not None) == ("peer_bytes" in row) == peer
    assert [result["rows"][name]["calls"] for name in ("guided", "batched", "merged", SELECTIVE[1])] == [6, 3, 3, 4]
    assert report["command"].startswith("python -m minidistill.bench speed --size pocket")
    assert report["command"].endswith("--memory") and report["commit"]
    assert "partial" not in report
    assert report["torch"] == torch.__version__ and report["versions"]["torch"] == version("torch")

    printed = capsys.readouterr().out
    assert speed.markdown("pocket", result) in printed  # the JSON holds everything that the table shows
    assert printed.count("\n| ") == len(result["rows"]) + 2
    assert not list(tmp_path.glob("**/*.tmp"))


def test_what_is_compared_takes_turns() -> None:
    order: list[str] = []
    seconds = timing.take_turns({name: partial(order.append, name) for name in "ab"}, 2, torch.device("cpu"))
    assert order == list("abab") and [len(seconds[name]) for name in "ab"] == [2, 2]


def test_times_are_kept_if_a_peak_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise ChildProcessError("out of memory")

    monkeypatch.setattr(speed, "in_fresh_process", killed)
    with pytest.raises(ChildProcessError):
        run(tmp_path / "bench.json", "--memory")
    report = json.loads((tmp_path / "bench.json").read_text())
    assert list(report["sizes"]["pocket"]["rows"]) == MEASURED + SELECTIVE and report["partial"]


def test_without_peers_their_columns_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(speed, "find_spec", lambda package: None if package in PEERS else find_spec(package))
    for package in PEERS:
        monkeypatch.setitem(sys.modules, package, None)  # importing it raises
    rows = run(tmp_path / "bench.json")["sizes"]["pocket"]["rows"]
    assert list(rows) == MEASURED + SELECTIVE and not any(row["peer_s"] for row in rows.values())
    printed = capsys.readouterr().out
    assert "| pocket | UNet calls | ours | / guided |\n" in printed
    assert "Measured without diffusers and peft." in printed


@pytest.mark.parametrize("file", ["bench-pocket.json", "bench-sd15.json"])
def test_the_rows_in_results_have_todays_names(file: str) -> None:
    for size in json.loads((ROOT / "results" / file).read_text())["sizes"].values():
        labels = {name: row["label"] for name, row in size["rows"].items()}
        today = {name: row.label for name, row in ROWS.items()}
        today |= {name: row["label"] for name, row in speed.selective_rows(size["rows"], size["steps"]).items()}
        assert labels == {name: today[name] for name in labels}


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--row", "unet"], ["unet"]),
        (["--row", "merged", "guided"], ["decode", "guided", "merged", *SELECTIVE]),  # an image includes the decoder
        (["--row", "merged", "--no-peers"], ["decode", "merged"]),
        (["--row", "noised", "--no-peers"], ["noised"]),
    ],
)
def test_chosen_rows(flags: list[str], expected: list[str], tmp_path: Path) -> None:
    rows = run(tmp_path / "bench.json", *flags)["sizes"]["pocket"]["rows"]
    assert list(rows) == expected
    peers = all(map(find_spec, PEERS)) and "--no-peers" not in flags
    assert all((row["peer_s"] is not None) == (peers and name in WITH_PEER) for name, row in rows.items())
    assert ("guided" in rows) == any(row["to_guided"] is not None for row in rows.values())


def test_compile_adds_its_row() -> None:
    assert speed.chosen_rows(Namespace(row=["unet"], compile=True)) == ["unet", "unet_compiled"]


@needs_peers
def test_ours_and_the_peers_agree() -> None:
    case = setup()
    outputs = {(row, who): ROWS[row].make(case, who)() for row, who in speed.contestants(MEASURED)}
    differences = speed.check_agreement(outputs, tolerance=1e-6)
    assert max(differences["unet"], differences["unet_alike"], differences["guided"]) <= 1e-9
    assert set(differences) == WITH_PEER - {"unet_compiled"}
    for two_calls, one_call in zip(outputs["guided", "ours"], outputs["batched", "ours"]):
        assert error(one_call, two_calls) <= 1e-9
    assert len(outputs["guided", "peer"]) == TINY.steps


def other_weights(case: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    case.peer_weights["conv_in.weight"].mul_(1.01)


def other_guidance(case: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "guided", lambda *args: guided(*args[:-1], 1.01 * args[-1]))


def other_lora_scale(case: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    lora_unet = Setup.lora_unet

    def half_a_student(setup: Setup, zero: bool = False) -> LoRAModel:
        unet = lora_unet(setup, zero)
        for layer in lora_layers(unet).values():
            layer.scale = 0.5
        return unet

    monkeypatch.setattr(Setup, "lora_unet", half_a_student)


def teacher_with_lora(case: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def our_teacher_with_lora(unet, *args):
        return guided_noise(partial(unet, lora_enabled=True) if isinstance(unet, LoRAModel) else unet, *args)

    monkeypatch.setattr(workloads, "guided_noise", our_teacher_with_lora)


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
def test_outputs_that_disagree_are_not_timed(change, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = setup(torch.float32)
    change(case, monkeypatch)
    monkeypatch.setattr(timing, "timed", lambda *args: pytest.fail("timed"))
    with pytest.raises(ValueError, match=rf"{row}: our output and the peer's differ by \d"):
        speed.measure(case, 1, [row])


def test_the_work_of_a_row_is_that_of_its_calls() -> None:
    """An image with the LoRA merged takes as much as one without a LoRA; what is recomputed takes more."""

    def work(row: str) -> int:
        run = ROWS[row].make(replace(setup(), size=replace(TINY, batch=1)), "ours")
        with Work() as counted:
            run()
        return counted.multiply_adds

    call = work("unet")
    assert work("merged") == TINY.steps * call < work("unmerged")
    assert work("guided") == work("batched") == 2 * TINY.steps * call
    assert work("noised") - work("trajectories") == 2 * call
    assert work("recomputed") > work("trajectories")


def test_nan_never_agrees() -> None:
    outputs = {("unet", "ours"): (torch.tensor([1.0, torch.nan]),), ("unet", "peer"): (torch.tensor([1.0, 2.0]),)}
    with pytest.raises(ValueError, match="differ by nan"):
        speed.check_agreement(outputs, tolerance=1.0)


def test_an_image_is_its_steps_and_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "timed", lambda run, device: 2.0)
    rows = speed.measure(setup(torch.float32, timed_steps=1), 3, MEASURED)
    images = {*IMAGES, *SELECTIVE}
    assert all(rows[name]["ours_s"] == (2 * TINY.steps + 2 if name in images else 2) for name in rows)
    assert rows["merged"]["to_guided"] == 1 and rows["unet"]["turns_s"]["ours"] == [2.0] * 3


def test_selective_guidance_costs_what_its_steps_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps of 2 s and 1 s and a decoder of 0.5 s."""
    turns = {name: 1.0 for name in MEASURED} | {"decode": 0.5, "guided": 2.0}
    names = iter([name for name, _ in speed.contestants(MEASURED)])
    monkeypatch.setattr(timing, "timed", lambda run, device: turns[next(names)])
    rows = speed.measure(setup(torch.float32, timed_steps=1), 1, MEASURED)
    assert TINY.steps == 3  # half of them is two steps, a fifth is one
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


POCKET = Setup(replace(TINY, unet=POCKET_UNET, tokens=20), torch.device("cpu"), torch.float32, rank=2)
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def our_peak() -> int:
    return in_fresh_process(speed.peak_memory, POCKET, "unet_alike", "ours")


@needs_proc
def test_memory_of_a_fresh_process(our_peak: int) -> None:
    with torch.device("meta"):
        weights = 4 * sum(p.numel() for p in UNet(POCKET_UNET).parameters())
    assert weights < our_peak < 10 * weights


@needs_peers
@needs_proc
def test_the_peers_memory_is_without_its_imports(our_peak: int) -> None:
    """A UNet call with the same weights takes what ours takes; importing diffusers' UNet takes 38 MB more."""
    assert in_fresh_process(speed.peak_memory, POCKET, "unet_alike", "peer") < 1.3 * our_peak


def test_a_fresh_process_that_fails_is_named() -> None:
    assert in_fresh_process(math.sqrt, 4.0) == 2.0
    with pytest.raises(ValueError, match=r"(?s)sqrt\(-1.0\) failed with exit code 1:\n.*ValueError"):
        in_fresh_process(math.sqrt, -1.0)


def test_an_unknown_command_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        bench.main(["sped"])
    assert "invalid choice: 'sped'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("command", ["speed", "updates", "memory"])
def test_without_a_gpu_it_says_so(command: str) -> None:
    with pytest.raises(ValueError, match="no CUDA device here: use --device cpu"):
        bench.main([command, "--device", "cuda", *(["--measure"] if command == "memory" else [])])


def test_an_unknown_device_is_named() -> None:
    for needed in (True, False):
        with pytest.raises(ValueError, match="--device gpu: "):
            find_device("gpu", needed)


@needs_peers
@pytest.mark.parametrize("row", ["unet_alike", "guided", "noised"])
def test_sdxl_beside_its_peers(row: str) -> None:
    xl = Setup(replace(TINY, unet=TINY_XL_UNET), torch.device("cpu"), torch.float64, rank=4, timed_steps=2)
    ours, theirs = (ROWS[row].make(xl, who)() for who in ("ours", "peer"))
    assert workloads.error(ours, theirs) <= 1e-9
