"""lora.py: one set of weights, a low-rank pair beside each layer as in the formula, and a reliable switch."""

import copy
import pickle
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY_UNET, error, fill_up, randn, tiny_student, tiny_unet, unet_inputs
from torch import Tensor, nn

from minidistill import inject_lora, merge_lora, unmerge_lora
from minidistill.lora import (
    LoRAConv,
    LoRALinear,
    LoRAModel,
    add_to_weight,
    lora_layers,
    lora_parameters,
    lora_strength,
)


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" not in name}


def small_net() -> nn.Sequential:
    """Two linear layers, for tests that do not need a UNet."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6))


def small_student(alpha: float | None = None) -> LoRAModel:
    return fill_up(inject_lora(small_net(), rank=2, alpha=alpha, targets=["*"]))


# One set of weights


def test_base_parameters_keep_name_address_and_identity():
    unet = tiny_unet()
    before = {name: (p, p.data_ptr()) for name, p in unet.named_parameters()}
    after = base_parameters(inject_lora(unet, rank=2))
    assert list(after) == list(before)
    assert all(after[name] is p and p.data_ptr() == address for name, (p, address) in before.items())


def test_nothing_is_stored_twice():
    unet = tiny_unet()
    weights = sum(p.nbytes for p in unet.parameters())
    model = inject_lora(unet, rank=2)
    tensors = {id(x): x for x in [*model.parameters(), *model.buffers()]}.values()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    assert sum(storages.values()) == weights + sum(p.nbytes for p in lora_parameters(model))


def test_only_the_pairs_are_trainable():
    model = inject_lora(tiny_unet(), rank=2)
    assert not any(p.requires_grad for p in base_parameters(model).values())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in lora_parameters(model)}


def test_switched_off_is_bit_equal_after_injection():
    unet = tiny_unet()
    before = unet(*unet_inputs())
    assert torch.equal(inject_lora(unet, rank=2)(*unet_inputs()), before)
    assert torch.equal(unet(*unet_inputs()), before)  # the network itself, called without the wrapper


def test_training_moves_every_pair_and_nothing_else():
    unet = tiny_unet()
    before, output = {name: p.clone() for name, p in unet.named_parameters()}, unet(*unet_inputs()).detach()
    model = inject_lora(unet, rank=2)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    for step in range(20):
        (model(*unet_inputs(), lora_enabled=True) - 2 * output).square().mean().backward()
        assert all(p.grad is None for p in base_parameters(model).values())
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, before[name]) for name, p in base_parameters(model).items())
    assert all(layer.lora_up.abs().max() > 0 for layer in lora_layers(model).values())
    assert torch.equal(model(*unet_inputs(), lora_enabled=False), output)
    assert not torch.equal(model(*unet_inputs(), lora_enabled=True), output)


def test_student_starts_as_the_teacher():
    model = inject_lora(tiny_unet(), rank=2)
    assert torch.equal(model(*unet_inputs(), lora_enabled=True), model(*unet_inputs()))


def test_initial_values():
    """lora_down is Gaussian with variance 1 / fan_in, lora_up zero."""
    torch.manual_seed(0)
    layer = inject_lora(nn.Sequential(nn.Conv2d(64, 8, 3)), rank=64, targets=["*"]).get_submodule("0")
    assert layer.lora_up.abs().max() == 0
    assert abs(layer.lora_down.mean()) < 1e-3
    assert abs(layer.lora_down.std() * (64 * 9) ** 0.5 - 1) < 0.02


# Values

LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "linear_without_bias": lambda: nn.Linear(6, 5, bias=False),
    "1x1": lambda: nn.Conv2d(6, 5, 1),
    "3x3": lambda: nn.Conv2d(6, 5, 3, padding=1),
    "stride_2": lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1),
    "no_padding": lambda: nn.Conv2d(6, 5, 3, stride=2),
    "oblong": lambda: nn.Conv2d(6, 5, (3, 1), padding=(2, 0), bias=False),
    "dilated": lambda: nn.Conv2d(6, 5, 3, dilation=2, padding="same"),
    "circular": lambda: nn.Conv2d(6, 5, 3, padding=1, padding_mode="circular"),
}


def one_layer(kind: str, rank: int = 3, alpha: float | None = 7.0, dtype: torch.dtype = torch.float64):
    """A student of one layer, an input for it, and its pair beside W."""
    torch.manual_seed(0)
    model = fill_up(inject_lora(nn.Sequential(LAYERS[kind]()).to(dtype), rank, alpha, targets=["*"]))
    x = randn(4, 6, dtype=dtype) if kind.startswith("linear") else randn(2, 6, 8, 7, dtype=dtype)
    return model, x, model.get_submodule("0")


@pytest.mark.parametrize("kind", LAYERS)
def test_layer_adds_scaled_up_times_down(kind: str):
    model, x, layer = one_layer(kind)
    delta = 7 / 3 * torch.einsum("or,r...->o...", layer.lora_up.flatten(1), layer.lora_down)
    if kind.startswith("linear"):
        expected = F.linear(x, layer.weight + delta, layer.bias)
    else:
        padding = layer.padding
        if layer.padding_mode == "circular":
            x_padded, padding = F.pad(x, (1, 1, 1, 1), mode="circular"), 0
        else:
            x_padded = x
        expected = F.conv2d(x_padded, layer.weight + delta, layer.bias, layer.stride, padding, layer.dilation)
    assert error(model(x, lora_enabled=True), expected) < 1e-12


def test_alpha_over_rank_is_the_scale():
    model, x, layer = one_layer("linear", rank=4, alpha=None)
    double, _, _ = one_layer("linear", rank=4, alpha=8)
    teacher = model(x)
    assert layer.scale == 1 and double.get_submodule("0").scale == 2
    assert error(double(x, lora_enabled=True) - teacher, 2 * (model(x, lora_enabled=True) - teacher)) < 1e-12


def test_alpha_zero_is_zero():
    model, x, _ = one_layer("linear", alpha=0)
    assert torch.equal(model(x, lora_enabled=True), model(x))


# Merging


@pytest.mark.parametrize("kind", LAYERS)
def test_merged_is_the_student(kind: str):
    model, x, _ = one_layer(kind)
    expected = model(x, lora_enabled=True)
    merge_lora(model)
    assert error(model(x, lora_enabled=True), expected) < 1e-12
    assert torch.equal(model(x), model(x, lora_enabled=True))  # nothing left to add


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_merged_unet_is_the_student(dtype: torch.dtype, tolerance: float):
    model = tiny_student(dtype=dtype)
    with torch.no_grad():
        expected = model(*unet_inputs(dtype=dtype), lora_enabled=True)
        merge_lora(model)
        assert error(model(*unet_inputs(dtype=dtype)), expected) < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_merging_and_unmerging_is_exact_to_rounding(kind: str, dtype: torch.dtype):
    model, x, layer = one_layer(kind, dtype=dtype)
    before, delta, rounding = layer.weight.detach().clone(), layer.delta().detach(), torch.finfo(dtype).eps
    merge_lora(model)
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight, (before + delta).to(dtype))  # one rounding
    unmerge_lora(model)
    bound = rounding * (before.abs() + delta.abs())
    assert ((layer.weight - before).abs() <= bound).all()


def test_merging_keeps_the_parameter():
    model, _, layer = one_layer("linear")
    before, address = layer.weight, layer.weight.data_ptr()
    merge_lora(model)
    assert layer.weight is before and before.data_ptr() == address and not before.requires_grad


def test_merging_twice_is_merging_once():
    model, _, layer = one_layer("linear")
    merge_lora(model)
    once = layer.weight.detach().clone()
    merge_lora(model)
    assert torch.equal(layer.weight, once)


def test_merging_at_a_passing_strength_is_refused():
    """Unmerging would subtract the pair at another strength."""
    model, x, _ = one_layer("linear")
    teacher = model(x)
    with lora_strength(model, 0.5), pytest.raises(ValueError, match="merge outside lora_strength"):
        merge_lora(model)
    assert torch.equal(model(x), teacher)
    merge_lora(model)
    unmerge_lora(model)
    assert error(model(x), teacher) < 1e-12


def test_unmerging_an_unmerged_model_changes_nothing():
    model, _, layer = one_layer("linear")
    before = layer.weight.detach().clone()
    unmerge_lora(model)
    assert torch.equal(layer.weight, before)


def test_the_switch_works_again_after_unmerging():
    model, x, _ = one_layer("linear")
    teacher, student = model(x), model(x, lora_enabled=True)
    merge_lora(model)
    unmerge_lora(model)
    assert error(model(x), teacher) < 1e-12 and error(model(x, lora_enabled=True), student) < 1e-12


def test_train_and_eval_change_no_weight():
    model = tiny_student()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train().eval().train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# The switch


@pytest.mark.parametrize("outer", [False, True])
def test_a_call_within_a_call_keeps_its_own_setting(outer: bool):
    model, x = small_student(), randn(3, 6)
    expected = {setting: model(x, lora_enabled=setting) for setting in (False, True)}
    inner = []

    def call_the_other(*_):
        hook.remove()
        inner.append(model(x, lora_enabled=not outer))

    hook = model.get_submodule("1").register_forward_hook(call_the_other)
    assert torch.equal(model(x, lora_enabled=outer), expected[outer])
    assert torch.equal(inner[0], expected[not outer])


def test_an_exception_restores_the_switch():
    model, x = small_student(), randn(3, 6)
    teacher = model(x)
    with pytest.raises(RuntimeError):
        model(randn(3, 5), lora_enabled=True)
    assert torch.equal(model(x), teacher) and torch.equal(model.base(x), teacher)


def test_an_exception_within_a_call_restores_the_outer_setting():
    model, x = small_student(), randn(3, 6)
    student = model(x, lora_enabled=True)

    def fail_inside(*_):
        hook.remove()
        with pytest.raises(RuntimeError):
            model(randn(3, 5), lora_enabled=False)

    hook = model.get_submodule("1").register_forward_hook(fail_inside)
    assert torch.equal(model(x, lora_enabled=True), student)


def test_models_do_not_share_a_switch():
    one, other, x = small_student(), small_student(), randn(3, 6)
    teacher, seen = other(x), []
    one.get_submodule("1").register_forward_hook(lambda *_: seen.append(other.base(x)))
    one(x, lora_enabled=True)
    assert torch.equal(seen[0], teacher)


# torch.compile


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_graph_breaks_with_both_settings(backend: str):
    torch._dynamo.reset()
    config = replace(TINY_UNET, widths=(16,), depth=(1,), heads=(2,))
    model, inputs = fill_up(inject_lora(tiny_unet(config=config), rank=2)), unet_inputs(batch=1)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for setting in (False, True, False):
            expected = model(*inputs, lora_enabled=setting)
            assert error(compiled(*inputs, lora_enabled=setting), expected) < 1e-5
    torch._dynamo.reset()


def test_compiled_student_learns():
    torch._dynamo.reset()
    model, x = small_student(), randn(3, 6)
    model(x, lora_enabled=True).square().sum().backward()
    expected = [p.grad.clone() for p in lora_parameters(model)]
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x, lora_enabled=True).square().sum().backward()
    assert max(error(p.grad, e) for p, e in zip(lora_parameters(model), expected)) < 1e-5
    torch._dynamo.reset()


# Copies, files, casts


def test_state_dict_round_trip():
    model, other = tiny_student(), inject_lora(tiny_unet(seed=1), rank=2)
    other.load_state_dict(model.state_dict())
    for setting in (False, True):
        expected = model(*unet_inputs(), lora_enabled=setting)
        assert torch.equal(other(*unet_inputs(), lora_enabled=setting), expected)


@pytest.mark.parametrize("saved_merged", [True, False])
@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_a_state_dict_adds_the_pairs_once(kind: str, saved_merged: bool):
    """Whether W is merged is part of the state dict, and replaces the setting of the model that loads it."""
    model, x, _ = one_layer(kind)
    teacher, student = model(x), model(x, lora_enabled=True)
    other, _, _ = one_layer(kind)
    merge_lora(model if saved_merged else other)
    other.load_state_dict(model.state_dict())
    assert error(other(x, lora_enabled=True), student) < 1e-12
    unmerge_lora(other)
    assert error(other(x), teacher) < 1e-12


def test_another_pair_does_not_load_into_merged_weights():
    model, _, _ = one_layer("linear")
    pair = {name: x.clone() for name, x in model.state_dict().items() if "lora_" in name}
    merge_lora(model)
    with pytest.raises(ValueError, match="0 is merged: unmerge_lora before"):
        model.load_state_dict(pair, strict=False)


def test_the_state_dict_has_the_names_of_the_network_and_the_pairs():
    names = list(tiny_unet().state_dict())
    assert [name for name in tiny_student().state_dict() if "lora_" not in name] == names


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_the_same_and_independent(duplicate):
    model = tiny_student()
    teacher, student = (model(*unet_inputs(), lora_enabled=setting) for setting in (False, True))
    copied = duplicate(model)
    assert torch.equal(copied(*unet_inputs(), lora_enabled=True), student)
    assert torch.equal(copied(*unet_inputs()), teacher)
    merge_lora(copied)
    fill_up(copied, seed=99)
    assert torch.equal(model(*unet_inputs(), lora_enabled=True), student)
    assert torch.equal(model(*unet_inputs()), teacher)


def test_a_copy_has_its_own_switch():
    model, x = small_student(), randn(3, 6)
    copied = copy.deepcopy(model)
    teacher, seen = model(x), []
    copied.get_submodule("1").register_forward_hook(lambda *_: seen.append(model.base(x)))
    copied(x, lora_enabled=True)
    assert torch.equal(seen[0], teacher)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_casts_leave_the_pair_bit_identical(dtype: torch.dtype):
    model = small_student()
    model(randn(3, 6), lora_enabled=True).sum().backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in lora_parameters(model)]
    model.to(dtype)
    assert all(p.dtype == dtype for p in base_parameters(model).values())
    for p, (value, grad) in zip(lora_parameters(model), before):
        assert p.dtype == torch.float32 and torch.equal(p, value) and torch.equal(p.grad, grad)


def test_casting_to_double_and_half():
    model = small_student().double()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    model.half()
    assert all(p.dtype == torch.float16 for p in base_parameters(model).values())
    assert all(p.dtype == torch.float32 for p in lora_parameters(model))


def test_a_cast_keeps_the_parameters_that_an_optimizer_holds():
    model = small_student()
    before = lora_parameters(model)
    model.to(torch.bfloat16).double().float()
    assert all(p is q for p, q in zip(lora_parameters(model), before))


def test_injected_into_bfloat16_the_pair_is_float32():
    model = inject_lora(small_net().to(torch.bfloat16), rank=2, targets=["*"])
    assert all(p.dtype == torch.float32 for p in lora_parameters(model))


def test_bfloat16_student_computes_and_learns():
    model = small_student()
    expected = model(randn(3, 6), lora_enabled=True)
    model.to(torch.bfloat16)
    output = model(randn(3, 6, dtype=torch.bfloat16), lora_enabled=True)
    assert output.dtype == torch.bfloat16 and error(output.float(), expected) < 0.03
    output.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in lora_parameters(model))


# What is adapted, and what is refused


def test_default_targets_are_the_attention_and_residual_blocks():
    unet = tiny_unet()
    expected = {
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and {"attentions", "resnets"} & set(name.split("."))
    }
    assert set(lora_layers(inject_lora(unet))) == expected
    assert not {"conv_in", "conv_out", "time_embedding.linear_1", "up_blocks.0.upsamplers.0.conv"} & expected
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k" in expected
    assert "mid_block.resnets.1.time_emb_proj" in expected


def test_targets_choose_layers_by_name():
    model = inject_lora(tiny_unet(), targets=["mid_block.*.attn2.to_[kv]", "conv_in"])
    attention = "mid_block.attentions.0.transformer_blocks.0.attn2"
    assert set(lora_layers(model)) == {"conv_in", f"{attention}.to_k", f"{attention}.to_v"}


def test_adapted_layers_are_still_linear_and_convolution():
    layers = lora_layers(tiny_student()).values()
    assert all(isinstance(layer, nn.Linear) == isinstance(layer, LoRALinear) for layer in layers)
    assert all(isinstance(layer, nn.Conv2d) == isinstance(layer, LoRAConv) for layer in layers)


def test_a_second_lora_is_refused():
    model = small_student()
    with pytest.raises(ValueError, match="already"):
        inject_lora(model, targets=["*"])


# What a merge loses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_to_a_neighbour_and_right_on_average(dtype: torch.dtype):
    weight = torch.cat([randn(300), torch.tensor([1.0, -2.0, 0.0, 3e-6, 6e-5])]).to(dtype)
    delta = 1e-3 * randn(len(weight), seed=1) * weight.abs().float()
    exact, steps = weight.double() + delta.double(), []
    for seed in range(400):
        rounded = add_to_weight("w", weight, delta, {}, torch.Generator().manual_seed(seed)).double()
        steps.append(rounded)
    draws = torch.stack(steps)
    assert draws.unique(dim=0).shape[0] > 1
    lower, upper = draws.min(0).values, draws.max(0).values
    nearest = exact.to(dtype).double()
    assert ((lower <= exact) & (exact <= upper) | (lower == upper)).all()
    assert ((draws == nearest).any(0)).all() and all(len(draws[:, i].unique()) <= 2 for i in range(len(weight)))
    assert ((draws.mean(0) - exact).abs() <= 0.15 * (upper - lower) + 1e-3 * exact.abs() * (lower == upper)).all()
    unchanged = add_to_weight("w", weight, torch.zeros_like(delta), {}, torch.Generator().manual_seed(0))
    assert torch.equal(unchanged, weight)


def small_change(dtype: torch.dtype, size: float) -> LoRAModel:
    model = inject_lora(tiny_unet().to(dtype), rank=2)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_up.copy_(size * randn(*layer.lora_up.shape))
    return model


def test_a_pattern_may_be_a_string():
    assert lora_layers(inject_lora(tiny_unet(), targets="*.attn2.*")).keys() == {
        name for name in lora_layers(inject_lora(tiny_unet())) if ".attn2." in name
    }


class Tripled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def shared(same: str) -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, first if same == "layer" else second)


@pytest.mark.parametrize(
    "model, how, message",
    [
        (small_net(), dict(rank=0), "not 0"),
        (small_net(), dict(rank=-1), "not -1"),
        (small_net(), dict(targets=["no.such.layer"]), "no.such.layer"),
        (nn.Linear(3, 3), {}, "has a name like"),  # a layer without a parent cannot be replaced in place
        (nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3, groups=2)), {}, "grouped"),
        (nn.Sequential(Tripled(4, 4)), {}, "0 is a Tripled"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), {}, "0 is a Parametrized"),
        (shared("layer"), {}, "shares its weight"),
        (shared("weight"), {}, "shares its weight"),
    ],
)
def test_what_cannot_be_injected_is_refused_and_nothing_changed(model: nn.Module, how: dict, message: str):
    with pytest.raises(ValueError, match=message):
        inject_lora(model, **dict(targets=["*"]) | how)
    assert all(p.requires_grad for p in model.parameters()) and not lora_layers(model)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), 0.5, self.training)


def test_train_and_eval_reach_the_wrapped_network():
    assert not inject_lora(Dropping().eval(), targets="*").training
    model, x = inject_lora(Dropping(), targets="*").eval(), randn(8, 4)
    assert torch.equal(model(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


def test_merging_says_how_much_survives():
    model = small_change(torch.bfloat16, 1e-4)
    layers = lora_layers(model)
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    with pytest.warns(UserWarning, match=r"\d\d?\.\d% of the change survives .*attn.*float32") as warned:
        share = merge_lora(model)
    added = sum((layer.weight.double() - before[name].double()).square().sum() for name, layer in layers.items())
    wanted = sum(layer.delta().double().square().sum() for layer in layers.values())
    assert share < 0.9 and share == pytest.approx((added / wanted).sqrt().item(), rel=1e-3)
    shares = {
        name: (layer.weight.double() - before[name].double()).norm() / layer.delta().double().norm()
        for name, layer in layers.items()
    }
    worst = sorted(shares, key=shares.get)[:3]
    named = re.findall(r"([\w.]+) \(\d+%\)", str(warned[0].message))
    assert [round(shares[name].item(), 6) for name in named] == [round(shares[name].item(), 6) for name in worst]


@pytest.mark.filterwarnings("error")
def test_merging_a_large_change_or_into_float32_does_not_warn():
    assert merge_lora(small_change(torch.bfloat16, 0.1)) == pytest.approx(1, abs=0.02)
    assert merge_lora(small_change(torch.float32, 1e-4)) == 1
    assert merge_lora(small_change(torch.bfloat16, 0)) == 1


def test_stochastic_merging_is_seeded_and_keeps_a_small_change():
    def merged(seed: int) -> dict:
        model = small_change(torch.bfloat16, 1e-4)
        merge_lora(model, torch.Generator().manual_seed(seed))
        return {name: layer.weight for name, layer in lora_layers(model).items()}

    one, same, other = merged(1), merged(1), merged(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    start = small_change(torch.bfloat16, 1e-4)
    kept = sum(
        ((one[name].double() - layer.weight.double()) * layer.delta().double()).sum()
        for name, layer in lora_layers(start).items()
    )
    wanted = sum(layer.delta().double().square().sum() for layer in lora_layers(start).values())
    assert 0.8 < kept / wanted < 1.2  # the part along the change; the rest is noise


@pytest.mark.parametrize("seed", [None, 1])
def test_merging_does_not_depend_on_pytorchs_default_device(seed: int | None):
    merged, model = small_change(torch.bfloat16, 0.1), small_change(torch.bfloat16, 0.1)
    generators = [None if seed is None else torch.Generator().manual_seed(seed) for _ in range(2)]
    share = merge_lora(merged, generators[0])
    with torch.device("meta"):  # stands for torch.set_default_device("cuda")
        assert merge_lora(model, generators[1]) == share
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), merged.state_dict().values()))


def test_a_merge_that_is_not_finite_names_the_layer_and_merges_nothing():
    model = small_change(torch.float16, 0.1)
    before = {name: layer.weight.clone() for name, layer in lora_layers(model).items()}
    last = next(reversed(before))
    nn.init.constant_(model.get_submodule(last).lora_up, 1e6)
    with pytest.raises(ValueError, match=f"With its LoRA, {last} is not finite in torch.float16"):
        merge_lora(model)
    assert not any(layer.merged for layer in lora_layers(model).values())
    assert max(error(layer.weight, before[name]) for name, layer in lora_layers(model).items()) < 1e-3
