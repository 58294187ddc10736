"""Read the students to compare with the teacher: LoRAs, and full copies of the UNet that train.py wrote."""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from minidistill.distill import FullStudent
from minidistill.formats.files import CheckpointError
from minidistill.formats.load_model import load
from minidistill.formats.lora_formats import LoRAFile, read_lora
from minidistill.formats.lora_io import add_student, check_source
from minidistill.formats.model_folder import STEMS, read_weights
from minidistill.formats.tensor_files import read_tensors
from minidistill.guidance import Interval
from minidistill.pipeline import StableDiffusion
from minidistill.training.command_line import DEFAULT_GUIDANCE, ScaledFile, model_name


class Teacher(NamedTuple):
    """How a teacher is guided; the names are those of ``draw`` and ``noise_error_share``."""

    guidance: float
    negative_prompt: str | None = None
    interval: Interval | None = None

    def __str__(self) -> str:
        where = f" for {self.interval.low:g} <= t <= {self.interval.high:g}" if self.interval else ""
        away = "no negative prompt" if self.negative_prompt is None else f'negative prompt "{self.negative_prompt}"'
        return f"guidance {self.guidance:g}{where}, {away}"


class Student(NamedTuple):
    """A student on disk: ``install(sd)`` puts it beside the teacher's UNet, which is then called with lora_enabled.

    ``few_steps`` are its DDIM steps and its teacher's, if it was taught to take fewer.
    """

    file: Path
    teacher: Teacher
    install: Callable[[StableDiffusion], None]
    few_steps: tuple[int, int] | None = None

    @property
    def sampling(self) -> dict[str, int]:
        """What ``draw`` has to be told besides how the teacher samples."""
        return dict(student_steps=self.few_steps[0]) if self.few_steps else {}


def read_student(path: Path, scale: float, args: Namespace) -> Student:
    """Read a run's folder, with a LoRA or a full student in it, or a LoRA file. ``args`` are the model flags.

    A LoRA at ``scale`` has the teacher of guidance 1 + scale (s - 1).
    """
    full = full_student(path)
    if full and scale != 1:
        raise ValueError(f"{full} is a whole model: only a LoRA has a strength.")
    if full:
        file = read_weights(full / "unet", STEMS["unet"], args.variant).file if full.is_dir() else full
        learned = LoRAFile(file, {}, read_tensors(file)[1])  # no layers
        install = partial(install_full, full, args, learned.metadata)
    else:
        learned = read_lora(path, scale)
        install = partial(add_student, file=learned)
    teacher = teacher_of(learned)
    if teacher.guidance == 1:
        raise ValueError(f"{learned.path} at strength {scale:g} stands for no guidance: name another strength.")
    return Student(learned.path, teacher, install, learned.few_steps)


def teacher_of(learned: LoRAFile) -> Teacher:
    """The teacher that a student learned from.

    Raises ValueError for a LoRA that has not learned guidance, or learned it from a teacher with a style.
    """
    if not learned.is_student:
        raise ValueError(f"{learned.path} does not say which guidance it has learned: it is not a student.")
    if style := learned.metadata.get("teacher_lora"):
        raise ValueError(
            f"{learned.path} was distilled from a teacher with the LoRA {style}. Merge that LoRA into the model first "
            "(python -m minidistill.export STYLE --to checkpoint --model MODEL), and pass the result as --model."
        )
    return Teacher(learned.guidance, learned.metadata.get("negative_prompt"), learned.interval)


def full_student(run: Path) -> Path | None:
    """The checkpoint that ``train.py --method full`` wrote into the run's folder, if there is one."""
    return next((path for path in (run / "student", run / "student.safetensors") if path.exists()), None)


def install_full(path: Path, args: Namespace, metadata: Mapping[str, str], sd: StableDiffusion) -> None:
    """Put the copy in ``path`` beside its teacher. Raises CheckpointError if ``sd`` is another model."""
    check_source(metadata, sd.schedule.prediction, sd.learned_guidance, sd.path, student=str(path))
    like = next(sd.unet.parameters())
    student = load(path, variant=args.variant if path.is_dir() else None, dtype=like.dtype, device=like.device).unet
    ours, theirs = ({name: p.shape for name, p in unet.named_parameters()} for unet in (sd.unet, student))
    if ours != theirs:
        raise CheckpointError(f"{path} is a copy of another UNet than that of {sd.path}: give --model its teacher.")
    sd.unet = FullStudent(sd.unet, student)


def label_of(path: Path) -> str:
    """What a run's folder or a LoRA file is called in a table."""
    return model_name(path) if path.is_dir() else path.stem


def read_students(runs: Sequence[ScaledFile], args: Namespace) -> dict[str, Student]:
    """The students by their labels in the table."""
    students = {}
    for path, scale in runs:
        label = label_of(path) + (f" x {scale:g}" if scale != 1 else "")
        if label in students or label in ("teacher", "no guidance"):
            raise ValueError(f'{path} would be called "{label}" in the table, like another method: rename it.')
        students[label] = read_student(path, scale, args)
    return students


def one_teacher(students: Mapping[str, Student], guidance: float | None) -> Teacher:
    """The teacher that all students learned from. Raises ValueError if they differ, or if ``guidance`` does."""
    if not students:
        return Teacher(DEFAULT_GUIDANCE if guidance is None else guidance)
    teachers = {student.teacher for student in students.values()}
    if len(teachers) > 1 or any(guidance not in (None, teacher.guidance) for teacher in teachers):
        learned = "; ".join(f"{label}: {student.teacher}" for label, student in students.items())
        raise ValueError(f"All students must have learned from one teacher, as it is what we compare with: {learned}.")
    return teachers.pop()
