"""LoRA in models: save it, load it, merge it for good, and tell the student from styles."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from minidistill.config import UNetConfig
from minidistill.formats.files import CheckpointError, user_path
from minidistill.formats.lora_formats import LoRAFile, Pair, read_lora
from minidistill.formats.original_names import translate, unet_names
from minidistill.formats.single_file import number
from minidistill.formats.tensor_files import write_tensors
from minidistill.lora import LoRAModel, add_to_weight, inject_pairs, lora_layers, warn_of_lost_change
from minidistill.pipeline import StableDiffusion


def save_lora(model: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the LoRA of ``model`` to ``path``, a .safetensors with ``<layer>.lora_down`` and ``<layer>.lora_up``.

    The header holds rank and alpha, and ``metadata`` (base, guidance, method, negative_prompt, ...). A file without
    ``guidance`` is a style; that of a loaded LoRA is in ``read_lora(path).metadata``. Raises ValueError if there is no
    LoRA, or if its layers differ in rank or alpha, as those of other tools' files may.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("This model has no LoRA to save: call inject_lora first.")
    kinds = {(len(layer.lora_down), float(layer.alpha)) for layer in layers.values()}
    if len(kinds) > 1:
        raise ValueError(f"Our LoRA files hold one rank and one alpha; the layers of this model have {sorted(kinds)}.")
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_down"] = layer.lora_down.detach().cpu()
        tensors[f"{name}.lora_up"] = layer.lora_up.detach().cpu()
    ((rank, alpha),) = kinds
    metadata = {**(metadata or {}), "rank": str(rank), "alpha": repr(alpha).removesuffix(".0")}
    write_tensors(user_path(path), tensors, metadata)


def load_lora(model: nn.Module, path: str | Path, scale: float = 1.0) -> LoRAModel:
    """Inject the LoRA in ``path`` into ``model``, with the ranks, alphas and layers of the file.

    ``scale`` multiplies every alpha. A student that is loaded at scale 1 can be sampled at other guidance scales, see
    ``StableDiffusion.sample``. Raises CheckpointError, with the model unchanged, for a file without a LoRA and for a
    LoRA of another network: every layer that does not fit is listed.
    """
    return inject_file(model, read_lora(path, scale))


@torch.no_grad()
def inject_file(model: nn.Module, file: LoRAFile) -> LoRAModel:
    """``load_lora`` for a file that has been read."""
    pairs = fit(file, dict(model.named_parameters()))
    # Read before the model is changed: a damaged header raises.
    dial, few_steps = file.dial if file.scale == 1 else None, file.few_steps
    model = inject_pairs(model, {name: (pair.rank, pair.alpha) for name, pair in pairs.items()})
    model.dial, model.few_steps = dial, few_steps
    model.learned_guidance = file.metadata.get("guidance") if file.scale else None
    for name, layer in lora_layers(model).items():
        layer.lora_down.copy_(pairs[name].down)
        layer.lora_up.copy_(pairs[name].up)
    return model


def add_student(sd: StableDiffusion, file: LoRAFile) -> None:
    """Inject the LoRA of a student into ``sd.unet``.

    Raises CheckpointError, with the model unchanged, as ``load_lora`` does, and if the student learned from a model
    that predicts something else (its layers may look the same), or if the model has learned guidance already.
    """
    check_source(file.metadata, sd.schedule.prediction, sd.learned_guidance, sd.path, student=str(file.path))
    sd.unet = inject_file(sd.unet, file)


def check_source(
    metadata: Mapping[str, str],
    predicts: str,
    learned_guidance: str | None,
    source: Path,
    student: str = "The student",
) -> None:
    """Raises CheckpointError if ``source`` predicts something other than the student's teacher did, or has learned
    guidance already.
    """
    if "guidance" in metadata:
        refuse_second_guidance(learned_guidance, source)
    learned = metadata.get("prediction")
    if learned and learned != predicts:
        raise CheckpointError(
            f"{student} learned from a model that predicts {learned}, and {source} says that it predicts {predicts}: "
            f"give --model the one it was made for, or add --prediction {learned} if this is it."
        )


def refuse_second_guidance(learned: str | None, source: Path) -> None:
    """Raises CheckpointError if the UNet of ``source`` has ``learned`` guidance already.

    Then no student may be trained on it, merged into it or put beside it.
    """
    if learned is not None:
        raise CheckpointError(
            f"{source} has learned guidance {learned}, which must not be learned twice: name the model that it was "
            "made from."
        )


@torch.no_grad()
def merge_file(model: nn.Module, file: LoRAFile) -> None:
    """W <- W + (alpha / rank) lora_up lora_down, for good: no pair stays beside W. Raises and warns as ``load_lora``
    and ``merge_lora`` do.
    """
    weights, squares = dict(model.named_parameters()), {}
    for name, pair in fit(file, weights).items():
        weight = weights[f"{name}.weight"]
        weight.copy_(add_to_weight(name, weight, pair.delta(weight.device), squares))
    warn_of_lost_change(squares)


def fit(file: LoRAFile, weights: Mapping[str, Tensor]) -> dict[str, Pair]:
    """The pairs of ``file`` by the names and in the shapes of the network that has these ``weights``.

    Raises CheckpointError that lists every layer of ``file`` that the network lacks or has in another shape.
    """
    names, pairs, problems = underscored_names(weights), {}, []
    for theirs, pair in file.layers.items():
        name = names.get(theirs.replace(".", "_"))
        weight = weights.get(f"{name}.weight")
        if weight is None or weight.ndim < 2:
            problems.append(f"no such layer: {theirs}")
        elif name in pairs:
            problems.append(f"{name} is there under two names")
        elif fitting := pair.shaped_like(weight):
            pairs[name] = fitting
        else:
            problems.append(f"{name} is {list(weight.shape)}, the LoRA is for {[len(pair.up), *pair.down.shape[1:]]}")
    if problems:
        raise CheckpointError(
            f"{file.path} is a LoRA for another model than this one ({len(problems)} layers differ; "
            f"it was made for {file.base}):\n  " + "\n  ".join(problems)
        )
    return pairs


def underscored_names(weights: Iterable[str]) -> dict[str, str]:
    """Our name of each layer, by our name and by that of the original code, both with underscores for dots."""
    layers = {name.removesuffix(".weight"): None for name in weights}
    depth = tuple(
        number(layers, f"down_blocks.{i}.attentions.0.transformer_blocks.{{}}.norm1")
        for i in range(number(layers, "down_blocks.{}.resnets.0.conv1"))
    )
    table = unet_names(UNetConfig(layers=number(layers, "down_blocks.0.resnets.{}.conv1"), depth=depth))
    original = {translate(f"{name}.", table).removesuffix("."): name for name in layers}
    names = original | {name: name for name in layers}
    return {theirs.replace(".", "_"): ours for theirs, ours in names.items()}


def student_and_styles(files: list[LoRAFile]) -> tuple[LoRAFile | None, list[LoRAFile]]:
    """The student among several LoRAs, if there is one, and the others, which belong to its teacher's W as well.

    Raises ValueError for two students. Warns if the student's teacher had a style that is not among the files.
    """
    students, styles = [f for f in files if f.is_student], [f for f in files if not f.is_student]
    student = students[0] if students else None
    if len(students) > 1:
        raise ValueError(f"{' and '.join(str(f.path) for f in students)} have each learned guidance: give one of them.")
    teacher_lora = student.metadata.get("teacher_lora") if student else None
    if teacher_lora and teacher_lora not in [f"{f.path.name}:{f.scale:g}" for f in styles]:
        warnings.warn(
            f"{student.path} was distilled from a teacher with the LoRA {teacher_lora}: "
            "give that one too, at the same strength.",
            stacklevel=2,
        )
    return student, styles
