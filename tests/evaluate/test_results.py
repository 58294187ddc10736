"""Dial, spectrum, sweeps and the summary: what makes the figures in results/."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from tiny import ROOT, fill_up, randn

from minidistill import StableDiffusion, inject_lora, load, load_lora, save_lora
from minidistill.bench.workloads import PEERS
from minidistill.data.trajectories import prompt_split, spread
from minidistill.evaluate import dial, everything, noise_error_share, spectrum, sweeps
from minidistill.formats.merged_checkpoint import replaced_by, write_checkpoint
from minidistill.lora import lora_layers

LEARNED = dict(base="tiny", guidance="3", negative_prompt="a cat", method="trajectories")


@pytest.fixture
def lora(sd: StableDiffusion, tmp_path: Path) -> Path:
    save_lora(fill_up(inject_lora(sd.unet, rank=2)), tmp_path / "lora.safetensors", LEARNED)
    return tmp_path / "lora.safetensors"


def test_the_dial(lora: Path, tiny_model: Path, tmp_path: Path):
    flags = ["--model", tiny_model, "--strengths", 0.5, 1, "--prompts", 3, "--steps", 2, "--out", tmp_path / "dial"]
    dial.main([str(lora), *map(str, flags)])
    found = json.loads((tmp_path / "dial/dial.json").read_text())
    assert [(row["strength"], row["guidance"]) for row in found["rows"]] == [(0.5, 2), (1, 3)]
    prompts = spread(prompt_split(tiny_model)[1], 3)
    options = dict(steps=2, negative_prompt="a cat")
    for row in found["rows"]:
        sd = load(tiny_model)
        sd.unet = load_lora(sd.unet, lora, row["strength"])
        share = noise_error_share(sd, prompts, guidance=row["guidance"], **options)
        whole = noise_error_share(sd, prompts, guidance=3, **options)
        assert row["noise error share"]["value"] == pytest.approx(share.pooled, rel=1e-4)
        assert row["found guidance"]["value"] == pytest.approx(
            1 + 2 * (whole.along.sum() / whole.gaps.sum()).item(), rel=1e-4
        )
    assert all(Image.open(tmp_path / "dial" / name).size[0] > 0 for name in ("dial.png", "dial-pictures.png"))


def test_spectrum_of_a_student_that_is_the_lora(lora: Path, tiny_model: Path, tmp_path: Path):
    """A full student that is W plus the LoRA of rank 2: two ranks hold all of it, and the changes are the same."""
    sd = load(tiny_model)
    unet = load_lora(sd.unet, lora)
    with torch.no_grad():
        for layer in lora_layers(unet).values():
            layer.weight += layer.delta()
    change = replaced_by(load_weights(tiny_model, unet.state_dict()))
    write_checkpoint(tiny_model, change, tmp_path / "full/student", LEARNED)
    flags = [tmp_path / "full", lora, "--model", tiny_model, "--out", tmp_path / "out"]
    spectrum.main([str(flag) for flag in flags])
    rows = json.loads((tmp_path / "out/spectrum.json").read_text())["rows"]
    assert {row["layer"] for row in rows} == set(lora_layers(unet))
    for row in rows:
        assert row["held"]["full"][1] > 1 - 1e-6 > row["held"]["full"][0] and row["cosine"] > 1 - 1e-6
        assert row["norm"]["full"] == pytest.approx(row["norm"]["lora"], rel=1e-4)
    assert Image.open(tmp_path / "out/spectrum.png").size[0] > 0
    with pytest.raises(ValueError, match="no run of --method full"):
        spectrum.main([str(flag) for flag in [tmp_path, *flags[1:]]])


def load_weights(model: Path, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    unet = load(model).unet
    unet.load_state_dict({name: x for name, x in weights.items() if ".lora_" not in name})
    return unet


def test_held_is_the_square_of_the_best_approximation():
    change = randn(6, 9, dtype=torch.float64)
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    for rank in (1, 3, 6):
        best = u[:, :rank] * s[:rank] @ v[:rank]
        missed = (change - best).square().sum() / change.square().sum()
        assert spectrum.held(change)[rank - 1] == pytest.approx(1 - missed.item(), abs=1e-9)


def test_a_sweep(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sweeps, "VALUES", {"layers": ("attention",)})
    flags = ["layers", "--model", tiny_model, "--trajectories", 16, "--updates", 2, "--prompts", 2, "--rank", 1]
    flags = [str(flag) for flag in [*flags, "--runs", tmp_path / "runs", "--out", tmp_path / "out"]]
    sweeps.main(flags)
    (row,) = json.loads((tmp_path / "out/sweeps.json").read_text())["layers"]["rows"]
    run = next((tmp_path / "runs").glob("rank 1*/lora.safetensors"))
    sd = load(tiny_model)
    unet = load_lora(sd.unet, run)
    assert all(".attn" in name for name in lora_layers(unet)) and row["value"] == "attention"
    assert row["parameters"] == sum(p.numel() for p in unet.parameters() if p.requires_grad)
    assert Image.open(tmp_path / "out/sweep-layers.png").size[0] > 0
    monkeypatch.setattr(sweeps, "measured", lambda *_: pytest.fail("done again"))
    sweeps.main(flags)
    monkeypatch.setattr(sweeps, "fingerprint", lambda *networks: "other weights, of the same name")
    with pytest.raises(pytest.fail.Exception, match="done again"):
        sweeps.main(flags)
    with pytest.raises(ValueError, match="no sweep called colour"):
        sweeps.main(["colour"])


def test_two_runs_that_are_alike_are_one():
    args = sweeps.Settings(sweeps=[])
    default = sweeps.training(args)
    assert sweeps.training(args, rank=args.rank) == sweeps.training(args, updates=args.updates) == default
    assert sweeps.training(args, rank=args.rank + 1) != default


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Two steps instead of hours; gives the commands that were run."""
    ran = []

    def run(command: list[str]) -> subprocess.CompletedProcess:
        ran.append(command[1:])
        return subprocess.CompletedProcess(command, 1 if "fails" in command else 0)

    monkeypatch.setattr(everything.subprocess, "run", run)
    monkeypatch.setattr(everything, "DONE", tmp_path / "done.json")
    monkeypatch.setattr(everything, "RESULTS", tmp_path)
    monkeypatch.setattr(everything, "summary", lambda results: {"of": str(results)})
    monkeypatch.setattr(everything, "STEPS", {"one": "train.py --out 'a b'", "two": "-m fails"})
    monkeypatch.setattr(everything, "SHIPPED", str(tmp_path / "student"))
    monkeypatch.setattr(everything, "JUDGE", "judge_that_needs_nothing")
    judge = ModuleType("judge_that_needs_nothing")
    judge.find_font = lambda font: None
    monkeypatch.setitem(sys.modules, "judge_that_needs_nothing", judge)
    (tmp_path / "student").write_bytes(b"one")
    return ran


