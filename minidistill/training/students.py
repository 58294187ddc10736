"""Which network learns (``train.py --student``), how its result is saved, and the flags that depend on the choice.

A kind of student is a class with four members: its peak ``learning_rate``, to be divided by the UNet's first width;
``make``, which makes teacher and student of the UNet; ``result``, the path of what is saved; and ``save``.
"""

import argparse
from copy import deepcopy
from pathlib import Path

from minidistill.distill import FullStudent
from minidistill.formats.lora_formats import read_lora
from minidistill.formats.lora_io import merge_file, refuse_second_guidance, save_lora
from minidistill.formats.merged_checkpoint import replaced_by, write_checkpoint
from minidistill.lora import DEFAULT_TARGETS, LoRAModel, inject_lora
from minidistill.pipeline import StableDiffusion
from minidistill.training.command_line import ScaledFile
from minidistill.training.recompute import low_memory, recompute
from minidistill.unet import UNet


class LoRAStudent:
    """Low-rank pairs beside the layers of the one network."""

    learning_rate = 0.128  # peak, divided by the UNet's first width

    @staticmethod
    def make(unet: UNet, args: argparse.Namespace) -> LoRAModel:
        model = inject_lora(unet, args.rank, args.alpha, args.targets or DEFAULT_TARGETS)
        recompute(model, low_memory(unet.config) if args.memory == "low" else 0)
        return model

    @staticmethod
    def result(out: Path, args: argparse.Namespace) -> Path:
        return out / "lora.safetensors"

    @staticmethod
    def save(sd: StableDiffusion, result: Path, args: argparse.Namespace, metadata: dict[str, str]) -> None:
        save_lora(sd.unet, result, metadata)


class FullCopy:
    """A second network, all of whose weights learn: plain distillation, for comparison."""

    learning_rate = 0.0064

    @staticmethod
    def make(unet: UNet, args: argparse.Namespace) -> FullStudent:
        student = deepcopy(unet).float().requires_grad_()
        recompute(student, low_memory(unet.config) if args.memory == "low" else 0)
        return FullStudent(unet, student)

    @staticmethod
    def result(out: Path, args: argparse.Namespace) -> Path:
        return out / ("student.safetensors" if args.model.is_file() else "student")

    @staticmethod
    def save(sd: StableDiffusion, result: Path, args: argparse.Namespace, metadata: dict[str, str]) -> None:
        if not result.exists():  # a whole model is never written over
            change = replaced_by(sd.unet.student)
            which = dict(variant=args.variant, ema=args.ema, prediction=args.prediction)
            write_checkpoint(args.model, change, result, metadata, **which)


MOST_FEW_STEPS = 500  # with more, the last step starts at t = 0, where DDIM has nothing left to do
STUDENTS = {"lora": LoRAStudent, "full": FullCopy}
# --method, the short form of --student and --source
METHODS = {"trajectories": ("lora", "trajectories"), "noised": ("lora", "noised"), "full": ("full", "trajectories")}


def choose_method(args: argparse.Namespace) -> None:
    """Fill in ``args.student``, ``args.source`` and ``args.method``, each of which may be None, from one another.

    Raises ValueError for flags that contradict each other.
    """
    if args.method and (args.student or args.source):
        raise ValueError("--method is short for --student and --source: give it alone, or leave it out.")
    if args.method:
        args.student, args.source = METHODS[args.method]
    args.student = args.student or "lora"
    args.source = args.source or ("images" if args.images else "trajectories")
    if args.images and args.source == "noised":  # as --method noised --images says it
        args.source = "images"
    if bool(args.images) != (args.source == "images") or (args.images and args.prompts):
        raise ValueError(
            "--images and --source images go together, without --prompts (images have captions) and without a --method "
            "other than noised."
        )
    if args.weights and (args.student == "full" or args.teacher_lora or args.kernel == "fused"):
        raise ValueError(
            f"--weights {args.weights} is for a W that stays as it is, in plain PyTorch: leave out --student full "
            "(--method full), --kernel fused and --teacher-lora (first merge the style into the model, by python -m "
            "minidistill.export STYLE --to checkpoint --model MODEL)."
        )
    if args.weights:
        args.kernel = "torch"  # the kernel reads W itself, not codes and scales
    if args.student == "full" and (args.alpha or args.targets):
        raise ValueError("--alpha and --targets are for a LoRA: leave them out, or --student full (--method full).")
    noised = args.source != "trajectories"
    if args.batched_teacher and not noised:
        raise ValueError("--batched-teacher is for a teacher in the loop: add --source noised.")
    if args.student == "full":
        args.method = "full noised" if noised else "full"
    else:
        args.method = "noised" if noised else "trajectories"


def choose_steps(args: argparse.Namespace) -> None:
    """Fill in the settings of the teacher's trajectories that depend on ``args.student_steps``.

    Raises ValueError for flags that contradict each other.
    """
    few = args.student_steps
    if few and (args.source != "trajectories" or args.weighting != "even" or args.stride not in (None, 1)):
        raise ValueError(
            "--student-steps learns from whole trajectories and has its own weights: leave out --images, "
            "--method noised, --source, --stride and --weighting."
        )
    if args.images and (args.trajectories or args.stride):
        raise ValueError("--trajectories and --stride are for images that the teacher samples: leave them out.")
    if few and few > MOST_FEW_STEPS:
        raise ValueError(f"--student-steps is at most {MOST_FEW_STEPS}, not {few}.")
    args.spacing = "trailing" if few else None  # the model's own
    thinned = args.source == "trajectories" and not few  # nine states of each are stored, otherwise fewer
    args.trajectories = args.trajectories or (240 if thinned else 480)
    args.sample_steps = args.sample_steps or (few * max(1, round(24 / few)) if few else 25)
    args.stride = args.stride or (1 if few else min(3, max(1, args.sample_steps // 8)))
    if args.stride >= max(args.sample_steps, 2):
        raise ValueError(f"--stride {args.stride} must be less than --sample-steps, which is {args.sample_steps}.")
    if few and args.sample_steps % few:
        raise ValueError(f"--sample-steps {args.sample_steps} must be a multiple of --student-steps {few}.")


def header(args: argparse.Namespace, base: str, prediction: str) -> dict[str, str]:
    """The metadata of a result's file: which teacher the student learned from, and how to sample with it."""
    metadata = dict(base=base, guidance=f"{args.guidance:g}", method=args.method, prediction=prediction)
    if args.negative_prompt is not None:
        metadata["negative_prompt"] = args.negative_prompt
    if args.interval:
        metadata["interval"] = str(args.interval)
    if args.student_steps:
        metadata |= dict(student_steps=str(args.student_steps), teacher_steps=str(args.sample_steps))
    return metadata


def prepare_teacher(sd: StableDiffusion, lora: ScaledFile | None) -> dict[str, str]:
    """Merge the LoRA of a style into W, for teacher and student alike; returns metadata that records it.

    Raises ValueError for a model or a LoRA that has learned guidance, and CheckpointError as ``read_lora`` and
    ``merge_file`` do.
    """
    refuse_second_guidance(sd.learned_guidance, sd.path)
    if lora is None:
        return {}
    file = read_lora(*lora)
    if file.is_student:
        raise ValueError(
            f"--teacher-lora {lora.path} has learned guidance, which must not be learned twice: name a style."
        )
    merge_file(sd.unet, file)
    return {"teacher_lora": f"{file.path.name}:{lora.scale:g}"}
