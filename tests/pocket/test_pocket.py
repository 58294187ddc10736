"""The emoji model as it ships: its size, its captions, its tokenizer, its CLIP."""

import re
from pathlib import Path

import pytest
import torch
from tiny import ROOT
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from minidistill import load
from minidistill.pocket.__main__ import main
from minidistill.pocket.clip import clip_config
from minidistill.pocket.compositions import all_compositions, read_compositions
from minidistill.pocket.tokenizer import CONTEXT, write_tokenizer

FOLDER = ROOT / "weights/pocket-emoji"


def test_size():
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 28e6  # two LoRAs of 2.1 MB among them
    assert max(file.stat().st_size for file in files) <= 16e6
    assert sum(p.numel() for p in load(FOLDER).unet.parameters()) <= 8.0e6


def test_compositions_are_listed():
    assert read_compositions(FOLDER / "compositions.json") == all_compositions()


def test_a_caption_word_is_a_token():
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    for c in all_compositions():
        ids, words = tokenizer(c.caption).input_ids, re.findall(r"\w+|-", c.caption)
        assert len(ids) == len(words) + 2 <= tokenizer.model_max_length == CONTEXT
        assert tokenizer.decode(ids[1:-1]).split() == words


def test_the_tokenizer_is_that_of_the_recipe(tmp_path):
    write_tokenizer([c.caption for c in all_compositions()], tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (FOLDER / "tokenizer" / file.name).read_bytes()


def test_the_clip_has_the_configuration_of_the_recipe():
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    made, shipped = clip_config(tokenizer), CLIPConfig.from_pretrained(FOLDER / "clip")
    for half in ("text_config", "vision_config"):
        asked = getattr(made, half).to_dict() | {"dtype": None}
        assert asked == getattr(shipped, half).to_dict() | {"dtype": None}


def test_the_text_encoder_is_the_clips():
    clip = CLIPModel.from_pretrained(FOLDER / "clip", dtype=torch.float32)
    encoder = CLIPTextModel.from_pretrained(FOLDER / "text_encoder", dtype=torch.float32)
    ids = torch.randint(0, 1000, (3, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(clip.text_model(ids).last_hidden_state, encoder(ids).last_hidden_state)


@pytest.mark.parametrize("device", ["gpu", "meta:x"])
def test_an_unknown_device_is_named(device: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f'The device "{device}" is not available here: '):
        main(["--device", device, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_compiled_bfloat16_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match="one of --compile and --bf16"):
        main(["--compile", "--bf16", "--device", "cpu"])
