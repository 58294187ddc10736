"""A complete Stable Diffusion of tiny widths and random weights, in the official layout; how tests compare results."""

import json
import multiprocessing
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import RLock
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from minidistill.bench import counting, memory
from minidistill.bench.workloads import Size
from minidistill.config import ScheduleConfig, UNetConfig, VAEConfig
from minidistill.formats.model_configs import XL_INDEX, published_schedule, published_unet, published_vae
from minidistill.formats.model_folder import XL_STEMS
from minidistill.formats.single_file import to_single_file
from minidistill.lora import LoRAModel, inject_lora, lora_layers
from minidistill.pocket.compositions import THINGS
from minidistill.unet import UNet
from minidistill.vae import VAE

ROOT = Path(__file__).parents[1]
UPDATES = 6  # of the training runs that the fixture `flags` describes
VOCABULARY, TOKENS = 1518, 20  # of the emoji model's tokenizer: its words, and how many a prompt has
END = VOCABULARY - 1  # the token that ends a prompt, and that pads it
TINY_UNET = UNetConfig(
    widths=(32, 64), layers=1, depth=(1, 0), heads=(2, 2), context_width=32, groups=8, sample_size=8
)  # fmt: skip
TINY_SIZE = Size(  # for the benchmark and the memory ledger
    UNetConfig(widths=(16, 32), layers=1, depth=(1, 0), heads=(2, 2), context_width=12, groups=8, sample_size=8),
    VAEConfig(widths=(8, 8), layers=1, groups=4),
    tokens=5,
    steps=3,
    batch=2,
    cpu_steps=3,
    cpu_repeats=2,
)
TINY_XL_UNET = UNetConfig(
    widths=(32, 64), layers=1, depth=(0, 2), mid_depth=2, heads=(1, 1), context_width=128, linear_projection=True,
    sample_size=8, pooled_width=24,
)  # fmt: skip
TINY_XL_VAE = VAEConfig(widths=(32, 32), layers=1, scaling_factor=0.13025)
TINY_VAE = VAEConfig(widths=(8, 16), layers=1, groups=4)


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference anywhere, relative to the largest expected value."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert actual.isfinite().all() and expected.isfinite().all()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def levels(images: list[Image.Image]) -> np.ndarray:
    """The levels of images of one size, [N, H, W, 3], as numbers whose differences may be negative."""
    return np.stack([np.asarray(image, dtype=int) for image in images])


def same_result(run: Path, other: Path) -> bool:
    """True if two training runs left the same LoRA and the same losses, to the byte."""
    names = ("lora.safetensors", "metrics.jsonl")
    return all((run / name).read_bytes() == (other / name).read_bytes() for name in names)


def losses(run: Path) -> list[float]:
    """The loss of each update of a training run."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def fork(run: Callable[[], object], log: Path) -> BaseProcess:
    """Call a function in a fork of this process, where all imports are done. What it prints goes into a file."""

    def work() -> None:
        torch.set_num_threads(1)  # a fork has no others
        tqdm.set_lock(RLock())  # its own: a fork that is killed never gives back the one that all share
        sys.stdout = sys.stderr = log.open("a", buffering=1)
        run()

    log.touch()
    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)  # ends with this process
    process.start()
    return process


def run_script(script: Path, flags: list[str]) -> None:
    """As from a shell, but in this process, which it changes: for a fork."""
    sys.argv = [script.name, *flags]
    runpy.run_path(str(script), run_name="__main__")


@contextmanager
def real_tensors() -> Iterator[None]:
    """Count memory with real tensors: several times as fast as with fake ones, and attention keeps 2 kB more."""

    def real(**_: bool) -> AbstractContextManager:
        return nullcontext()

    with patch.object(counting, "FakeTensorMode", real), patch.object(memory, "FakeTensorMode", real):
        yield


def listing(folder: Path) -> dict[Path, int]:
    """Every file in a folder and when it was last changed, to see that nothing was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def edit_json(file: Path, changes: dict) -> None:
    """Replace or add entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@torch.no_grad()
def shake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Move norms and biases off their ones and zeros, so that a misplaced one shows."""
    for i, parameter in enumerate(p for p in module.parameters() if p.ndim == 1):
        parameter += 0.1 * randn(*parameter.shape, seed=seed + i)
    return module.eval()


def tiny_unet(seed: int = 0, config: UNetConfig = TINY_UNET) -> UNet:
    torch.manual_seed(seed)
    return shake(UNet(config))


