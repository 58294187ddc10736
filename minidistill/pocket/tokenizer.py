"""The tokenizer: a byte-level BPE in CLIP's file format, in which every word of every caption is one token."""

import json
import re
from collections import Counter
from pathlib import Path

from transformers.convert_slow_tokenizer import bytes_to_unicode

from minidistill.formats.files import write_text

CONTEXT = 20  # tokens per prompt, including start and end
START, END = "<|startoftext|>", "<|endoftext|>"


def merge_pair(pieces: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Join every occurrence of the pair, left to right: (l, e, m, o, n</w>), (e, m) -> (l, em, o, n</w>)."""
    merged: list[str] = []
    i = 0
    while i < len(pieces):
        step = 2 if pieces[i : i + 2] == pair else 1
        merged.append("".join(pieces[i : i + step]))
        i += step
    return tuple(merged)


def learn_merges(words: set[str]) -> list[tuple[str, str]]:
    """Byte-pair merges of plain ASCII words, the most frequent pair first, until each word is one piece."""
    pieces = {word: (*word[:-1], word[-1] + "</w>") for word in sorted(words)}
    merges = []
    while any(len(p) > 1 for p in pieces.values()):
        counts = Counter(pair for p in pieces.values() for pair in zip(p, p[1:]))
        pair = max(counts, key=lambda pair: (counts[pair], pair))
        pieces = {word: merge_pair(p, pair) for word, p in pieces.items()}
        merges.append(pair)
    return merges


def write_tokenizer(captions: list[str], folder: Path) -> None:
    """Write the files that transformers' CLIPTokenizer reads.

    As in CLIP: 256 bytes, the same 256 at the end of a word, the merges, then the two special tokens. The end token is
    also the padding, as in Stable Diffusion 1.x. Captions must be lower-case ASCII; CLIP splits words at hyphens.
    """
    merges = learn_merges({word for caption in captions for word in re.findall("[a-z]+", caption)})
    symbols = bytes_to_unicode().values()  # a printable character for each byte, in the order of CLIP's vocabulary
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), START, END]
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    files = {
        "vocab.json": {token: i for i, token in enumerate(tokens)},
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": CONTEXT,
            "do_lower_case": True,
            "add_prefix_space": False,
            "errors": "replace",
            **special,
        },
    }
    for name, content in files.items():
        text = json.dumps(content, ensure_ascii=False, indent=None if name == "vocab.json" else 2)
        write_text(folder / name, text + "\n")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    write_text(folder / "merges.txt", "\n".join(lines) + "\n")
