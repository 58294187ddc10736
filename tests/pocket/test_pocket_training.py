"""Training the embedded model: stages resume where they stopped, and the empty prompt becomes weak."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import ROOT, TINY_SIZE
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPTokenizer

from minidistill import load
from minidistill.pocket import __main__ as command
from minidistill.pocket.clip import clip_config
from minidistill.pocket.compositions import EMOJI, all_compositions
from minidistill.pocket.denoiser import Captioned, train_unet, weaken
from minidistill.pocket.stage import fit
from minidistill.schedule import clean_and_noise
from minidistill.unet import UNet

FOLDER = ROOT / "weights/pocket-emoji"


def test_a_stage_resumes_where_it_was_stopped(tmp_path: Path) -> None:
    def train(state: Path, stop_at: int | None = None) -> Tensor:
        torch.manual_seed(0)
        model, drawn = nn.Conv2d(3, 3, 1), iter(range(100))

        def loss_of_batch() -> tuple[Tensor, dict[str, Tensor]]:
            if next(drawn) == stop_at:
                raise KeyboardInterrupt
            loss = model(torch.randn(2, 3, 4, 4)).square().mean()
            return loss, {"loss": loss}

        return fit(model, loss_of_batch, state, steps=9, lr=0.1, weight_decay=0.0, save_every=2).weight

    whole = train(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped.pt", stop_at=5)
    assert torch.equal(train(tmp_path / "stopped.pt"), whole)
    assert torch.equal(train(tmp_path / "whole.pt", stop_at=0), whole)  # a finished stage takes no batch


@pytest.mark.slow
def test_the_empty_prompt_learns_from_the_weak_model_and_captions_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    strong, weak = (UNet(TINY_SIZE.unet).eval().requires_grad_(False) for _ in range(2))
    contexts, empty = torch.randn(3, 5, 12), torch.randn(5, 12)
    data = Captioned(torch.randn(8, 4, 8, 8), torch.arange(8) % 3, contexts, empty)
    before = {name: x.clone() for name, x in strong.state_dict().items()}
    found = weaken(strong, weak, data, tmp_path / "state.pt", steps=80, lr=2e-2, batch=8)

    z_t, _, t, context = data.noised(8)
    nothing = empty.expand_as(context)
    gap = (strong(z_t, t, nothing) - weak(z_t, t, nothing)).square().mean()
    assert (found(z_t, t, nothing) - weak(z_t, t, nothing)).square().mean() < 0.5 * gap
    assert (found(z_t, t, context) - strong(z_t, t, context)).square().mean() < 0.5 * gap
    assert all(torch.equal(x, before[name]) for name, x in strong.state_dict().items())


def test_each_latent_comes_with_its_own_caption() -> None:
    contexts = torch.arange(3.0).view(3, 1, 1).expand(3, 5, 12)
    captions = torch.tensor([2, 0, 1, 2])
    latents = captions.view(4, 1, 1, 1).expand(4, 4, 8, 8) * 100.0  # so far apart that noise cannot confuse them
    torch.manual_seed(0)
    data = Captioned(latents, captions, contexts, contexts[0])
    z_t, noise, t, context = data.noised(64)
    z_0, _ = clean_and_noise("eps", noise, z_t, *data.schedule.alpha_sigma(t, z_t))
    assert torch.equal((z_0.mean((1, 2, 3)) / 100).round(), context[:, 0, 0])


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_the_empty_prompt_replaces_dropped_captions(tmp_path: Path, dropout: float) -> None:
    unet, seen = UNet(TINY_SIZE.unet), []
    unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    data = Captioned(torch.randn(8, 4, 8, 8), torch.arange(8) % 3, torch.ones(3, 5, 12), torch.zeros(5, 12))
    train_unet(unet, data, tmp_path / "state.pt", steps=2, lr=1e-3, dropout=dropout, batch=4)
    assert len(seen) == 2 and all((context == 1 - dropout).all() for context in seen)


def test_the_command_makes_a_model_and_does_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages with two updates each, with narrow networks, on noise instead of emoji, which need the font."""
    some = [c for c in all_compositions() if c.emoji in EMOJI[:6]]
    noise = torch.randint(256, (len(some), 3, 64, 64), dtype=torch.uint8), torch.arange(len(some))
    monkeypatch.setattr(command, "all_compositions", lambda: some)
    monkeypatch.setattr(command, "POCKET_UNET", replace(command.POCKET_UNET, widths=(16, 16, 32), groups=8))
    monkeypatch.setattr(command, "POCKET_VAE", replace(command.POCKET_VAE, widths=(4, 8, 8)))
    monkeypatch.setattr(command, "render", lambda *args, **options: noise)
    for stage in ("train_clip", "tune_image_encoder"):
        monkeypatch.setattr(command, stage, partial(getattr(command, stage), steps=2, batch=8))
    monkeypatch.setattr(command, "ROUNDS", ((2, 1e-3), (2, 1e-3)))
    for stage in ("WEAK", "WEAKENING"):
        monkeypatch.setattr(command, stage, (2, 1e-3))
    flags = ["--out", tmp_path / "new/model", "--work", tmp_path / "work", "--vae-steps", 2]
    monkeypatch.setattr(sys, "argv", ["pocket", *map(str, flags)])

    command.main()
    networks = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    command.main()
    assert networks == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    (image,) = load(tmp_path / "new/model").sample(some[0].caption, steps=2, guidance=2.5)
    assert image.size == (64, 64)


def test_without_the_font_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pocket", "--font", str(tmp_path / "none.ttf"), "--out", str(tmp_path / "model")])
    with pytest.raises(FileNotFoundError, match=r"none.ttf.*--font"):
        command.main()
    assert not list(tmp_path.iterdir())


def test_the_shipped_clip_has_the_configuration_of_the_recipe() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    made, shipped = clip_config(tokenizer), CLIPConfig.from_pretrained(FOLDER / "clip")
    for half in ("text_config", "vision_config"):
        asked = getattr(made, half).to_dict() | {"dtype": None}
        assert asked == getattr(shipped, half).to_dict() | {"dtype": None}
