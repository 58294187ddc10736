"""The next embedded model as far as it is trained: its captions, its tokenizer, its CLIP, its size."""

import re
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from minidistill.pocket.emoji3d.__main__ import CONTEXT, main
from minidistill.pocket.emoji3d.compositions import all_compositions, read_compositions

FOLDER = Path(__file__).parents[3] / "weights/pocket-emoji-3d"


def test_size():
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 25e6


def test_compositions_are_listed():
    assert read_compositions(FOLDER / "compositions.json") == all_compositions()


def test_a_caption_word_is_a_token():
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    for c in all_compositions():
        ids, words = tokenizer(c.caption).input_ids, re.findall(r"\w+|-", c.caption)
        assert len(ids) == len(words) + 2 <= tokenizer.model_max_length == CONTEXT
        assert tokenizer.decode(ids[1:-1]).split() == words


def test_the_text_encoder_is_the_clips():
    clip = CLIPModel.from_pretrained(FOLDER / "clip", dtype=torch.float32)
    encoder = CLIPTextModel.from_pretrained(FOLDER / "text_encoder", dtype=torch.float32)
    ids = torch.randint(0, 1000, (3, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(clip.text_model(ids).last_hidden_state, encoder(ids).last_hidden_state)


def test_compiled_bfloat16_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match="one of --compile and --bf16"):
        main(["--compile", "--bf16", "--device", "cpu"])
