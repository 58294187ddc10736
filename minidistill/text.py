"""Prompts to embeddings: the CLIP text encoder that Stable Diffusion conditions on, through transformers."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from minidistill.formats.files import CheckpointError, blamed


def fill_positions(encoder: nn.Module) -> None:
    """Give an encoder built on the meta device the one buffer that no checkpoint holds: positions 0, 1, 2, ..."""
    for module in encoder.modules():
        if "position_ids" in module._buffers:
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]


def read_tokenizer(folder: Path, context: int, pad_token: str | None = None) -> CLIPTokenizer:
    """Raises CheckpointError for a folder without a tokenizer.

    Args:
        context: the tokens that the text encoder reads, whatever length the folder states, if any.
        pad_token: in place of the folder's own.
    """
    # transformers 5 writes everything into one tokenizer.json.
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise CheckpointError(
            f"{folder} holds no tokenizer (vocab.json, merges.txt): fetch it, or name another with --tokenizer FOLDER."
        )
    with blamed(folder):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.model_max_length = context
    if pad_token:
        tokenizer.pad_token = pad_token
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Prompts -> int64 ids [N, L], padded to the model's context; warns of what had to be cut off."""
    length = tokenizer.model_max_length
    for ids in tokenizer(prompts).input_ids:
        if len(ids) > length:
            cut = tokenizer.decode(ids[length - 1 : -1])
            warnings.warn(
                f'A prompt is longer than the {length} tokens the model reads. Cut off: "{cut}"', stacklevel=3
            )
    padded = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return padded.input_ids


@torch.no_grad()
def encode_tokens(encoder: CLIPTextModel, ids: Tensor) -> Tensor:
    """Token ids [N, L] -> embeddings [N, L, D], the last hidden state after the final norm.

    Padding is attended to like any token: Stable Diffusion was trained so.
    """
    return encoder(ids.to(encoder.device)).last_hidden_state
