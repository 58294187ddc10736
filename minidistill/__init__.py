"""Distil classifier-free guidance into a LoRA: a reference implementation in plain PyTorch."""

from minidistill.formats.files import CheckpointError
from minidistill.formats.load_model import load
from minidistill.formats.lora_io import load_lora, save_lora
from minidistill.guidance import guided_noise
from minidistill.lora import inject_lora, merge_lora, unmerge_lora
from minidistill.pipeline import StableDiffusion
from minidistill.samplers import ddim_invert, ddim_sample

__all__ = [
    "CheckpointError",
    "StableDiffusion",
    "ddim_invert",
    "ddim_sample",
    "guided_noise",
    "inject_lora",
    "load",
    "load_lora",
    "merge_lora",
    "save_lora",
    "unmerge_lora",
]
