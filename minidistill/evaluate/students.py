"""Who is compared with the teacher: LoRAs and whole copies of the UNet, as runs left them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from minidistill.distill import FullStudent
from minidistill.formats.checkpoint import read_checkpoint
from minidistill.formats.lora_files import inject_file
from minidistill.formats.lora_formats import read_run
from minidistill.formats.model_folder import STEMS, read_weights
from minidistill.formats.tensor_files import read_tensors
from minidistill.pipeline import place
from minidistill.training.settings import ModelSettings, ScaledFile
from minidistill.unet import UNet


class Student(NamedTuple):
    """What is compared with the teacher: a LoRA, or a UNet of its own."""

    file: Path
    guidance: float
    negative_prompt: str
    beside: Callable[[UNet], nn.Module]  # the teacher's UNet -> that with the student, called with the flag


def read_student(path: Path, scale: float, settings: ModelSettings) -> Student:
    """Of a run's folder its LoRA, or the checkpoint that ``--method full`` left there; or a LoRA file."""
    full = full_student(path)
    if full is None:
        file = read_run(path, scale)
        weights, header, beside = file.path, file.metadata, partial(inject_file, file=file)
    elif scale == 1:
        weights = read_weights(full / "unet", STEMS["unet"], settings.variant).file if full.is_dir() else full
        header, beside = read_tensors(weights)[1], partial(beside_full, full, settings)
    else:
        raise ValueError(f"{full} is a whole model: only a LoRA has a strength.")
    if "guidance" not in header:
        raise ValueError(f"{weights} does not say which guidance it has learned: it is no student.")
    if style := header.get("teacher_lora"):
        raise ValueError(
            f"{weights} was distilled from a teacher with the LoRA {style}. Merge that one into the model first "
            "(python -m minidistill.export --to checkpoint), and name the result with --model."
        )
    guidance = float(header["guidance"]) if full else file.guidance
    return Student(weights, guidance, header.get("negative_prompt", ""), beside)


def full_student(run: Path) -> Path | None:
    """The checkpoint that ``train.py --method full`` left in its folder."""
    return next((found for found in (run / "student", run / "student.safetensors") if found.exists()), None)


def beside_full(path: Path, settings: ModelSettings, base: UNet) -> FullStudent:
    unet = read_full(path, settings.load_options()["dtype"], settings.variant)
    return FullStudent(base, place(unet, settings.device))


def read_full(path: Path, dtype: torch.dtype, variant: str | None) -> UNet:
    """The UNet of a full student, which as a single file has no variants."""
    return read_checkpoint(path, dtype, variant=variant if path.is_dir() else None).unet


def read_students(runs: Sequence[ScaledFile], settings: ModelSettings) -> dict[str, Student]:
    """Each by a name for the table."""
    students = {}
    for path, scale in runs:
        label = (path.name if path.is_dir() else path.stem) + (f" x {scale:g}" if scale != 1 else "")
        if label in students or label in ("teacher", "no guidance"):
            raise ValueError(f'{path} would be called "{label}" in the table, as another method is: rename it.')
        students[label] = read_student(path, scale, settings)
    return students


def one_teacher(students: Mapping[str, Student], guidance: float | None) -> tuple[float, str]:
    """The guidance scale and negative prompt that all students learned from. Raises ValueError if they differ."""
    found = {(s.guidance, s.negative_prompt) for s in students.values()}
    if guidance is not None and not students:
        found = {(guidance, "")}
    if len(found) > 1 or any(guidance not in (None, scale) for scale, _ in found):
        learned = [f'{label}: {s.guidance:g}, away from "{s.negative_prompt}"' for label, s in students.items()]
        raise ValueError(f"There is one teacher to compare with, and these learned from others: {'; '.join(learned)}.")
    return next(iter(found), (2.5, ""))
