"""Prompts to embeddings: the CLIP text encoders that condition Stable Diffusion, from transformers."""

import warnings

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from minidistill.conditioning import Conditioning


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Prompts -> int64 ids [N, L], padded to the model's L tokens; warns about what had to be cut off."""
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"Prompts are a list of one or more strings, not {str(prompts)[:100]!r}.")
    length = tokenizer.model_max_length
    for ids in tokenizer(prompts, verbose=False).input_ids:  # our own warning instead
        if len(ids) > length:
            cut = tokenizer.decode(ids[length - 1 : -1])
            warnings.warn(
                f'A prompt is longer than the {length} tokens the model reads. Cut off: "{cut}"', stacklevel=3
            )
    padded = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return padded.input_ids


class TwoTextEncoders(nn.Module):
    """The text encoders of SDXL: CLIP ViT-L/14, and OpenCLIP bigG/14, whose projection gives the pooled vector."""

    def __init__(self, first: CLIPTextModel, second: CLIPTextModelWithProjection):
        super().__init__()
        self.first, self.second = first, second

    @property
    def device(self) -> torch.device:
        return self.first.device

    def forward(self, ids: Tensor) -> Conditioning:
        """Token ids [N, L] -> tokens [N, L, D_1 + D_2], from before each encoder's last layer; pooled [N, P]."""
        one = self.first(ids, output_hidden_states=True)
        two = self.second(pad_with_zeros(ids), output_hidden_states=True)
        return Conditioning(torch.cat([x.hidden_states[-2] for x in (one, two)], dim=-1), two.text_embeds)


def pad_with_zeros(ids: Tensor) -> Tensor:
    """[N, L], padded with the end token as for the first encoder -> padded with 0, as for the second."""
    trailing = (ids == ids[:, -1:]).flip(1).cumprod(1).flip(1).bool()  # the last run of end tokens
    return torch.cat([ids[:, :1], ids[:, 1:].masked_fill(trailing[:, :-1], 0)], dim=1)  # but its first ends the prompt


@torch.no_grad()
def encode_tokens(encoder: CLIPTextModel | TwoTextEncoders, ids: Tensor) -> Conditioning:
    """Token ids [N, L] -> embeddings [N, L, D]: the last hidden state, after the final norm, or what SDXL has instead.

    Padding tokens are attended to like any other, because Stable Diffusion was trained that way.
    """
    ids = ids.to(encoder.device)
    if isinstance(encoder, TwoTextEncoders):
        return encoder(ids)
    return Conditioning(encoder(ids).last_hidden_state)
