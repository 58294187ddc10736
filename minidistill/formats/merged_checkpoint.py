"""A checkpoint with another UNet in it, such as W + (alpha / rank) lora_up lora_down: a model like any other."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from minidistill.formats.files import folder_written_whole
from minidistill.formats.hub import find_model
from minidistill.formats.lora_files import check_fit
from minidistill.formats.lora_formats import LoRAFile
from minidistill.formats.model_configs import MODEL_INDEX, read_json, write_json
from minidistill.formats.model_folder import STEMS, read_model_folder, read_weights
from minidistill.formats.single_file import EMA, MODELSPEC, read_single_file, to_single_file
from minidistill.formats.stored import StoredTensor
from minidistill.formats.tensor_files import read_tensors, write_tensors

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]  # of the UNet's tensors, by their names in a folder


def write_checkpoint(
    source: Path,
    change: Change,
    out: Path,
    metadata: Mapping[str, str],
    *,
    variant: str | None = None,
    ema: bool = False,
) -> None:
    """Write the model ``source`` with a changed UNet as ``out``, a folder or a single .safetensors.

    ``change`` is :func:`with_loras` or :func:`replaced_by`; ``metadata`` goes into the header of the UNet's weights.
    ``variant`` and ``ema`` say which weights, as in ``load``. Raises CheckpointError for a source that is damaged or
    another model than the LoRAs are for; ValueError for an ``out`` that cannot be written.
    """
    source = find_model(source, variant, ema)
    to_file = out.suffix == ".safetensors"
    if source.is_file() and not to_file:
        raise ValueError(f"{source} is a single file, without the tokenizer of a folder: --out FILE.safetensors.")
    if source.is_file():
        write_file_of_file(source, change, out, metadata, ema)
    elif to_file:
        write_file_of_folder(source, change, out, metadata, variant)
    else:
        write_folder(source, change, out, metadata, variant)


def with_loras(files: Sequence[LoRAFile]) -> Change:
    """Every LoRA added to W, one after another, in the dtypes that W is stored in."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for file in files:
            check_fit(file, tensors)
            for name, pair in file.layers.items():
                tensors[f"{name}.weight"] = pair.added_to(tensors[f"{name}.weight"])
        return tensors

    return change


def replaced_by(unet: nn.Module) -> Change:
    """The weights of ``unet`` instead, in the dtypes of those they replace."""
    weights = unet.state_dict()
    return lambda tensors: {name: weights[name].to("cpu", tensor.dtype) for name, tensor in tensors.items()}


def loaded(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    return {name: tensor.load(tensor.dtype) for name, tensor in stored.items()}


def write_folder(source: Path, change: Change, out: Path, metadata: Mapping[str, str], variant: str | None) -> None:
    """A folder of a folder: all but the UNet's weights is copied as it is."""
    stored, weights = read_weights(source / "unet", STEMS["unet"], variant)
    tensors = change(loaded(stored))
    index = read_json(source / "model_index.json") if (source / "model_index.json").exists() else MODEL_INDEX
    with folder_written_whole(out) as beside:
        # Only the parts of the pipeline: beside them people keep other weights, which would not be merged.
        for part in source.iterdir():
            if part.is_dir() and part.name in index and part.name != "unet":
                shutil.copytree(part, beside / part.name)
        (beside / "unet").mkdir()
        shutil.copy(source / "unet/config.json", beside / "unet/config.json")
        infix = ".fp16" if ".fp16." in weights.name else f".{variant}" if variant else ""  # others' files have it too
        write_tensors(beside / "unet" / f"{STEMS['unet']}{infix}.safetensors", tensors, metadata)
        write_json(beside / "model_index.json", without_absent_parts(index, beside))


def without_absent_parts(index: dict, folder: Path) -> dict:
    """A pipeline's index less the parts that ``folder`` lacks: of a hub's model, only what is needed was fetched."""

    def lacks(name: str) -> bool:
        return isinstance(index.get(name), list) and not (folder / name).is_dir()

    index = {name: [None, None] if lacks(name) else entry for name, entry in index.items()}
    return index | ({"requires_safety_checker": False} if lacks("safety_checker") else {})


def write_file_of_file(source: Path, change: Change, out: Path, metadata: Mapping[str, str], ema: bool) -> None:
    """A single file of a single file: all but the UNet's weights is in it as it was; of those, the one merged copy."""
    unet = read_single_file(source, prediction="eps", ema=ema).unet  # its tensors: either prediction has the same
    stored, header = read_tensors(source)
    tensors = loaded({name: tensor for name, tensor in stored.items() if not name.startswith(EMA)})
    tensors |= {unet.called(name): tensor for name, tensor in change(loaded(unet.tensors)).items()}
    predicts = MODELSPEC.get(metadata.get("prediction"))  # which no tensor shows
    header = header | ({"modelspec.prediction_type": predicts} if predicts else {})
    write_tensors(out, tensors, {**header, **metadata})


def write_file_of_folder(
    source: Path, change: Change, out: Path, metadata: Mapping[str, str], variant: str | None
) -> None:
    """A single file of a folder: UNet, VAE and text encoder under the names of such files."""
    found = read_model_folder(source, variant=variant)
    unet, vae, text = change(loaded(found.unet.tensors)), loaded(found.vae.tensors), loaded(found.text.tensors)
    tensors = to_single_file(unet, found.unet_config, vae, found.vae_config, text, found.text_config)
    predicts = {"modelspec.prediction_type": MODELSPEC[found.schedule.prediction]}  # which no tensor shows
    write_tensors(out, tensors, {**metadata, **predicts})
