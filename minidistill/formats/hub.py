"""Where a model lies: here, or on the Hugging Face hub, which has the tokenizer that a single file lacks too."""

import re
import sys
from pathlib import Path

from huggingface_hub import snapshot_download

from minidistill.formats.files import CheckpointError, blamed
from minidistill.formats.model_configs import read_json, read_unet_config
from minidistill.formats.model_folder import STEMS, candidates, find_weights, refuse_other_pipelines

CLIP = "openai/clip-vit-large-patch14"  # OpenCLIP, in SD 2.x, has the same vocabulary
TOKENIZER = ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"]
SETTINGS = ["model_index.json", "scheduler/*.json", *(f"{part}/config.json" for part in STEMS)]


def find_model(path: str | Path, variant: str | None = None, ema: bool = False) -> Path:
    """The folder or single file that ``path`` names, fetched if it is a hub id. Raises CheckpointError.

    ``variant`` is for folders and ``ema`` for single files: what a model does not have is refused.
    """
    if not Path(path).exists():
        # In a folder that is here it is a misspelt path; nobody meant to look for that online.
        if Path(path).parent.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            raise CheckpointError(f"There is no {path}: name a Stable Diffusion folder, a single file or a hub id.")
        path = fetch_model(str(path), variant)
    path = Path(path)
    flag = "--ema" if ema and path.is_dir() else "--variant" if variant and path.is_file() else None
    if flag:
        raise CheckpointError(f"{path} is a {'folder' if path.is_dir() else 'single file'}: leave {flag} out.")
    return path


def fetch_model(repo: str, variant: str | None = None) -> Path:
    """The folder of a model, with those of its files that are needed: from the cache, or fetched.

    Safetensors first; the older .bin files only of a network that comes in no other format, and fp16 as the last
    resort. Raises CheckpointError for a model of another kind before any weights are fetched.
    """
    folder = fetch(repo, [*SETTINGS, *(f"tokenizer/{name}" for name in TOKENIZER)])
    refuse_other_pipelines(folder)
    read_unet_config(folder / "unet/config.json")
    resorts = [variant] if variant else [None, "fp16"]
    for wanted in resorts:
        for suffix in ("safetensors", "bin"):
            for part, stem in STEMS.items():
                if has_weights(folder / part, stem, variant) or has_weights(folder / part, stem, wanted):
                    continue
                names = [name for name in candidates(stem, wanted) if f".{suffix}" in name]
                shards = [
                    f"{name.removesuffix(f'.{suffix}')}-*-of-*.{suffix}" for name in names if name.endswith(suffix)
                ]
                folder = fetch(repo, [f"{part}/{name}" for name in names + shards])
    return folder


def has_weights(folder: Path, stem: str, variant: str | None) -> bool:
    """Whether a network's weights are there; if in shards, all that the index names: fetching may have been cut off."""
    file = find_weights(folder, stem, variant)
    if file is None or file.suffix != ".json":
        return file is not None
    with blamed(file):
        return all((folder / name).exists() for name in set(read_json(file)["weight_map"].values()))


def fetch_tokenizer() -> Path:
    """Of CLIP, for a single file; announced, for nobody asked for it by name."""
    announcement = f"A single file holds no tokenizer: taking that of {CLIP} (--tokenizer FOLDER names another)."
    print(announcement, file=sys.stderr)
    return fetch(CLIP, TOKENIZER)


def fetch(repo: str, patterns: list[str]) -> Path:
    """The snapshot's folder. Raises CheckpointError where files are neither cached nor can be fetched."""
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:  # of the hub's client, or of the HTTP library below it, which changes with its version
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{repo} is neither a folder or file in {Path.cwd()}, nor in the hub's cache, and could not be fetched "
            f"({reason[0] if reason else type(error).__name__}): check the name and the connection."
        ) from error