def unet_inputs(batch: int = 2, side: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """z_t [B, 4, h, w], t [B], context [B, L, D]."""
    z_t, context = randn(batch, 4, side, side, dtype=dtype), randn(batch, 5, 32, seed=1, dtype=dtype)
    return z_t, torch.arange(batch) * 400 + 20, context


@torch.no_grad()
def fill_up(model: nn.Module, seed: int = 7) -> nn.Module:
    """Give every lora_up values, as if it had learned something."""
    for i, layer in enumerate(lora_layers(model).values()):
        layer.lora_up.copy_(0.3 * randn(*layer.lora_up.shape, seed=seed + i))
    return model


def tiny_student(rank: int = 2, alpha: float | None = None, dtype: torch.dtype = torch.float32) -> LoRAModel:
    """The tiny UNet with a LoRA that changes its predictions."""
    return fill_up(inject_lora(tiny_unet().to(dtype), rank, alpha))


def text_config(**sizes) -> CLIPTextConfig:
    """Of a text encoder for the tokenizer of the emoji model."""
    sizes |= dict(vocab_size=VOCABULARY, max_position_embeddings=TOKENS, bos_token_id=END - 1, eos_token_id=END)
    return CLIPTextConfig(**sizes)


def tiny_tensors(version: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A tiny SD 1.x or 2.x as a single file; whatever shapes do not tell is as in the large models."""
    wide = version == 2  # heads of width 64, where 1.x has 8 heads
    unet_config = replace(
        TINY_UNET,
        widths=(64, 64) if wide else (32, 32),
        heads=(1, 1) if wide else (8, 8),
        linear_projection=wide,
        context_width=64,
        groups=32,
    )
    vae_config = replace(TINY_VAE, widths=(32, 32), groups=32)
    encoder = text_config(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        hidden_act="gelu" if wide else "quick_gelu",
    )
    torch.manual_seed(0)
    unet, vae, text = shake(UNet(unet_config)), shake(VAE(vae_config)), shake(CLIPTextModel(encoder))
    texts = (text.state_dict(), encoder)
    tensors = to_single_file(unet.state_dict(), unet_config, vae.state_dict(), vae_config, texts)
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def write_tiny(folder: Path, seed: int = 0) -> Path:
    """Write unet, vae, text_encoder, tokenizer and scheduler; the tokenizer is that of the emoji model."""
    unet, vae = tiny_unet(seed), shake(VAE(TINY_VAE), seed)
    encoder = text_config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, pad_token_id=END
    )
    text_encoder = shake(CLIPTextModel(encoder), seed)
    configs = {
        "unet/config.json": dict(
            sample_size=TINY_UNET.sample_size,
            block_out_channels=TINY_UNET.widths,
            layers_per_block=TINY_UNET.layers,
            down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
            attention_head_dim=TINY_UNET.heads[0],
            cross_attention_dim=TINY_UNET.context_width,
            norm_num_groups=TINY_UNET.groups,
        ),
        "vae/config.json": dict(
            block_out_channels=TINY_VAE.widths, layers_per_block=TINY_VAE.layers, norm_num_groups=TINY_VAE.groups
        ),
        "text_encoder/config.json": encoder.to_dict(),
        "scheduler/scheduler_config.json": dict(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False
        ),
    }
    for name, config in configs.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(json.dumps(config))
    save_file(unet.state_dict(), folder / "unet/diffusion_pytorch_model.safetensors")
    save_file(vae.state_dict(), folder / "vae/diffusion_pytorch_model.safetensors")
    save_file(text_encoder.state_dict(), folder / "text_encoder/model.safetensors")
    shutil.copytree(ROOT / "weights/pocket-emoji/tokenizer", folder / "tokenizer")
    return folder


def write_tiny_xl(folder: Path) -> Path:
    """Like ``write_tiny``, an SDXL; what the shapes in a single file do not tell is as in the large model."""
    first, second = (
        text_config(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=1,
            hidden_act=activation,
            projection_dim=TINY_XL_UNET.pooled_width,
        )
        for activation in ("quick_gelu", "gelu")
    )
    torch.manual_seed(0)
    networks = {
        "unet": (shake(UNet(TINY_XL_UNET)), published_unet(TINY_XL_UNET)),
        "vae": (shake(VAE(TINY_XL_VAE)), published_vae(TINY_XL_VAE, side=16)),
        "text_encoder": (shake(CLIPTextModel(first)), first.to_dict()),
        "text_encoder_2": (shake(CLIPTextModelWithProjection(second)), second.to_dict()),
    }
    for name, (network, config) in networks.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file(network.state_dict(), folder / name / f"{XL_STEMS[name]}.safetensors", {"format": "pt"})
    (folder / "scheduler").mkdir()
    schedule = published_schedule(ScheduleConfig())
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(schedule))
    (folder / "model_index.json").write_text(json.dumps(XL_INDEX))
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        shutil.copytree(ROOT / "weights/pocket-emoji/tokenizer", folder / name)
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            edit_json(folder / name / file, {"pad_token": pad})
    return folder


def write_emoji(folder: Path) -> Path:
    """Write a package of emoji in which every thing is a blob of random colours."""
    (folder / "assets").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, character in enumerate(THINGS):
        blob = np.full((4, 4, 4), 255, dtype=np.uint8)
        blob[:, :, :3] = rng.integers(256, size=(4, 4, 3))
        blob[0, 0, 3] = 0  # a transparent corner
        sheet = Image.new("RGBA", (80, 80))
        sheet.paste(Image.fromarray(blob).resize((64, 64), Image.Resampling.NEAREST), (8, 8))
        suffix = "-fe0f" if i % 5 == 0 else ""
        sheet.save(folder / f"assets/{ord(character):04x}{suffix}.webp", lossless=True)
    return folder
