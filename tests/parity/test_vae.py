"""The VAE compared with diffusers' AutoencoderKL, in both directions."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import error, shake

from minidistill.config import SD15_VAE
from minidistill.formats.load_model import build, load
from minidistill.formats.model_configs import read_vae_config
from minidistill.formats.model_folder import read_weights
from minidistill.vae import VAE

from .helpers import diffusers, randn, write_small

CASES = {
    "3 levels": {},
    "swish": dict(act_fn="swish"),
    "2 layers, 16 groups": dict(layers_per_block=2, norm_num_groups=16),
    "4 levels": dict(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.18215,
    ),
}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@torch.no_grad()
def errors(ours: VAE, theirs, height: int, width: int, dtype: torch.dtype) -> dict[str, float]:
    scale, factor = theirs.config.scaling_factor, ours.config.factor
    x = randn(2, 3, height, width).clamp(-1, 1).to(dtype)
    z = randn(2, 4, height // factor, width // factor, seed=1).to(dtype)
    posterior = theirs.encode(x).latent_dist
    return {
        "mean": error(ours.encode(x), posterior.mode() * scale),
        "sample": error(ours.encode(x, generator=seeded()), posterior.sample(seeded()) * scale),
        "log variance": error(ours.posterior(x)[1], posterior.logvar),
        "decode": error(ours.decode(z), theirs.decode(z / scale).sample),
    }


@pytest.mark.parametrize("case", CASES)
def test_small(case: str, tmp_path: Path) -> None:
    theirs = write_small(tmp_path, vae=CASES[case]).vae
    ours = load(tmp_path, dtype=torch.float64).vae
    for height, width in ((32, 32), (16, 40)):
        differences = errors(ours, theirs, height, width, torch.float64)
        assert max(differences.values()) <= 1e-9, differences
    for vae in (ours, theirs):  # log variances out of bounds, below and above
        vae.quant_conv.bias.data[4:6] = torch.tensor([-50.0, 50.0])
    x = randn(1, 3, 16, 16).double()
    assert error(ours.posterior(x)[1], theirs.encode(x).latent_dist.logvar) <= 1e-9


@pytest.mark.parametrize("convolutions", [False, True], ids=["linear", "1x1 convolution"])
def test_old_attention_names(convolutions: bool, tmp_path: Path) -> None:
    theirs = write_small(tmp_path).vae
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            name = name.replace(f".{new}.", f".{old}.")
        old_name = any(f".{old}." in name for old in ("query", "key", "value", "proj_attn"))
        tensors[name] = tensor[:, :, None, None] if convolutions and old_name and tensor.ndim == 2 else tensor
    assert not any("to_q" in name for name in tensors)
    save_file(tensors, file)
    differences = errors(load(tmp_path, dtype=torch.float64).vae, theirs, 16, 24, torch.float64)
    assert max(differences.values()) <= 1e-9, differences


@pytest.mark.slow
def test_full_size(tmp_path: Path) -> None:
    """SD 1.x and 2.x share one VAE."""
    torch.manual_seed(0)
    theirs = shake(
        diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    )
    theirs.save_pretrained(tmp_path)
    config = read_vae_config(tmp_path / "config.json")
    ours = build(lambda: VAE(config), read_weights(tmp_path, "diffusion_pytorch_model"), torch.float32)
    assert config == SD15_VAE
    x, z = randn(1, 3, 256, 256).clamp(-1, 1).float(), randn(1, 4, 32, 32, seed=1).float()
    with torch.no_grad():
        posterior = theirs.encode(x).latent_dist
        differences = {
            "mean": error(ours.encode(x), posterior.mode() * 0.18215),
            "decode": error(ours.decode(z), theirs.decode(z / 0.18215).sample),
        }
    shutil.rmtree(tmp_path)
    assert max(differences.values()) <= 1e-4, differences
