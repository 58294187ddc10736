"""Write a checkpoint with a changed UNet, such as W + (alpha / rank) lora_up lora_down: a model like any other."""

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minidistill.formats.files import CheckpointError, atomic_folder, read_json, write_json
from minidistill.formats.hub import find_model
from minidistill.formats.load_model import check_model, check_parts
from minidistill.formats.lora_formats import LoRAFile
from minidistill.formats.lora_io import check_source, fit
from minidistill.formats.model_configs import MODEL_INDEX, PUBLISHED, XL_INDEX, Description
from minidistill.formats.model_folder import STEMS, read_index, read_model_folder
from minidistill.formats.single_file import (
    EMA,
    MODELSPEC,
    V_PREDICTION,
    ZERO_SNR,
    detect_version,
    file_schedule,
    read_single_file,
    stated_prediction,
    to_single_file,
    unet_shapes,
)
from minidistill.formats.tensor_files import read_tensors, without_hashes, write_tensors
from minidistill.lora import Squares, add_to_weight

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]  # the UNet's tensors, by our names -> the changed ones


def write_checkpoint(
    source: Path,
    change: Change,
    out: Path,
    metadata: Mapping[str, str],
    *,
    variant: str | None = None,
    ema: bool = False,
    prediction: str | None = None,
) -> None:
    """Write the model ``source`` with a changed UNet to ``out``, a folder or a single .safetensors.

    ``change`` is ``with_loras(...)`` or ``replaced_by(...)``. ``metadata`` goes into the header of the UNet's weights.
    ``variant`` and ``ema`` select weights, and ``prediction`` corrects what the source says, as in ``load``. Raises
    CheckpointError for a source that is damaged, does not fit the LoRAs or says that it predicts something other than
    they learned, and ValueError for an ``out`` that cannot be written.
    """
    source = find_model(source, variant, ema)
    to_file = out.suffix.lower() == ".safetensors"
    if source.is_file():
        if not to_file:
            raise ValueError(f"{source} is a single file, without the tokenizer of a folder: --out FILE.safetensors.")
        file_to_file(source, change, out, metadata, ema, prediction)
        return
    model = read_model_folder(source, prediction, variant)
    check_model(model, source)
    check_source(metadata, model.schedule.prediction, model.unet.learned_guidance, source)
    if to_file:
        folder_to_file(source, model, change, out, metadata)
    else:
        folder_to_folder(source, model, change, out, metadata, prediction)


def with_loras(files: Sequence[LoRAFile], squares: Squares, generator: torch.Generator | None = None) -> Change:
    """Add the LoRAs to W, one after another, in the dtype of each stored weight, as ``lora.add_to_weight`` does.

    Raises CheckpointError for weights of 8 bits.
    """

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = dict(tensors)
        for file in files:
            for name, pair in fit(file, tensors).items():
                weight = tensors[f"{name}.weight"]
                if weight.itemsize < 2:
                    raise CheckpointError(
                        f"{file.path} cannot be merged into weights of 8 bits ({name}), in which little of it would be "
                        "left: take a version of the model in 16 or 32 bits, or give your program the LoRA beside it."
                    )
                tensors[f"{name}.weight"] = add_to_weight(name, weight, pair.delta(weight.device), squares, generator)
        return tensors

    return change


def replaced_by(unet: nn.Module) -> Change:
    """Use the weights of ``unet`` instead, in the dtypes of those they replace, or in float16 for 8 bits."""
    weights = unet.state_dict()

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        dtypes = {name: tensor.dtype if tensor.itemsize > 1 else torch.float16 for name, tensor in tensors.items()}
        return {name: weights[name].to("cpu", dtype) for name, dtype in dtypes.items()}

    return change