needs_peers = pytest.mark.skipif(not all(map(find_spec, PEERS)), reason="diffusers or peft is not installed")


@needs_peers
def test_everything_goes_on_where_it_stopped(steps: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match='"two" ended with an error'):
        everything.run()
    assert steps == [["train.py", "--out", "a b"], ["-m", "fails"]] and not (tmp_path / "summary.json").exists()
    monkeypatch.setitem(everything.STEPS, "two", "-m works")
    everything.run()
    assert steps[2:] == [["-m", "works"]]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"of": str(tmp_path)}
    everything.run()
    assert len(steps) == 3  # all is done
    (tmp_path / "student").write_bytes(b"another")
    everything.run()
    assert len(steps) == 5


def test_what_is_missing_is_said_before_hours_of_work(steps: list[list[str]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(everything, "PEERS", ("a_package_that_is_not_there",))
    with pytest.raises(ValueError, match="a_package_that_is_not_there"):
        everything.run()
    assert not steps


def test_all_takes_no_other_flag():
    command = [sys.executable, "-m", "minidistill.evaluate", "--all", "--pictures", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "takes no other flag" in done.stderr


def interval(value: float) -> dict[str, float]:
    return dict(value=value, low=value - 0.1, high=value + 0.1)


def write(folder: Path, name: str, report: dict) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(report | {"command": f"makes {name}", "commit": "abc"}))


def test_the_summary(tmp_path: Path):
    """What it takes from where, on small files made up."""
    measures = {title: interval(i) for i, title in enumerate(everything.MEASURES.values())}
    rows = [{"method": name} | measures for name in ("teacher", "no guidance")]
    for row in rows:
        row.pop("noise error share")  # which neither has by measurement
    write(tmp_path, "evaluation/results.json", {"rows": [*rows, {"method": "guidance-lora"} | measures]})
    write(tmp_path, "memory.json", {"sizes": {"sd15": {"batch": 1}}})
    for size in ("pocket", "sd15"):
        write(tmp_path, f"memory-{size}.json", {"sizes": {size: {"batch": 2}}})
    timed = {
        "unet_compiled": {"peer_s": 4.0, "ours_to_peer": 0.5},  # its memory is not measured
        "guided": {"turns_s": {"ours": [3.0, 4.0, 9.0]}, "peer_s": None},
        "merged": {"turns_s": {"ours": [1.0, 2.0, 3.0]}, "to_guided": 0.51, "peer_s": None},
        "trajectories": {"ours_s": 2.0, "ours_bytes": 6, "peer_s": 4.0, "peer_bytes": 8, "ours_to_peer": 0.5},
        "noised": {"ours_s": 5.0, "ours_bytes": 9, "peer_s": 10.0, "peer_bytes": 12, "ours_to_peer": 0.5},
    }
    for size in ("pocket", "sd15"):
        write(tmp_path, f"bench-{size}.json", {"sizes": {size: {"rows": timed}}})

    found = everything.summary(tmp_path)
    source = {"command": "makes evaluation/results.json", "commit": "abc"}
    student = {name: interval(i) for i, name in enumerate(everything.MEASURES)}
    zero, one = (dict(value=x, low=x, high=x) for x in (0.0, 1.0))
    assert found["student"] == student | source
    assert found["teacher"] == student | source | {"noise_error_share": zero}
    assert found["unguided"] == student | source | {"noise_error_share": one}
    assert (found["time"]["unet_ratio"], found["time"]["picture_ratio"]) == (0.5, 0.51)
    assert found["memory"]["sd15"] == {"batch": 1}
    measured = {"batch": 2, "command": "makes memory-pocket.json", "commit": "abc"}
    assert found["memory"]["measured"]["pocket"] == measured
    peers = found["peers"]["sd15"]
    assert peers["unet_compiled"] == {"time": 0.5} and peers["noised"] == {"time": 0.5, "memory": 0.75}
    assert peers["trajectories to the peer's teacher in the loop"] == {"time": 0.2, "memory": 0.5}
    assert all(part["commit"] == "abc" for part in (found["time"], found["memory"], peers))


SUMMARY = ROOT / "results/summary.json"


@pytest.mark.skipif(not SUMMARY.exists(), reason="results/ has no summary")
def test_the_summary_that_is_here_is_of_the_files_beside_it():
    assert json.loads(SUMMARY.read_text()) == everything.summary(ROOT / "results")
