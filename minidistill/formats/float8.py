"""W in 8 bits (``--weights float8``): half the memory of bfloat16, for a frozen W.

    W ~ scale * code,   code: float8_e4m3fn, with 3 bits of mantissa and values up to 448
                        scale: one power of two a layer, so that the product is exact (in float16 if W is not tiny)

Each use of W makes the product anew, in the forward and in the backward pass. Autograd keeps the 8 bits only. In a
frozen linear layer that is all it keeps, because dL/dx = dL/dy W needs no x. A scale for each output channel would be
no better: the codes are floating point, so rounding is relative (2.65% of W's norm either way in the emoji model).
"""

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from minidistill.lora import merge_lora

BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
aten = torch.ops.aten
VIEWS = {aten.detach.default, aten.alias.default, aten.t.default}  # views that apply to the code as to W


class Float8Weight(Tensor):
    """scale * code in the shape of ``code``. It calls itself a tensor of ``dtype``, the one that W is computed in.

    ``to`` moves it and changes ``dtype`` without touching the code. Any other operation gets the product.
    """

    code: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, code: Tensor, scale: Tensor, dtype: torch.dtype) -> "Float8Weight":
        meta = dict(strides=code.stride(), storage_offset=code.storage_offset(), dtype=dtype, device=code.device)
        return Tensor._make_wrapper_subclass(cls, code.shape, **meta)

    def __init__(self, code: Tensor, scale: Tensor, dtype: torch.dtype):
        self.code, self.scale = code, scale

    @classmethod
    def quantize(cls, weight: Tensor) -> "Float8Weight":
        """The nearest codes to ``weight``, with a power of two as scale at which none overflows."""
        largest = weight.detach().abs().amax().float() / torch.finfo(torch.float8_e4m3fn).max
        scale = torch.ldexp(torch.ones_like(largest), largest.frexp().exponent)
        return cls((weight.detach() / scale).to(torch.float8_e4m3fn), scale, weight.dtype)

    def product(self) -> Tensor:
        return self.code.to(self.dtype).mul_(self.scale.to(self.dtype))

    @property
    def nbytes(self) -> int:
        return self.code.nbytes + self.scale.nbytes

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"{type(self).__name__}({list(self.shape)}, dtype={self.dtype})"  # no values: torch.compile has none yet

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["code", "scale"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], dtype: torch.dtype, *_) -> "Float8Weight":
        return cls(inner["code"], inner["scale"], dtype)

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0]
        if operator in VIEWS:
            return cls(operator(first.code), first.scale, first.dtype)
        if operator in (aten._to_copy.default, aten.clone.default):
            dtype, layout = kwargs.pop("dtype", None), kwargs.pop("memory_format", None)
            code = operator(first.code, **kwargs, memory_format=layout)
            return cls(code, operator(first.scale, **kwargs), dtype or first.dtype)
        if operator._schema.is_mutable and isinstance(first, cls):
            raise ValueError(
                "W in 8 bits cannot be changed in place: rounding would lose most of the change. Keep a LoRA beside W, "
                "or merge it into the checkpoint (python -m minidistill.export LORA --to checkpoint --model MODEL)."
            )
        return operator(*tree_map_only(cls, cls.product, args), **tree_map_only(cls, cls.product, kwargs))


def to_float8(name: str, weight: Tensor) -> Tensor:
    """The UNet's tensor ``name`` in 8 bits if it is W of a linear layer or convolution in one of its blocks.

    Norms, biases and the few layers outside the blocks, through which everything passes, stay as they are.
    """
    return Float8Weight.quantize(weight) if weight.ndim > 1 and name.startswith(BLOCKS) else weight


def has_float8(model: nn.Module) -> bool:
    """True if W is in 8 bits, so that a LoRA cannot be merged into it."""
    return any(isinstance(p, Float8Weight) for p in model.parameters())


def merge_to_sample(model: nn.Module) -> None:
    """Merge the LoRA of ``model``, which makes sampling faster; if W is in 8 bits, the LoRA stays beside it."""
    if not has_float8(model):
        merge_lora(model)
