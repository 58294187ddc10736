"""What each way to save memory saves, on the tiny network; the targets of the large ones are slow."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import ROOT, tiny_unet, unet_inputs
from tiny import TINY_SIZE as TINY
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig

from minidistill.bench import memory, memory_steps
from minidistill.bench.memory import counted
from minidistill.bench.memory_steps import CARDS, INSTEAD, STEPS, Card, Step, Work, card, peak, program, recomputed

TEXT = CLIPTextConfig(vocab_size=100, hidden_size=12, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)


@pytest.mark.parametrize("fused", [True, False])
def test_multiply_adds_are_half_of_torchs_flops(fused: bool):
    unet, inputs = tiny_unet(), unet_inputs()
    with torch.no_grad():
        with memory.attention(keep=True), FlopCounterMode(display=False) as flops:  # it does not know CPU's fused one
            unet(*inputs)
        with memory.attention(keep=not fused), Work() as work:
            unet(*inputs)
    assert 2 * work.multiply_adds == flops.get_total_flops()


@pytest.mark.slow
def test_more_recomputed_and_less_kept():
    lines = (0, 100, math.inf)
    saved = [counted(partial(program, Step("", recompute_below=least), TINY, 1))["saved"] for least in lines]
    work = [recomputed(TINY, least) for least in lines]
    assert saved == sorted(saved, reverse=True) and work == sorted(work) and len(set(saved)) == len(set(work)) == 3
    assert work[0] == 0 and 0.5 < work[-1] < 1


@pytest.mark.slow
def test_steps_add_up():
    first, narrow, away, frozen, *_ = (peak(step, TINY, TEXT) for step in STEPS)
    assert first > narrow > away > frozen
    assert narrow - away == memory_steps.beside(TINY, TEXT, torch.bfloat16)
    large = replace(TINY, batch=8)
    one_by_one, at_once = (peak(Step("", accumulates=way), large, TEXT) for way in (True, False))
    assert one_by_one < at_once


def test_table_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    peaks = iter(range(9_000_000, 0, -1_000_000))
    monkeypatch.setattr(memory_steps, "peak", lambda *_: next(peaks))
    monkeypatch.setattr(memory_steps, "recomputed", lambda size, least: 0.18 if least else 0.0)
    memory_steps.main(["--size", "sd15", "--batch", "1", "--out", str(tmp_path / "steps.json")])
    rows = json.loads((tmp_path / "steps.json").read_text())["sizes"]["sd15"]
    assert [row["label"] for row in rows] == [step.label for step in (*STEPS, *INSTEAD)]
    out = capsys.readouterr().out
    assert "| W and activations in bfloat16 | 8 | 1 | 0% |" in out and "| `--memory low` | 5 | 1 | 18% |" in out


@pytest.mark.slow
def test_a_card_needs_less_for_less():
    small, large = (card(Card(0, *how), TINY) for how in ((8, 8, "low"), (8,)))
    assert small["learning"] < large["learning"] and small["drawing"] == large["drawing"] > small["decoding"] > 0


def test_the_recipes_are_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert all(str(recipe) in text for recipe in CARDS)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["sd15", "sd21"])
@pytest.mark.parametrize("batch, most", [(1, 3.0e9), (8, 8.0e9)])
def test_stable_diffusion_fits(size: str, batch: int, most: float):
    low = next(step for step in STEPS if step.label == "`--memory low`")
    assert peak(low, replace(memory.SIZES[size], batch=batch), memory_steps.TEXTS[size]) <= most
