"""Tensors as they lie in a file: described without reading them, then mapped into memory one by one."""

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor


class MappedFile:
    """A file's bytes, which the system reads when they are touched. Writing to them leaves the file as it is."""

    def __init__(self, path: Path):
        self.path = path
        self.size = path.stat().st_size
        self.bytes = self.map()

    def map(self) -> Tensor:
        """The whole file as uint8 [size]; what it takes of memory is given back with the last tensor made of it."""
        return torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file; ``stride`` counts elements."""

    file: MappedFile
    start: int  # its first byte
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self, dtype: torch.dtype) -> Tensor:
        """Its values.

        What the file holds as it is wanted stays a part of the one mapping, unread. Anything else is converted out of a
        mapping of its own, so that the pages it came from are given back at once; and since it is written anew then,
        convolution weights [out, in, k, k] come channels last, the layout that suits small ones best.
        """
        as_wanted = dtype == self.dtype and self.stride == row_major(self.shape)
        source = self.file.bytes if as_wanted else self.file.map()
        stop = self.start + reach(self.shape, self.stride) * self.dtype.itemsize
        values = source[self.start : stop]
        values = values if self.start % self.dtype.itemsize == 0 else values.clone()
        values = values.view(self.dtype).as_strided(self.shape, self.stride)
        if as_wanted:
            return values
        convolution = len(self.shape) == 4
        return values.to(dtype).contiguous(
            memory_format=torch.channels_last if convolution else torch.contiguous_format
        )

    def part(self, i: int, parts: int) -> "StoredTensor":
        """The ``i``-th of ``parts`` equal blocks of rows. Raises ValueError where they are not equal."""
        rows, left = divmod(self.shape[0], parts)
        if left:
            raise ValueError(f"{self.shape[0]} rows are no {parts} equal blocks")
        start = self.start + i * rows * self.stride[0] * self.dtype.itemsize
        return replace(self, start=start, shape=(rows, *self.shape[1:]))

    def without_kernel(self) -> "StoredTensor":
        """A 1x1 convolution [out, in, 1, 1] as the matrix [out, in] that it is; anything else as it was."""
        return replace(self, shape=self.shape[:2], stride=self.stride[:2]) if self.shape[2:] == (1, 1) else self


def is_shape(numbers: object) -> bool:
    """Whether something read from a file can be a shape, strides or offsets: few whole numbers, none negative."""
    if not isinstance(numbers, tuple) or len(numbers) > 8:
        return False
    return all(type(n) is int and 0 <= n < 2**48 for n in numbers)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many elements of storage a tensor spans, from its first to its last."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride)) if prod(shape) else 0
