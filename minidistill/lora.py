"""Low-rank adaptation ("LoRA", arXiv 2106.09685): W stays frozen, and two thin matrices beside it learn.

    y = W x + (alpha / rank) lora_up lora_down x                                                        (LoRA, eq. 3)

Teacher and student share W. With the switch off a layer computes W x, bit for bit; switched on it adds the second term.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Every linear layer and convolution of the UNet's attention and residual blocks.
DEFAULT_TARGETS = ("*.attentions.*", "*.resnets.*")


class Switch:
    """Turns the low-rank terms on and off. All LoRA layers of a model share one."""

    def __init__(self) -> None:
        self.enabled = False

    @contextmanager
    def set(self, enabled: bool) -> Iterator[None]:
        before, self.enabled = self.enabled, enabled
        try:
            yield
        finally:
            self.enabled = before


def low_rank(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """scale * up down: [rank, in, ...] and [out, rank, ...] -> [out, in, ...], the shape of the weight."""
    return (scale * up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])


class LoRALayer(nn.Module):
    """Shared by LoRALinear and LoRAConv: a frozen ``weight``, a low-rank pair, a scale and a switch."""

    weight: nn.Parameter
    lora_down: nn.Parameter
    lora_up: nn.Parameter

    def add_pair(self, down_shape: Sequence[int], up_shape: Sequence[int], alpha: float, switch: Switch) -> None:
        """Create the pair: lora_down Gaussian and lora_up zero, so that training starts from W (LoRA, section 4.1)."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        down = torch.empty(down_shape, dtype=dtype, device=self.weight.device)
        down.normal_(std=1 / math.sqrt(down[0].numel()))
        if down.ndim == 4 and not self.weight.is_contiguous():
            down = down.contiguous(memory_format=torch.channels_last)  # as W is on a GPU
        self.lora_down = nn.Parameter(down)
        self.lora_up = nn.Parameter(torch.zeros(up_shape, dtype=dtype, device=self.weight.device))
        self.alpha, self.scale = alpha, alpha / down_shape[0]
        self.switch = switch
        self.merged = False

    @property
    def active(self) -> bool:
        """True if the low-rank term must be added: switched on and not merged into W."""
        return self.switch.enabled and not self.merged

    def delta(self) -> Tensor:
        """What merging adds to ``weight``, in its shape."""
        return low_rank(self.lora_down, self.lora_up, self.scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Keep the pair in float32 or wider, even in ``model.to(bfloat16)``, which would round small updates away."""
        pair = [x for p in (self.lora_down, self.lora_up) for x in (p, p.grad) if x is not None]

        def apply(x: Tensor) -> Tensor:
            y = fn(x)  # shows which device and dtype are asked for
            wide = torch.promote_types(y.dtype, torch.float32)
            return x.to(y.device, wide) if y.dtype != wide and any(x is own for own in pair) else y

        return super()._apply(apply, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Record that W is merged; otherwise loading the state dict would add the pair twice."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "merged"] = torch.tensor(True)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        if prefix + "weight" in state_dict:
            self.merged = bool(state_dict.pop(prefix + "merged", False))
        elif self.merged and prefix + "lora_up" in state_dict:
            raise ValueError(f"{prefix[:-1]} is merged: unmerge_lora before loading another pair.")
        super()._load_from_state_dict(state_dict, prefix, *args)


class LoRALinear(LoRALayer, nn.Linear):
    """A linear layer with a pair: lora_down [rank, in], lora_up [out, rank]. [..., in] -> [..., out]."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, switch: Switch):
        nn.Linear.__init__(self, base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias  # the same Parameter objects, not copies
        self.add_pair((rank, self.in_features), (self.out_features, rank), alpha, switch)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # W x + b
        if not self.active:
            return y
        down = F.linear(x, self.lora_down.to(x.dtype))  # [..., rank]
        return torch.add(y, F.linear(down, self.lora_up.to(x.dtype)), alpha=self.scale)


class LoRAConv(LoRALayer, nn.Conv2d):
    """A convolution with a pair: lora_down [rank, in, k, k], lora_up [out, rank, 1, 1]."""

    def __init__(self, base: nn.Conv2d, rank: int, alpha: float, switch: Switch):
        shape = {name: getattr(base, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        nn.Conv2d.__init__(self, base.in_channels, base.out_channels, **shape, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias  # the same Parameter objects, not copies
        down_shape = (rank, self.in_channels, *self.kernel_size)
        self.add_pair(down_shape, (self.out_channels, rank, 1, 1), alpha, switch)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # W convolved with x, + b
        if not self.active:
            return y
        down = self._conv_forward(x, self.lora_down.to(x.dtype), None)  # with the stride and padding of W
        return torch.add(y, F.conv2d(down, self.lora_up.to(x.dtype)), alpha=self.scale)


class LoRAModel(nn.Module):
    """Wraps a network: ``model(..., lora_enabled=True)`` is the student, ``model(...)`` the teacher.

    It exposes the parameters and children of the network, ``base``, under their original names. All calls share one
    switch, so one thread at a time may call it. Activation checkpointing recomputes after the call, when the switch
    is off again: checkpoint whole calls, or use training.recompute, which sets the switch.
    """

    def __init__(self, base: nn.Module, switch: Switch):
        super().__init__()
        self.switch = switch
        self.dial = None  # which strength stands for which guidance (distill.Dial), once a student is loaded
        self.learned_guidance = None  # the guidance scale of a student that was loaded beside W
        self.few_steps = None  # (steps of the student, steps of its teacher), if it was taught how many to take
        self.training = base.training
        self.__dict__["base"] = base  # not registered as a child, which would put "base." in front of every name
        self._parameters, self._buffers, self._modules = base._parameters, base._buffers, base._modules

    def train(self, mode: bool = True) -> "LoRAModel":
        self.base.training = mode  # ``base`` is not a child, which nn.Module.train would reach
        return super().train(mode)

    def forward(self, *args, lora_enabled: bool = False, **kwargs):
        with self.switch.set(lora_enabled):
            return self.base(*args, **kwargs)


def inject_lora(
    model: nn.Module, rank: int = 16, alpha: float | None = None, targets: Sequence[str] = DEFAULT_TARGETS
) -> LoRAModel:
    """Add a low-rank pair to linear layers and convolutions of ``model``, in place, and freeze everything else.

    Args:
        rank: the rank of every pair.  alpha: every pair is scaled by alpha / rank; default ``rank``.
        targets: shell-style patterns that select layers by their dotted names.

    Returns:
        The model in a thin wrapper whose call takes ``lora_enabled``: True for the student, False for the teacher.

    Raises:
        ValueError: a rank below 1, a model that has LoRA, patterns that match nothing, a layer that cannot have it.
    """
    if rank < 1:
        raise ValueError(f"The rank of a LoRA must be 1 or more, not {rank}.")
    targets = [targets] if isinstance(targets, str) else targets
    names = [
        name
        for name, layer in model.named_modules()
        if name and isinstance(layer, nn.Linear | nn.Conv2d) and any(fnmatchcase(name, pattern) for pattern in targets)
    ]
    if not names:
        raise ValueError(f"No linear layer or convolution of the model has a name like {', '.join(targets)}.")
    return inject_pairs(model, dict.fromkeys(names, (rank, rank if alpha is None else alpha)))


def inject_pairs(model: nn.Module, pairs: Mapping[str, tuple[int, float]]) -> LoRAModel:
    """``inject_lora`` with (rank, alpha) per layer name, for files in which layers differ."""
    if any(isinstance(m, LoRALayer) for m in model.modules()):
        raise ValueError("This model already has LoRA layers: load it again before adding others.")
    layers = {name: model.get_submodule(name) for name in pairs}
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, layer in layers.items():
        if type(layer) not in (nn.Linear, nn.Conv2d):  # a subclass may compute something other than W x + b
            raise ValueError(f"{name} is a {type(layer).__name__}: LoRA here is for linear layers and convolutions.")
        if getattr(layer, "groups", 1) != 1:
            raise ValueError(f"{name} is a grouped convolution, which is not supported: leave it out of targets.")
        if uses[id(layer.weight)] > 1:
            raise ValueError(f"{name} shares its weight with another layer: leave both out of targets.")
    switch = Switch()
    model.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        adapted = LoRALinear if isinstance(layer, nn.Linear) else LoRAConv
        setattr(model.get_submodule(parent), child, adapted(layer, *pairs[name], switch))
    return LoRAModel(model, switch)


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The LoRA layers by their dotted names."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALayer)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """lora_down and lora_up of every LoRA layer: everything that is trained."""
    return [p for layer in lora_layers(model).values() for p in (layer.lora_down, layer.lora_up)]


@contextmanager
def lora_strength(model: nn.Module, strength: float) -> Iterator[None]:
    """Multiply the low-rank terms by ``strength`` for the block. Raises ValueError if they are merged into W."""
    layers = lora_layers(model).values()
    if any(layer.merged for layer in layers):
        raise ValueError("This LoRA is merged into W at one strength: unmerge_lora before asking for another.")
    before = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale *= strength
    try:
        yield
    finally:
        for layer, scale in zip(layers, before):
            layer.scale = scale


SURVIVING = 0.9  # the share of a change below which we warn
Squares = dict[str, Tensor]  # by layer, [2]: the squared norms of what was added to W and of what should have been


def merge_lora(model: nn.Module, generator: torch.Generator | None = None) -> float:
    """W <- W + scale lora_up lora_down, in place: the student at the cost of the plain network.

    Until ``unmerge_lora`` the switch has no effect and the teacher is gone. A second call does nothing. The state dict
    of a merged model has a ``merged`` entry for each layer. A ``generator`` rounds stochastically (``add_to_weight``).

    Returns how much of the change survives the rounding to W's dtype, 1 being all; warns below 0.9. Raises ValueError
    within ``lora_strength``, because unmerging after it would subtract another multiple of the pair, and for a W that
    cannot hold the sum (not finite, or in 8 bits). Then nothing stays merged.
    """
    if any(layer.scale != layer.alpha / len(layer.lora_down) for layer in lora_layers(model).values()):
        raise ValueError("A LoRA is merged at its own strength: merge outside lora_strength, or load_lora(..., scale).")
    try:
        squares = _set_merged(model, True, generator)
    except ValueError:
        unmerge_lora(model)  # the layers before the one that failed
        raise
    return warn_of_lost_change(squares)


def unmerge_lora(model: nn.Module) -> None:
    """W <- W - scale lora_up lora_down: back to the teacher's weights, up to rounding."""
    _set_merged(model, False)


@torch.no_grad()
def _set_merged(model: nn.Module, merged: bool, generator: torch.Generator | None = None) -> Squares:
    """Add every pair to its W, or subtract it again. Layers that are in this state already stay as they are."""
    squares: Squares = {}
    for name, layer in lora_layers(model).items():
        if layer.merged != merged:
            delta = layer.delta() if merged else -layer.delta()
            layer.weight.copy_(add_to_weight(name, layer.weight, delta, squares, generator))
            layer.merged = merged
    return squares


def add_to_weight(
    name: str, weight: Tensor, delta: Tensor, squares: Squares, generator: torch.Generator | None = None
) -> Tensor:
    """W + delta, rounded once to the dtype of W: to the nearest value or, with a ``generator``, stochastically.

    Rounding to nearest loses a change of less than half a step of W's dtype. Stochastic rounding keeps it on average,
    at the price of noise: a sum a quarter of a step above the value below it is rounded up in a quarter of the
    cases. ``squares`` records what was added if W has 16 bits. Raises ValueError for a sum that is not finite.
    """
    exact = weight + delta
    merged = exact.to(weight.dtype)
    if generator and merged.dtype != exact.dtype:
        dtype = torch.finfo(weight.dtype)
        step = torch.ldexp(torch.full_like(exact, dtype.eps), exact.frexp().exponent - 1)
        step = step.clamp(min=dtype.smallest_normal * dtype.eps)  # between neighbours in W's dtype
        below = (exact / step).floor()
        drawn = torch.rand(exact.shape, generator=generator, device=generator.device).to(exact.device)
        up = drawn < exact / step - below
        merged = ((below + up) * step).to(weight.dtype)
    if not all(map(math.isfinite, merged.aminmax())):
        raise ValueError(f"With its LoRA, {name} is not finite in {weight.dtype}: take W in bfloat16 or float32.")
    if weight.itemsize < 4:
        norms = torch.stack([(merged.to(exact) - weight).square().sum(), delta.square().sum()])
        squares[name] = squares.get(name, 0) + norms.cpu()
    return merged


def surviving_change(squares: Squares) -> tuple[float, str]:
    """How much of a change has survived the rounding: the ratio of norms, and a sentence with the worst layers."""
    shares = {name: ratio_of_norms(of_layer) for name, of_layer in squares.items()}
    share = ratio_of_norms(sum(squares.values(), torch.zeros(2, device="cpu")))
    worst = ", ".join(f"{name} ({shares[name]:.0%})" for name in sorted(shares, key=shares.get)[:3])
    return share, f"{share:.1%} of the change survives the rounding of W{f', and least in {worst}' * bool(worst)}."


def ratio_of_norms(squares: Tensor) -> float:
    """[2] squared norms, of what was added and of what should have been -> how much of the change survives."""
    added, wanted = squares.tolist()
    return math.sqrt(added / wanted) if wanted else 1.0


def warn_of_lost_change(squares: Squares) -> float:
    """Warn if less than ``SURVIVING`` of a change has survived; returns the share that has."""
    share, sentence = surviving_change(squares)
    if share < SURVIVING:
        advice = "Keep W in float32, keep the LoRA beside it, or round stochastically (export --stochastic)."
        warnings.warn(f"{sentence} {advice}", stacklevel=3)
    return share
