"""The embedded model as it ships, its size, captions, tokenizer and CLIP; and how its UNet learns."""

import json
from pathlib import Path

import torch
from tiny import error, randn, tiny_unet
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from minidistill import load
from minidistill.config import ScheduleConfig
from minidistill.pocket.compositions import COLOURS, all_compositions
from minidistill.pocket.denoiser import min_snr_weight, paired_loss, train_unet
from minidistill.schedule import Schedule, add_noise
from minidistill.unet import UNet

FOLDER = Path(__file__).parents[1] / "weights/pocket-emoji"


def test_size() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 25e6
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


@torch.no_grad()
def gap(unet: UNet, z_0: Tensor, cond: Tensor, empty: Tensor) -> float:
    """The mean squared difference that captions make where there is little noise."""
    z_t, t = z_0 + 0.1 * randn(*z_0.shape, seed=5), torch.full((len(z_0),), 20)
    return (unet(z_t, t, cond) - unet(z_t, t, empty.expand_as(cond))).square().mean().item()


def test_a_paired_round_teaches_the_unconditional_half(tmp_path: Path) -> None:
    latents, contexts, empty = randn(8, 4, 8, 8), randn(8, 5, 32, seed=1), randn(5, 32, seed=2)
    data = latents, torch.arange(8), contexts, empty
    gaps = [gap(tiny_unet(), latents, contexts, empty)]
    for paired in (False, True):
        unet = train_unet(tiny_unet(), *data, tmp_path / f"{paired}.pt", 80, 1e-2, seed=0, paired=paired, batch=16)
        gaps.append(gap(unet, latents, contexts, empty))
    before, unpaired, with_pairs = gaps
    assert with_pairs < 0.5 * before and with_pairs < 0.5 * unpaired


def test_the_conditional_half_does_not_learn_from_the_other() -> None:
    """A loss in which only what the captions lead to can be wrong: no gradient asks them for less."""
    unet, z_0, cond, empty = tiny_unet(), randn(4, 4, 8, 8), randn(4, 5, 32, seed=1), randn(5, 32, seed=2)
    schedule = Schedule.from_config(ScheduleConfig())
    cond.requires_grad_()
    torch.manual_seed(0)
    paired_loss(unet, schedule, z_0, cond, empty).backward()
    found, cond.grad = cond.grad, None
    torch.manual_seed(0)
    t, noise = torch.randint(1000, (4,)), torch.randn_like(z_0)
    eps = unet(add_noise(schedule, z_0, noise, t), t, cond)
    (min_snr_weight(schedule, t) * (eps - noise).square()).mean().backward()
    assert error(found, cond.grad) < 1e-4
