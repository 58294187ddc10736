"""Find a model on this machine or on the Hugging Face hub, which also has the tokenizer that a single file lacks."""

import re
import sys
from pathlib import Path

from huggingface_hub import snapshot_download

from minidistill.formats.files import CheckpointError, user_path
from minidistill.formats.model_configs import read_unet_config
from minidistill.formats.model_folder import (
    XL_STEMS,
    candidates,
    find_weights,
    refuse_other_pipelines,
    require_variant,
    stems,
    weight_files,
)

CLIP = "openai/clip-vit-large-patch14"  # OpenCLIP, in SD 2.x, has the same vocabulary
TOKENIZER = ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"]
TOKENIZER += ["added_tokens.json"]  # words that older folders have learned
CONFIGS = ["model_index.json", "scheduler/*.json", *(f"{part}/config.json" for part in XL_STEMS)]


def find_model(path: str | Path, variant: str | None = None, ema: bool = False) -> Path:
    """The folder or single file that ``path`` names, downloaded first if it is a hub id. Raises CheckpointError.

    A model's folder in the hub's cache stands for its snapshot. Only folders have a ``variant``, and only single files
    have ``ema`` weights: the other combination is refused.
    """
    path = user_path(path)
    if not path.exists():
        # Inside a folder that exists, it is a misspelt path rather than a hub id.
        if path.parent.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            raise CheckpointError(f"There is no {path}: name a Stable Diffusion folder, a single file or a hub id.")
        path = fetch_model(str(path), variant)
    path = newest_snapshot(path)
    if ema and path.is_dir():
        raise CheckpointError(f"{path} is a folder: leave --ema out.")
    if variant and path.is_file():
        raise CheckpointError(f"{path} is a single file: leave --variant out.")
    return path


def newest_snapshot(folder: Path) -> Path:
    """The snapshot in a model's folder in the hub's cache, models--owner--name; any other path itself."""
    if not (folder / "snapshots").is_dir():
        return folder
    main = folder / "refs/main"
    snapshots = [folder / "snapshots" / main.read_text().strip()] if main.is_file() else []
    snapshots += sorted((folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    snapshot = next((path for path in snapshots if path.is_dir()), None)
    if snapshot is None:
        raise CheckpointError(f"{folder} is a folder of the hub's cache without any files: fetch the model again.")
    print(f"{folder} is a folder of the hub's cache: using {snapshot}.", file=sys.stderr)
    return snapshot


def fetch_model(repo: str, variant: str | None = None) -> Path:
    """The folder of a hub model, from the cache or downloaded, with only the files we need.

    Safetensors first; .bin for a network that has nothing else; fp16 as the last resort. Another kind of model is
    refused with a CheckpointError before any weights are downloaded.
    """
    tokenizers = [f"{part}/{name}" for part in ("tokenizer", "tokenizer_2") for name in TOKENIZER]
    folder = fetch(repo, [*CONFIGS, *tokenizers])
    refuse_other_pipelines(folder)
    read_unet_config(folder / "unet/config.json")
    for wanted in [variant, None] if variant else [None, "fp16"]:
        if variant and not wanted:  # the networks that have it are there now
            require_variant(folder, variant)
        for suffix in ("safetensors", "bin"):
            for part, stem in stems(folder).items():
                if has_weights(folder / part, stem, variant) or has_weights(folder / part, stem, wanted):
                    continue
                names = [name for name in candidates(stem, wanted) if f".{suffix}" in name]
                names.append(f"{names[0].removesuffix(f'.{suffix}')}-*-of-*.{suffix}")  # shards
                folder = fetch(repo, [f"{part}/{name}" for name in names])
    return folder


def has_weights(folder: Path, stem: str, variant: str | None) -> bool:
    """True if a network's weights are complete: a download may have stopped before the last shard."""
    file = find_weights(folder, stem, variant)
    return file is not None and all(part.exists() for part in weight_files(file))


def fetch_tokenizer() -> Path:
    """CLIP's tokenizer, for a single file. Says so, because nobody asked for this download."""
    message = f"A single file holds no tokenizer: using the one of {CLIP} (--tokenizer FOLDER names another)."
    print(message, file=sys.stderr)
    return fetch(CLIP, TOKENIZER)


def fetch(repo: str, patterns: list[str]) -> Path:
    """The snapshot's folder. Raises CheckpointError if files are not cached and cannot be downloaded."""
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:  # the hub's client, or its HTTP library, whose errors change with the version
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{repo} is neither a folder or file in {Path.cwd()}, nor in the hub's cache, and could not be downloaded "
            f"({reason[0] if reason else type(error).__name__}): check the name and the connection."
        ) from error
