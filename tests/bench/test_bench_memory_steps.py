"""``bench memory --steps`` and ``--cards`` on the tiny network; the targets of the large ones are slow."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import ROOT, TINY_SIZE, real_tensors, tiny_unet, unet_inputs
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from minidistill.bench import __main__ as bench
from minidistill.bench import memory
from minidistill.bench.counting import Work
from minidistill.bench.memory import (
    CARDS,
    INSTEAD,
    STEPS,
    XL_CARDS,
    Card,
    Case,
    Step,
    card_peaks,
    ledger,
    recomputed,
    step_peak,
)
from minidistill.bench.workloads import SIZES, attention
from minidistill.vae import VAE

TEXT = CLIPTextConfig(vocab_size=100, hidden_size=12, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
TINY = replace(TINY_SIZE, text=TEXT)


@pytest.mark.parametrize("fused", [True, False])
def test_multiply_adds_are_half_of_torchs_flops(fused: bool):
    unet, inputs = tiny_unet(), unet_inputs()
    with torch.no_grad():
        with attention(fused=False), FlopCounterMode(display=False) as flops:  # it ignores fused attention on a CPU
            unet(*inputs)
        with attention(fused=fused), Work() as work:
            unet(*inputs)
    assert 2 * work.multiply_adds == flops.get_total_flops()


@real_tensors()
def test_more_recomputed_and_less_saved():
    thresholds = (0, 100, math.inf)
    saved = [ledger(Case("noised", below=below), TINY, foreach=True)["saved"] for below in thresholds]
    work = [recomputed(TINY, below) for below in thresholds]
    assert saved == sorted(saved, reverse=True) and work == sorted(work) and len(set(saved)) == len(set(work)) == 3
    assert work[0] == 0 and 0.5 < work[-1] < 1


@real_tensors()
def test_steps_add_up():
    wide, narrow, away, low, _ = (step_peak(step, TINY) for step in STEPS)
    assert wide > narrow > away > low
    with torch.device("meta"):
        others = sum(p.numel() for network in (CLIPTextModel(TEXT), VAE(TINY.vae)) for p in network.parameters())
    assert narrow - away == 2 * (others + memory.CAPTIONS * TINY.tokens * 12)  # two bytes a number
    large = replace(TINY, batch=8)
    one_by_one, at_once = (step_peak(Step("", Case("noised"), one_by_one=how), large) for how in (True, False))
    assert one_by_one < at_once


def test_table_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    peaks = iter(range(9_000_000, 0, -1_000_000))
    monkeypatch.setattr(memory, "step_peak", lambda *_: next(peaks))
    monkeypatch.setattr(memory, "recomputed", lambda size, below: 0.18 if below else 0.0)
    bench.main(["memory", "--steps", "--size", "sd15", "--batch", "1", "--out", str(tmp_path / "steps.json")])
    rows = json.loads((tmp_path / "steps.json").read_text())["sizes"]["sd15"]
    assert [row["label"] for row in rows] == [step.label for step in (*STEPS, *INSTEAD)]
    out = capsys.readouterr().out
    assert "| W and activations in bfloat16 | 8 | 1 | 0% |" in out and "| `--memory low` | 6 | 1 | 18% |" in out


@real_tensors()
def test_lighter_settings_take_less():
    small, large = (card_peaks(Card(0, *how), TINY) for how in ((8, 8, "low"), (8,)))
    assert small["training"] < large["training"] and small["sampling"] == large["sampling"] > small["decoding"] > 0


def test_the_table_of_cards(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(memory, "card_peaks", lambda *_: {"training": 2e9, "sampling": 1.5e9, "decoding": 1e9})
    for size, cards, side in (("sd15", CARDS, 512), ("sdxl", XL_CARDS, 1024)):
        bench.main(["memory", "--cards", "--size", size])
        out = capsys.readouterr().out
        assert out.count("| 2.00 | 1.50 | 1.00 |") == len(cards) and all(f"`{card}`" in out for card in cards)
        assert f"{size}: training" in out and f"at {side}x{side}" in out


@pytest.mark.parametrize("mode", ["--steps", "--cards"])
def test_only_sizes_with_a_text_encoder(mode: str):
    with pytest.raises(ValueError, match=f"{mode} is for sd15, sd21.*, not for pocket"):
        bench.main(["memory", mode, "--size", "sd15", "pocket"])


@pytest.mark.parametrize("flags", ["--cards --batch 8", "--steps --dtype float32", "--cards --out o.json", "--batch 2"])
def test_flags_without_effect_are_refused(flags: str):
    with pytest.raises(ValueError, match="--(batch|dtype|out) changes nothing in this table: leave it out"):
        bench.main(["memory", *flags.split()])


DOCUMENTED = (ROOT / "docs/gpus-and-memory.md").read_text(encoding="utf-8").splitlines()


def documented(card: Card, of: str) -> list[float]:
    """The gigabytes in the row of ``card`` in the table that follows the line beginning with ``of``."""
    first = next(i for i, line in enumerate(DOCUMENTED) if line.startswith(of))
    row = next(line for line in DOCUMENTED[first:] if f"`{card}`" in line and f"| {card.gigabytes} GB |" in line)
    return [float(cell) for cell in row.split("|")[3:-1]]


RECIPES = [*((card, "For SD 1.5", "sd21") for card in CARDS), *((card, "For SDXL", "sdxl") for card in XL_CARDS)]


@pytest.mark.parametrize("card, of", [(card, of) for card, of, _ in RECIPES], ids=str)
def test_a_documented_recipe_fits(card: Card, of: str):
    """A gigabyte of a GPU is 2^30 bytes; libraries and workspaces need what is left."""
    assert 0 < max(documented(card, of)) < 0.94 * card.gigabytes * 2**30 / 1e9


@pytest.mark.slow
@pytest.mark.parametrize("card, of, size", RECIPES, ids=str)
def test_a_documented_recipe_takes_what_the_docs_say(card: Card, of: str, size: str):
    """Within 2%, so that a growing peak does not go unnoticed."""
    peaks = card_peaks(card, SIZES[size]).values()
    assert [peak / 1e9 for peak in peaks] == pytest.approx(documented(card, of), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["sd15", "sd21"])
@pytest.mark.parametrize("batch, most", [(1, 3.0e9), (8, 8.0e9)])
def test_stable_diffusion_fits(size: str, batch: int, most: float):
    low = next(step for step in STEPS if step.label == "`--memory low`")
    assert step_peak(low, replace(SIZES[size], batch=batch)) <= most