def folder_to_folder(
    source: Path, model: Description, change: Change, out: Path, metadata: Mapping[str, str], prediction: str | None
) -> None:
    """Copy everything but the UNet's weights unchanged, or with the ``prediction`` that corrects it."""
    check_parts(model, source)
    scheduler, unet = "scheduler/scheduler_config.json", model.unet
    tensors = change(unet.tensors)
    index = read_index(source) or (XL_INDEX if model.is_xl else MODEL_INDEX)
    with atomic_folder(out) as temporary:
        # Only the parts of the pipeline: people keep other weights next to them, which would not be merged.
        for part in source.iterdir():
            if part.is_dir() and part.name in index and part.name != "unet":
                shutil.copytree(part, temporary / part.name, copy_function=shutil.copyfile)
                (temporary / part.name).chmod(part.stat().st_mode | 0o700)  # the source may be read-only
        (temporary / "unet").mkdir()
        shutil.copyfile(source / "unet/config.json", temporary / "unet/config.json")
        # The name keeps the source's variant, such as fp16.
        suffixes = ("safetensors", "bin", "index", "json")
        variant = [word for word in unet.file.name.split(".")[1:] if word not in suffixes]
        file = temporary / "unet" / ".".join([STEMS["unet"], *variant, "safetensors"])
        write_tensors(file, tensors, {**without_hashes(unet.metadata), **metadata})
        if prediction:
            contents = read_json(source / scheduler)
            write_json(temporary / scheduler, contents | {"prediction_type": PUBLISHED[prediction]})
        write_json(temporary / "model_index.json", drop_absent_parts(index, temporary))


def drop_absent_parts(index: dict, folder: Path) -> dict:
    """The pipeline's index without the parts that ``folder`` lacks: we download only what we need from the hub."""
    absent = [name for name, entry in index.items() if isinstance(entry, list) and not (folder / name).is_dir()]
    checker = {"requires_safety_checker": False} if "safety_checker" in absent else {}
    return index | dict.fromkeys(absent, [None, None]) | checker


def file_to_file(
    source: Path, change: Change, out: Path, metadata: Mapping[str, str], ema: bool, prediction: str | None
) -> None:
    """Everything but the UNet's weights stays as it is. EMA copies are left out, since nothing was merged into them."""
    tensors, header = read_tensors(source)
    predicts = prediction or stated_prediction(tensors, header, source) or metadata.get("prediction")
    model = read_single_file(source, predicts or "eps", ema)  # the tensors do not depend on it
    check_model(model, source)
    check_parts(model, source)
    check_source(metadata, model.schedule.prediction, model.unet.learned_guidance, source)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(EMA)}
    tensors |= {model.unet.name_in_file(name): tensor for name, tensor in change(model.unet.tensors).items()}
    said = state_prediction(tensors, predicts, model.is_xl) if predicts else {}
    write_tensors(out, tensors, {**without_hashes(header), **said, **metadata})


def state_prediction(tensors: dict[str, Tensor], predicts: str, xl: bool) -> dict[str, str]:
    """Mark a single file's ``tensors`` with what the UNet predicts; returns the line of its header that says so."""
    if predicts == "eps":
        tensors.pop(V_PREDICTION, None)
    elif xl:
        tensors[V_PREDICTION] = torch.zeros(0)  # how other tools know an XL that predicts v
    return {"modelspec.prediction_type": MODELSPEC[predicts]}


def folder_to_file(source: Path, model: Description, change: Change, out: Path, metadata: Mapping[str, str]) -> None:
    """UNet, VAE and text encoder go into one file, under the names that such files use."""
    schedule = model.schedule
    stated = file_schedule(schedule.prediction, schedule.zero_terminal_snr)  # as the file will be read
    sampling = {name: getattr(stated, name) for name in ("spacing", "steps_offset", "set_alpha_to_one")}
    if replace(schedule, **sampling) != stated:
        raise ValueError(f"{source} has noise levels that a single file cannot state: write a folder, not {out}.")
    if schedule != stated:
        warnings.warn(f"{out} cannot state how {source} spaces its steps or ends them.", stacklevel=2)
    texts = zip((text.tensors for text in model.texts), model.text_configs)
    unet = change(model.unet.tensors)
    tensors = to_single_file(unet, model.unet_config, model.vae.tensors, model.vae_config, *texts)
    check_parts(model, source)  # after to_single_file, whose refusals say more about another text encoder
    stated_unet = unet_shapes(tensors, detect_version(tensors, source), schedule.prediction)
    if stated_unet.sample_size != model.unet_config.sample_size:
        warnings.warn(f"{out} cannot state the image size of {source}: sample with --height and --width.", stacklevel=2)
    if model.is_xl and not model.force_zeros:
        warnings.warn(
            f"{out} cannot state that {source} encodes the empty prompt, where SDXL has zeros: sample with "
            '--negative-prompt "".',
            stacklevel=2,
        )
    if schedule.zero_terminal_snr:
        tensors[ZERO_SNR] = torch.zeros(0)
    said = state_prediction(tensors, schedule.prediction, model.is_xl)
    write_tensors(out, tensors, {**without_hashes(model.unet.metadata), **metadata, **said})
