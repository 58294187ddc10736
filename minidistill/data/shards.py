"""Shards: safetensors files that know how they were made, and notice damage."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from minidistill.formats.files import atomic_write, digest
from minidistill.formats.model_configs import TEXT_KEYS
from minidistill.formats.tensor_files import sort_header
from minidistill.pipeline import StableDiffusion
from minidistill.schedule import Schedule
from minidistill.vae import VAE


def fingerprint(*networks: nn.Module) -> str:
    """A hash of the frozen weights, bit for bit: other weights make other trajectories."""
    sha = hashlib.sha256()
    for weight in (p for network in networks for p in network.parameters() if not p.requires_grad):
        sha.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())  # flat: 1x1 kernels on a GPU
    return sha.hexdigest()[:16]


def teacher_fingerprint(sd: StableDiffusion) -> str:
    """A hash of UNet and text encoder: their frozen weights, and settings such as the number of heads."""
    texts = [part.config for part in sd.text_encoder.modules() if isinstance(part, PreTrainedModel)]
    settings = [sd.unet_config, *([getattr(text, key) for key in TEXT_KEYS] for text in texts)]
    return digest(f"{fingerprint(sd.unet, sd.text_encoder)} {settings}".encode())


def vae_fingerprint(vae: VAE) -> str:
    """A hash of the VAE's weights, and its settings."""
    return f"{fingerprint(vae)} {vae.config}"


def schedule_fingerprint(schedule: Schedule) -> str:
    """A hash of the noise levels, the spacing of the steps, and what the UNet predicts."""
    levels = [schedule.alphas_cumprod.tolist(), schedule.final_alpha.item()]
    return digest(f"{levels} {schedule.steps_offset} {schedule.spacing} {schedule.prediction}".encode())


def write_shard(file: Path, tensors: dict[str, Tensor], made_with: str) -> None:
    with atomic_write(file) as temporary:
        temporary.write_bytes(save(tensors, {"made_with": made_with, "checksum": checksum(tensors, made_with)}))
        sort_header(temporary)


def read_shard(file: Path) -> tuple[dict[str, Tensor], str] | None:
    """The tensors of a shard and what it was made with; None if it is damaged."""
    try:
        with safe_open(file, "pt") as shard:
            metadata = shard.metadata() or {}
        tensors, made_with = load_file(file), metadata["made_with"]
        return (tensors, made_with) if metadata["checksum"] == checksum(tensors, made_with) else None
    except (SafetensorError, OSError, KeyError):
        return None


def checksum(tensors: Mapping[str, Tensor], made_with: str) -> str:
    """A hash of everything in a shard: safetensors itself does not notice a flipped bit."""
    sha = hashlib.sha256(made_with.encode())
    for name, x in sorted(tensors.items()):
        sha.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        sha.update(x.view(torch.uint8).numpy())
    return sha.hexdigest()
