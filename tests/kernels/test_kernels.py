"""kernels/: the operators, their gradients, the choice between kernel and cuBLAS, and machines without CUDA."""

import copy
import json
import shutil
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import ROOT, error, fill_up, randn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minidistill import inject_lora
from minidistill.kernels import FusedLoRAConv, FusedLoRALinear, build, dispatch, install
from minidistill.kernels.conv import lora_conv
from minidistill.kernels.dispatch import EVERYWHERE, Region, addmm_chain, choose_region, fits, lora_linear_or_addmm
from minidistill.kernels.linear import lora_linear
from minidistill.lora import LoRAConv, LoRALinear, LoRAModel, lora_layers, lora_parameters, merge_lora, unmerge_lora
from minidistill.training.recompute import LOW_MEMORY, run_checkpointed

OPS = torch.ops.minidistill
CSRC = ROOT / "minidistill/kernels/csrc"
SIZE = (320, 320, 16)  # K, N and rank of a layer
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def layer(*rows: int, K: int = 24, N: int = 16, rank: int = 5, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """x [*rows, K] and the tensors of a layer. A and B are float32 or wider; x, A and B require gradients."""
    wide = torch.promote_types(dtype, torch.float32)
    tensors = {"x": randn(*rows, K, dtype=dtype), "W": randn(N, K, seed=1, dtype=dtype)}
    tensors |= {"b": randn(N, seed=2, dtype=dtype), "A": randn(rank, K, seed=3, dtype=wide)}
    tensors |= {"B": randn(N, rank, seed=4, dtype=wide)}
    for name in ("x", "A", "B"):
        tensors[name].requires_grad_()
    return tensors


def formula(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The layer in float64, whatever the dtypes of its operands."""
    x, W, A, B = (tensor.double() for tensor in (x, W, A, B))
    return x @ W.T + (0 if b is None else b.double()) + scale * (x @ A.T) @ B.T


def gradients(function, tensors: dict[str, Tensor], scale: float = 0.7) -> list[Tensor]:
    """y, dx, dA, dB for a loss in which every element of y has its own weight."""
    y = function(**tensors, scale=scale)
    loss = (y * randn(*y.shape, seed=9, dtype=y.dtype)).sum()
    return [y.detach(), *torch.autograd.grad(loss, [tensors[name] for name in ("x", "A", "B")])]


# The operator


@pytest.mark.parametrize("rows", [(2, 7), (1,), ()], ids=str)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("function", [lora_linear, addmm_chain])
def test_value_and_gradients(function, dtype: torch.dtype, rows: tuple[int, ...]):
    tensors = layer(*rows, dtype=dtype)
    for actual, expected in zip(gradients(function, tensors), gradients(formula, tensors)):
        assert error(actual.double(), expected.double()) < 4 * ROUNDING[dtype]


def test_gradcheck():
    tensors = layer(2, 3)
    x, W, b, A, B = tensors.values()
    # The only differentiable output always has a gradient.
    check = partial(torch.autograd.gradcheck, check_undefined_grad=False)
    assert check(lambda x, A, B: lora_linear(x, W, b, A, B, 0.7), (x, A, B))
    # In a first layer x requires no gradient.
    assert check(lambda A, B: lora_linear(x.detach(), W, None, A, B, 0.7), (A, B))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype):
    x, W, b, A, B = layer(2, 7, dtype=dtype).values()
    torch.library.opcheck(OPS.lora_linear.default, (x, W, b, A, B, 0.7))
    dy = randn(2, 7, 16, dtype=dtype)
    torch.library.opcheck(OPS.lora_linear_dx.default, (dy, W, A.detach(), B.detach(), 0.7))


def test_addmm_chain_leaves_tensors_kept_by_low_memory_unchanged():
    """Selective checkpointing keeps the product with W, to which addmm_chain adds the pair's product."""
    tensors = layer(4, K=LOW_MEMORY)

    def recomputed(x: Tensor, **weights: Tensor | float) -> Tensor:
        return run_checkpointed(None, LOW_MEMORY, lambda x: addmm_chain(x, **weights).sin(), x)

    plain = gradients(lambda **operands: addmm_chain(**operands).sin(), tensors)
    assert all(torch.equal(actual, expected) for actual, expected in zip(gradients(recomputed, tensors), plain))


def test_strided_operands():
    tensors = layer(6, K=48)
    tensors["x"] = tensors["x"].detach()[:, ::2].requires_grad_()
    tensors["W"], tensors["A"] = tensors["W"][:, ::2], tensors["A"].detach()[:, ::2].requires_grad_()
    for actual, expected in zip(gradients(lora_linear, tensors), gradients(formula, tensors)):
        assert error(actual, expected) < 1e-14


def test_rank_zero_is_w_alone():
    tensors = layer(2, 7, rank=0)
    y, dx, dA, dB = gradients(lora_linear, tensors)
    assert error(y, F.linear(tensors["x"], tensors["W"], tensors["b"]).detach()) < 1e-14
    assert error(dx, gradients(formula, tensors)[1]) < 1e-14 and dA.shape == (0, 24) and dB.shape == (16, 0)


def test_t_is_an_output_but_not_differentiable():
    x, W, b, A, B = layer(3, 7).values()
    y, t = OPS.lora_linear(x, W, b, A, B, 0.7)
    assert y.requires_grad and not t.requires_grad
    assert error(t, 0.7 * (x @ A.T).detach()) < 1e-14


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_graph_breaks(backend: str):
    torch._dynamo.reset()
    tensors = layer(2, 7, dtype=torch.float32)
    compiled = torch.compile(lora_linear, fullgraph=True, backend=backend)
    for actual, expected in zip(gradients(compiled, tensors), gradients(lora_linear, tensors)):
        assert torch.equal(actual, expected)
    torch._dynamo.reset()


def test_under_autocast():
    tensors = layer(2, 7, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(**tensors, scale=0.7)
    narrow = {name: x if name in "AB" else x.bfloat16() for name, x in tensors.items()}
    assert y.dtype == torch.bfloat16 and torch.equal(y, lora_linear(**narrow, scale=0.7))
    y.float().sum().backward()
    assert all(tensors[name].grad.dtype == torch.float32 for name in ("x", "A", "B"))


def test_under_activation_checkpointing():
    tensors = layer(2, 7)

    def recomputed(**tensors) -> Tensor:
        return checkpoint(lora_linear, *tensors.values(), use_reentrant=False)

    for actual, expected in zip(gradients(recomputed, tensors), gradients(lora_linear, tensors)):
        assert torch.equal(actual, expected)


# The choice between the kernel and cuBLAS


def test_auto_follows_from_what_was_measured():
    """On the GPU that was measured, each layer in its region is trained faster with the kernel, in a CUDA graph."""
    table = json.loads((ROOT / "results/gpu/h200.json").read_text())["stages"]["table"]
    rows = [row for layer in table if " -> " in layer for row in table[layer]]
    region = dispatch.FASTER[9, 0]
    ratios = {
        (row["M"], row["K"], row["N"]): row["seconds"]["fused"] / row["seconds"]["addmm"]
        for row in rows
        if row["graph"] and row["pass"] == "forward and backward" and row["rank"] == region.rank
    }
    inside = {(M, K, N): ratio for (M, K, N), ratio in ratios.items() if region.covers(K, N, region.rank, M)}
    assert len(inside) >= 4 and max(inside.values()) < 0.95 and len(ratios) == 35


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_plain_pytorch_prints_nothing(kernel: str, capsys):
    assert choose_region(kernel, torch.device("cpu"), torch.bfloat16, [SIZE]) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "cuda, capability, reason",
    [(None, (9, 0), "is built without CUDA"), ("13.0", (7, 5), "8.0 or newer, not 7.5"), ("13.0", (9, 0), "no nvcc")],
)
def test_one_line_says_why_the_kernel_is_unavailable(cuda, capability, reason: str, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(build, "build", lambda capability: "the fused kernel could not be built (no nvcc)")
    assert choose_region("fused", torch.device("cuda"), torch.bfloat16, [SIZE]) is None
    line = capsys.readouterr().err
    assert line.startswith("LoRA layers run in plain PyTorch: ") and reason in line and line.count("\n") == 1


def test_a_missing_compiler_is_a_reason_and_not_an_exception(monkeypatch):
    def load(*args, **kwargs):
        raise OSError("CUDA_HOME is not set.\nPlease set it.")

    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    assert build.build.__wrapped__((8, 0)) == "the fused kernel could not be built (CUDA_HOME is not set.)"


def test_setuptools_may_be_missing(monkeypatch):
    for module in ("torch.utils.cpp_extension", "setuptools"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr(torch.utils, "cpp_extension", raising=False)
    assert "could not be built" in build.build.__wrapped__((8, 0))


def test_a_long_build_says_what_it_waits_for(monkeypatch, tmp_path, capsys):
    """PyTorch waits without a word and for ever where a process was killed while it compiled."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("torch.utils.cpp_extension.load", lambda *args, **kwargs: None)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", "/usr/local/cuda")
    assert build.build.__wrapped__((8, 0)) is None
    assert f"delete {tmp_path}" in capsys.readouterr().err


def test_the_reason_is_the_compilers_error_line():
    output = "Error building extension:\n[1/4] c++ -MMD -O3\nlaunch.h:3:10: fatal error: no such file\nninja: stopped"
    assert build.first_error(RuntimeError(output)) == "launch.h:3:10: fatal error: no such file"
    assert build.first_error(ImportError()) == "ImportError"


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a PyTorch built without CUDA")
def test_the_build_command_says_why_it_cannot_build(command):
    result = command("minidistill/kernels/__main__.py")
    assert result.code == 0 and "built without CUDA" in result.out and result.out.count("\n") == 1


def test_a_measured_gpu_gets_its_region(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "FASTER", table := {})
    monkeypatch.setattr(dispatch, "obstacle", lambda device: None)
    assert choose_region("auto", torch.device("cuda"), torch.bfloat16, [SIZE]) is None
    table[9, 0] = Region(0, 640, 640, 64)
    for kernel, region in (("auto", table[9, 0]), ("fused", EVERYWHERE), ("torch", None)):
        assert choose_region(kernel, torch.device("cuda"), torch.bfloat16, [SIZE]) == region
    assert choose_region("auto", torch.device("cpu"), torch.bfloat16, [SIZE]) is None
    monkeypatch.setattr(dispatch, "obstacle", lambda device: pytest.fail("built for nothing"))
    for dtype, size in ((torch.float32, SIZE), (torch.bfloat16, (320, 2560, 16))):
        assert choose_region("auto", torch.device("cuda"), dtype, [size]) is None


def test_float32_leaves_the_kernel_unused_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "obstacle", lambda device: None)
    for dtype, message in ((torch.bfloat16, ""), (torch.float32, "in torch.float32 it runs only under autocast")):
        assert choose_region("fused", torch.device("cuda"), dtype, [SIZE])
        assert message in (line := capsys.readouterr().err) and bool(line) == bool(message)


def test_layers_that_fit_the_kernel():
    def sizes(
        M: int = 2, K: int = 64, N: int = 64, rank: int = 4, dtype: torch.dtype = torch.bfloat16
    ) -> tuple[Tensor, ...]:
        return torch.empty(1, K, dtype=dtype).expand(M, K), torch.empty(N, K, dtype=dtype), torch.empty(rank, K)

    assert fits(EVERYWHERE, *sizes()) and fits(EVERYWHERE, *sizes(K=5120, N=8, rank=128, dtype=torch.float16))
    for wrong in (dict(K=60), dict(N=60), dict(rank=129), dict(dtype=torch.float32), dict(M=2**25, N=128)):
        assert not fits(EVERYWHERE, *sizes(**wrong))
    assert fits(Region(2, 64, 64, 4), *sizes())
    assert not fits(Region(2, 64, 56, 4), *sizes()) and not fits(Region(3, 64, 64, 4), *sizes())
    with torch.autocast("cpu", torch.bfloat16):
        assert fits(EVERYWHERE, *sizes(dtype=torch.float32))


@pytest.mark.parametrize("dtype, called", [(torch.bfloat16, 1), (torch.float32, 0)])
def test_the_choice_between_kernel_and_addmm(dtype: torch.dtype, called: int, monkeypatch):
    calls = []
    monkeypatch.setattr(dispatch, "lora_linear", lambda *args: calls.append(1) or lora_linear(*args))
    tensors = layer(2, 7, dtype=dtype)
    y = lora_linear_or_addmm(EVERYWHERE, **tensors, scale=0.7)
    assert len(calls) == called
    assert error(y.double(), formula(**tensors, scale=0.7)) < 4 * ROUNDING[dtype]


# Convolutions

WINDOWS = {  # kernel size, stride, padding, dilation
    "3x3": (3, 1, 1, 1),
    "strided": (3, 2, 1, 1),
    "dilated": (3, 1, 2, 2),
    "1x1": (1, 1, 0, 1),
    "1x1 strided": (1, 2, 0, 1),
}


def conv_formula(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, scale: float, **window) -> Tensor:
    x, W, b, A, B = (tensor.double() for tensor in (x, W, b, A, B))
    return F.conv2d(x, W, b, **window) + scale * F.conv2d(F.conv2d(x, A, **window), B)


def conv_layer(kind: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
    """The tensors of a convolution from 8 channels to 16, and its stride, padding and dilation."""
    k, *window = WINDOWS[kind]
    wide = torch.promote_types(dtype, torch.float32)
    x = randn(2, 8, 7, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)
    tensors = {"x": x, "W": randn(16, 8, k, k, seed=1, dtype=dtype), "b": randn(16, seed=2, dtype=dtype)}
    tensors |= {"A": randn(3, 8, k, k, seed=3, dtype=wide), "B": randn(16, 3, 1, 1, seed=4, dtype=wide)}
    for name in ("x", "A", "B"):
        tensors[name].requires_grad_()
    return tensors, {name: (n, n) for name, n in zip(("stride", "padding", "dilation"), window)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", WINDOWS)
def test_convolutions(kind: str, dtype: torch.dtype):
    tensors, window = conv_layer(kind, dtype)
    fused, plain = (partial(function, **window) for function in (partial(lora_conv, EVERYWHERE), conv_formula))
    for actual, expected in zip(gradients(fused, tensors), gradients(plain, tensors)):
        assert error(actual.double(), expected.double()) < 4 * ROUNDING[dtype]


@pytest.mark.parametrize("kind", ["3x3", "1x1"])
def test_a_convolution_of_an_empty_batch(kind: str):
    tensors, window = conv_layer(kind, torch.float32)
    tensors["x"] = tensors["x"].detach()[:0].requires_grad_()
    y = lora_conv(EVERYWHERE, **tensors, scale=0.7, **window)
    y.sum().backward()
    assert y.shape == (0, 16, 7, 6) and tensors["x"].grad.shape == (0, 8, 7, 6) and not tensors["A"].grad.any()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_opcheck_convolution(layout: torch.memory_format):
    tensors, window = conv_layer("strided", torch.float64)
    tensors["x"] = tensors["x"].detach().contiguous(memory_format=layout).requires_grad_()
    torch.library.opcheck(OPS.lora_conv.default, (*tensors.values(), 0.7, *window.values()))


def test_a_convolution_compiles_under_autocast():
    torch._dynamo.reset()
    tensors, window = conv_layer("3x3", torch.float32)
    compiled = torch.compile(partial(lora_conv, EVERYWHERE), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        actual = compiled(**tensors, scale=0.7, **window)
        expected = lora_conv(EVERYWHERE, **tensors, scale=0.7, **window)
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected)
    torch._dynamo.reset()


def test_the_linear_kernel_computes_1x1_convolutions(monkeypatch):
    calls = []
    monkeypatch.setattr(dispatch, "lora_linear", lambda *args: calls.append(1) or lora_linear(*args))
    tensors, window = conv_layer("1x1", torch.bfloat16)
    y = lora_conv(EVERYWHERE, **tensors, scale=0.7, **window)
    assert calls == [1] and y.is_contiguous(memory_format=torch.channels_last)


# In a model


def network(dtype: torch.dtype) -> nn.Sequential:
    convolutions = nn.Conv2d(8, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 8, 1)
    return nn.Sequential(*convolutions, nn.Flatten(2), nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 8)).to(dtype)


def students(monkeypatch, dtype: torch.dtype) -> tuple[LoRAModel, LoRAModel]:
    """The same student twice: in plain PyTorch, and fused as if the CPU had the kernel."""
    plain = fill_up(inject_lora(network(dtype), rank=3, targets=["*"]))
    fused = copy.deepcopy(plain)
    monkeypatch.setattr(dispatch, "obstacle", lambda device: None)
    install(plain, "torch")
    install(fused, "fused")
    return plain, fused


def test_install_replaces_the_classes_and_nothing_else(monkeypatch):
    plain, fused = students(monkeypatch, torch.bfloat16)
    assert {type(layer) for layer in lora_layers(plain).values()} == {LoRALinear, LoRAConv}
    assert {type(layer) for layer in lora_layers(fused).values()} == {FusedLoRALinear, FusedLoRAConv}
    before, after = plain.state_dict(), fused.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    install(fused, "fused")  # twice is once
    assert all(layer.region == EVERYWHERE for layer in lora_layers(copy.deepcopy(fused)).values())


def test_convolutions_with_other_padding_stay_plain(monkeypatch):
    """The operator takes zero padding in numbers; these pad circularly, or by name."""
    monkeypatch.setattr(dispatch, "obstacle", lambda device: None)
    padding = [dict(padding=1, padding_mode="circular"), dict(padding="same"), dict(padding=1)]
    model = inject_lora(nn.Sequential(*(nn.Conv2d(8, 8, 3, **kind) for kind in padding)), rank=3, targets=["*"])
    install(model, "fused")
    assert [type(layer) for layer in lora_layers(model).values()] == [LoRAConv, LoRAConv, FusedLoRAConv]


def test_a_fused_layer_can_be_merged(monkeypatch):
    """Merged, it computes W alone; unmerged, it is the student again."""
    _, model = students(monkeypatch, torch.float64)
    x = randn(5, 8, 4, 4, dtype=torch.float64)
    student = model(x, lora_enabled=True)
    merge_lora(model)
    assert error(model(x, lora_enabled=True), student) < 1e-13 and torch.equal(model(x), model(x, lora_enabled=True))
    unmerge_lora(model)
    assert error(model(x, lora_enabled=True), student) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_fused_student_is_the_same_student(dtype: torch.dtype, monkeypatch):
    results = []
    for model in students(monkeypatch, dtype):
        x = randn(5, 8, 4, 4, dtype=dtype).requires_grad_()
        y = model(x, lora_enabled=True)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in lora_parameters(model))])
        assert not torch.equal(model(x), y)
    for plain, fused in zip(*results):
        assert error(fused, plain) < 8 * ROUNDING[dtype]


def test_an_unfrozen_weight_gets_its_gradient(monkeypatch):
    """The operators compute none for W, so the layer falls back to plain PyTorch."""
    model = students(monkeypatch, torch.bfloat16)[1].requires_grad_()
    model(randn(5, 8, 4, 4, dtype=torch.bfloat16), lora_enabled=True).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_fused_model_compiles_and_can_be_copied(monkeypatch):
    torch._dynamo.reset()
    model = copy.deepcopy(students(monkeypatch, torch.bfloat16)[1])
    x = randn(5, 8, 4, 4, dtype=torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, lora_enabled=True), model(x, lora_enabled=True))
    assert torch.equal(compiled(x), model(x))
    torch._dynamo.reset()


def test_only_hopper_gets_hoppers_instructions():
    assert build.nvcc_flags((9, 0)) == ["-gencode=arch=compute_90a,code=sm_90a", "-DSM90"]
    assert build.nvcc_flags((8, 6)) == ["-gencode=arch=compute_86,code=sm_86"]
    assert build.nvcc_flags((12, 0)) == ["-gencode=arch=compute_120,code=sm_120"]


# Compiling the sources

NVCC = shutil.which("nvcc")
slow = partial(pytest.param, marks=pytest.mark.slow)


def ptxas_report(tmp_path: Path, instances: list[str], capability: tuple[int, int], header: str) -> str:
    """Compile these instances of a kernel and return what ptxas prints."""
    source = f'#include "primitives{header}.h"\n#include "lora_gemm{header}.h"\n'
    (tmp_path / "kernels.cu").write_text(source + "".join(f"template __global__ void {line};\n" for line in instances))
    flags = ["-std=c++17", "-O3", f"-I{CSRC}", *build.nvcc_flags(capability), "-Xptxas", "-v", "-cubin"]
    done = subprocess.run([NVCC, *flags, "kernels.cu"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def assert_no_spills(report: str, kernels: int) -> None:
    spills = [line.strip() for line in report.splitlines() if "spill" in line]
    assert spills == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"] * kernels
    assert "warning" not in report and "(C75" not in report  # the remark that ptxas serialises wgmma


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize(
    "capability",
    [(8, 0), (9, 0), *map(slow, [(8, 6), (8, 9), (12, 0)])],
    ids=["sm_80", "sm_90a", "sm_86", "sm_89", "sm_120"],
)
@pytest.mark.parametrize("rank", [16, *map(slow, [32, 64, 128])])
def test_no_register_spills(rank: int, capability: tuple[int, int], tmp_path: Path):
    if capability == (12, 0) and rank == 128:
        pytest.xfail("ptxas of CUDA 13.0 spills 24 and 44 bytes here")
    plans = [
        f"Plan<BFloat16, {sizes}, {rank}, {transposed}>"
        for sizes, transposed in product(("128, 160", "64, 64"), ("false", "true"))
    ]
    instances = [f"lora_gemm<{plan}>(const GRID_CONSTANT Problem)" for plan in plans]
    assert_no_spills(ptxas_report(tmp_path, instances, capability, header=""), kernels=4)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("rank", [16, *map(slow, [32, 64, 128])])
def test_no_register_spills_on_hopper(rank: int, tmp_path: Path):
    arguments = ", ".join(f"const GRID_CONSTANT {kind}" for kind in ("Problem", "TensorMap", "TensorMap"))
    instances = [f"lora_gemm_sm90<PlanSm90<BFloat16, {rank}, {way}>>({arguments})" for way in ("false", "true")]
    assert_no_spills(ptxas_report(tmp_path, instances, (9, 0), header="_sm90"), kernels=2)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_the_launcher_compiles(capability: tuple[int, int], tmp_path: Path):
    command = [NVCC, "-std=c++20", *build.nvcc_flags(capability), "-c", str(CSRC / "lora_gemm.cu")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("ninja") is None, reason="needs g++ and ninja")
def test_the_gradient_in_cpp(tmp_path: Path, monkeypatch):
    """Runs in a separate process, where it replaces the gradient in Python."""
    script = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(ROOT / "tests/kernels")!r}]
import torch
from torch.utils import cpp_extension
import test_kernels as t
source, folder = {str(CSRC / "autograd.cpp")!r}, {str(tmp_path)!r}
cpp_extension.load("gradient", [source], build_directory=folder, is_python_module=False)
x, W, b, A, B = t.layer(2, 7).values()
assert "LoRALinear" in t.lora_linear(x, W, b, A, B, 0.7).grad_fn.name()
t.test_gradcheck()
t.test_opcheck(torch.float64)
t.test_rank_zero_is_w_alone()
t.test_t_is_an_output_but_not_differentiable()
for dtype in t.ROUNDING:
    t.test_value_and_gradients(t.lora_linear, dtype, rows=(2, 7))
t.test_compiles_without_graph_breaks("aot_eager")
t.test_under_activation_checkpointing()
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("standard", ["c++17", "c++20"])  # used by the oldest and the newest PyTorch
def test_the_binding_compiles(standard: str):
    include = Path(torch.__file__).parent / "include"
    flags = [f"-std={standard}", "-fsyntax-only", "-Wall", f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
    done = subprocess.run(["g++", *flags, str(CSRC / "binding.cpp")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
