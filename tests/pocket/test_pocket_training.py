"""Training the emoji model: stages resume where they stopped, and the command makes a model that draws."""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TINY_SIZE
from torch import Tensor, nn

from minidistill import load
from minidistill.config import ScheduleConfig
from minidistill.pocket import __main__ as command
from minidistill.pocket import stage
from minidistill.pocket.autoencoder import train_vae
from minidistill.pocket.compositions import all_compositions
from minidistill.pocket.denoiser import Captioned, train_unet
from minidistill.pocket.images import Renderer
from minidistill.pocket.stage import fit
from minidistill.pocket.tokenizer import write_tokenizer
from minidistill.schedule import Schedule, clean_and_noise
from minidistill.unet import UNet
from minidistill.vae import VAE

SCHEDULE = Schedule.from_config(ScheduleConfig())


@pytest.mark.parametrize("muon", [False, True])
def test_a_stage_resumes_where_it_was_stopped(muon: bool, tmp_path: Path) -> None:
    def train(state: Path, stop_at: int | None = None) -> Tensor:
        torch.manual_seed(0)
        model, drawn = nn.Conv2d(3, 3, 1), iter(range(100))

        def new_batch() -> tuple[Tensor]:
            if next(drawn) == stop_at:
                raise KeyboardInterrupt
            return (torch.randn(2, 3, 4, 4),)

        def loss_of(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = model(x).square().mean()
            return loss, {"loss": loss}

        how = dict(by_muon=[model.weight] if muon else [], save_every=2)
        return fit(model, new_batch, loss_of, state, steps=9, lr=0.1, weight_decay=0.0, **how).weight

    whole = train(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped.pt", stop_at=5)
    assert torch.equal(train(tmp_path / "stopped.pt"), whole)
    assert torch.equal(train(tmp_path / "whole.pt", stop_at=0), whole)  # a finished stage takes no batch


def test_on_a_gpu_an_update_is_recorded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that warm up change no weight; then what was recorded is called for every update, at its own rate."""
    model, calls = nn.Conv2d(3, 3, 1), []

    def loss_of(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        calls.append(model.weight.detach().clone())
        return model(x).square().mean(), {"loss": x.sum()}

    def graphed(run: Callable) -> Callable:
        run(), run()
        assert torch.equal(model.weight, calls[0])
        return run

    monkeypatch.setattr(stage, "on_gpu", lambda device: True)
    monkeypatch.setattr(stage, "graphed", graphed)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    x = torch.ones(2, 3, 4, 4)
    fit(model, lambda: (x,), loss_of, tmp_path / "state.pt", 5, 0.1, 0.0, by_muon=[model.weight])
    assert len(calls) == 2 + 5 and torch.equal(calls[1], calls[2])
    assert not any(torch.equal(a, b) for a, b in zip(calls[2:], calls[3:]))


def test_the_average_follows_the_weights(tmp_path: Path) -> None:
    """As the exponential moving average by its definition."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 3, 1)
    seen: list[Tensor] = []

    def loss_of(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(model.weight.detach().clone())
        loss = model(x).square().mean()
        return loss, {"loss": loss}

    average = fit(model, lambda: (torch.randn(2, 3, 4, 4),), loss_of, tmp_path / "s.pt", 5, 0.1, 0.0).weight
    mean = seen[0]
    for n, weight in enumerate([*seen[1:], model.weight.detach()]):
        decay = (1 + n) / (10 + n)
        mean = decay * mean + (1 - decay) * weight
    assert torch.allclose(average, mean, atol=1e-6)


def test_more_of_the_decoder_leaves_the_latents(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = VAE(TINY_SIZE.vae).to(memory_format=torch.channels_last)
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    x = images[:4].float() / 127.5 - 1
    with torch.no_grad():
        z, before = vae.encode(x), vae.decode(vae.encode(x))
    more = train_vae(vae, lambda: images[torch.randperm(8)[:4]], tmp_path / "s.pt", 60, decoder_only=True)
    with torch.no_grad():
        assert torch.equal(more.encode(x), z)
        assert (more.decode(z) - x).square().mean() < 0.8 * (before - x).square().mean()


def test_each_latent_comes_with_its_own_caption() -> None:
    contexts = torch.arange(3.0).view(3, 1, 1).expand(3, 5, 12)
    captions = torch.tensor([2, 0, 1, 2])
    latents = captions.view(4, 1, 1, 1).expand(4, 4, 8, 8) * 100.0  # so far apart that noise cannot confuse them
    torch.manual_seed(0)
    data = Captioned(latents, captions, contexts, contexts[0], SCHEDULE)
    z_t, noise, t, context, _ = data.batch(64, dropout=0.0)
    z_0, _ = clean_and_noise("eps", noise, z_t, *data.schedule.alpha_sigma(t, z_t))
    assert torch.equal((z_0.mean((1, 2, 3)) / 100).round(), context[:, 0, 0])


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_the_empty_prompt_replaces_dropped_captions(tmp_path: Path, dropout: float) -> None:
    unet, seen = UNet(TINY_SIZE.unet), []
    unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    data = Captioned(torch.randn(8, 4, 8, 8), torch.arange(8) % 3, torch.ones(3, 5, 12), torch.zeros(5, 12), SCHEDULE)
    train_unet(unet, data, tmp_path / "state.pt", steps=2, batch=4, dropout=dropout)
    assert len(seen) == 2 and all((context == 1 - dropout).all() for context in seen)


@pytest.fixture
def make(tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[Path, int]]:
    """``make("--flag", ...)`` makes a model of narrow networks in new/model, with two updates in each stage.

    Returns when each network was written.
    """
    monkeypatch.setattr(command, "all_compositions", lambda: all_compositions()[::250])
    monkeypatch.setattr(command, "Renderer", lambda emoji, device: renderer)
    monkeypatch.setattr(command, "POCKET_UNET", replace(command.POCKET_UNET, widths=(16, 16, 32), groups=8))
    monkeypatch.setattr(command, "POCKET_VAE", replace(command.POCKET_VAE, widths=(4, 8, 8)))
    flags = ["--out", tmp_path / "new/model", "--device", "cpu"]
    flags += [x for part in ("clip", "vae", "unet") for x in (f"--{part}-steps", 2)] + ["--clip-batch", 8]

    def make(*more: str) -> dict[Path, int]:
        command.main([*map(str, flags), *more])
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "new").rglob("*.safetensors")}

    return make


def test_the_command_makes_a_model_and_does_nothing_twice(make: Callable[..., dict[Path, int]], tmp_path: Path) -> None:
    """All stages, then more of two of them."""
    networks = make()
    assert make() == networks
    (image,) = load(tmp_path / "new/model").sample(all_compositions()[0].caption, steps=2, guidance=2.5)
    assert image.size == (64, 64)
    for part in ("vae", "unet"):
        again = make("--more", part)
        changed = {file.parent.name for file in networks if again[file] != networks[file]}
        assert changed == {part}
        networks = again
    assert not list(tmp_path.rglob("*.pt"))  # nothing unfinished is left


def test_a_stopped_stage_continues_only_from_its_own_start(
    make: Callable[..., dict[Path, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def states() -> list[str]:
        return [state.name.split(",")[0] for state in (tmp_path / "new/model").glob("*.pt")]

    def stop(*more: str, before: str = "published_unet") -> None:
        """By default when the UNet is trained, but not yet written."""

        def interrupt(*_, **__) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(command, before, interrupt)
            make(*more)

    stop()
    assert states() == ["unet"]
    stop("--more", "vae", before="train_unet")
    assert states() == []  # it had learned the latents of another VAE
    stop("--unet-steps", "3")
    make()
    assert states() == []
    stop("--more", "unet", "--unet-steps", "3")
    assert states() == ["unet further"]
    stop("--more", "vae", before="published_vae")
    make("--more", "vae")
    assert states() == ["unet further"]  # the decoder's latents are the same
    make("--more", "unet")
    assert states() == []  # the other run would take the UNet back to where it began


def test_more_of_nothing_is_refused_before_anything_is_made(
    tmp_path: Path, emoji: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "train_clip", lambda *_: pytest.fail("a CLIP is trained"))
    with pytest.raises(ValueError, match="has no unet to train further"):
        command.main(["--more", "unet", "--emoji", str(emoji), "--out", str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


def test_a_full_disk_leaves_the_tokenizer_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_tokenizer(["a red cat"], tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_tokenizer(["a blue dog"], tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_without_the_images_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="npm pack"):
        command.main(["--emoji", str(tmp_path / "none"), "--out", str(tmp_path / "model")])
    assert not list(tmp_path.iterdir())
