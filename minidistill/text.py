"""Prompts to embeddings: the CLIP text encoder that conditions Stable Diffusion, from transformers."""

import warnings

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from minidistill.conditioning import Conditioning


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Prompts -> int64 ids [N, L], padded to the model's L tokens; warns about what had to be cut off."""
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
def encode_tokens(encoder: CLIPTextModel, ids: Tensor) -> Conditioning:
    """Token ids [N, L] -> embeddings [N, L, D]: the last hidden state, after the final norm.

    Padding tokens are attended to like any other, because Stable Diffusion was trained that way.
    """
    return Conditioning(encoder(ids.to(encoder.device)).last_hidden_state)
