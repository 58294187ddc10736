"""The embedded model as it ships: its size, its captions, its tokenizer, its CLIP."""

import json
from pathlib import Path

import torch
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from minidistill import load
from minidistill.pocket.compositions import COLOURS, all_compositions

FOLDER = Path(__file__).parents[2] / "weights/pocket-emoji"


def test_size() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 27e6  # two LoRAs of 2.1 MB among them
    assert max(file.stat().st_size for file in files) <= 16e6
    assert sum(p.numel() for p in load(FOLDER).unet.parameters()) <= 8.0e6


def test_compositions_are_listed() -> None:
    listed = json.loads((FOLDER / "compositions.json").read_text(encoding="utf-8"))
    made = [
        dict(name=c.name, colour=c.colour, rgb=list(c.rgb), caption=c.caption, held_out=c.held_out)
        for c in all_compositions()
    ]
    assert listed == made
    assert 0.08 <= sum(row["held_out"] for row in listed) / len(listed) <= 0.12


def test_every_emoji_and_colour_is_trained() -> None:
    trained = [c for c in all_compositions() if not c.held_out]
    assert {c.colour for c in trained} == set(COLOURS)
    for emoji in {c.emoji for c in all_compositions()}:
        assert sum(c.emoji == emoji for c in trained) >= 6


def test_a_caption_word_is_a_token() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    for c in all_compositions():
        ids = tokenizer(c.caption).input_ids
        assert len(ids) == len(c.caption.split()) + 2 <= tokenizer.model_max_length
        assert tokenizer.decode(ids[1:-1]).split() == c.caption.split()


def test_the_text_encoder_is_the_clips() -> None:
    clip = CLIPModel.from_pretrained(FOLDER / "clip", dtype=torch.float32)
    encoder = CLIPTextModel.from_pretrained(FOLDER / "text_encoder", dtype=torch.float32)
    ids = torch.randint(0, 1000, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = clip.text_model(ids).last_hidden_state, encoder(ids).last_hidden_state
    assert torch.equal(want, got)
