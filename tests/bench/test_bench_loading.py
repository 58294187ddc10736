"""The loading benchmark on a tiny model: its turns, table and JSON."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TINY_SIZE, TINY_UNET, TINY_VAE
from transformers import CLIPTextConfig

from minidistill.bench import __main__ as bench
from minidistill.bench import loading

SIZE = replace(
    TINY_SIZE,
    unet=replace(TINY_UNET, widths=(32, 32), heads=(8, 8), context_width=64, groups=32),
    vae=replace(TINY_VAE, widths=(32, 32), groups=32),
    text=CLIPTextConfig(
        vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
    ),
)
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")


@needs_proc
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
def test_turns(asked: torch.dtype, tmp_path: Path) -> None:
    files = loading.write_files(tmp_path, torch.float32, SIZE)
    turns = [loading.take_turn(file, "ours", asked) for file in files]
    turns.append(loading.take_turn(files[0], "safetensors", asked))
    assert len({turn["weights"] for turn in turns}) == 1  # the same in every format
    assert all(turn["seconds"] > 0 and 0 < turn["largest"] < turn["weights"] for turn in turns)


def test_table_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def turn(function, file: Path, who: str, dtype: torch.dtype) -> dict[str, float]:
        return {"seconds": 2.0 if who == "ours" else 1.0, "peak": 3e6, "weights": 2e6, "largest": 1e6}

    monkeypatch.setattr(loading, "in_fresh_process", turn)
    monkeypatch.setattr(loading, "write_files", lambda folder, dtype: [folder / "a.safetensors", folder / "a.ckpt"])
    bench.main(["loading", "--held", "float32", "--repeats", "1", "--out", str(tmp_path / "load.json")])
    printed = capsys.readouterr().out
    assert "| .ckpt | float32 | float32 | 2.00 s | 1.00 s | 3 | 1.50 | 3 |" in printed
    rows = json.loads((tmp_path / "load.json").read_text())["rows"]
    assert [row["form"] for row in rows] == [".safetensors", ".ckpt"] and rows[0]["reference"]["seconds"] == 1.0
