"""The fused kernel on a GPU: every layer of SD 1.5 and SDXL against float64, and the conditions of training."""

import faulthandler
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kernel_shapes import CONVS, SDXL, VIEWS
from tiny import ROOT, randn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minidistill import inject_lora
from minidistill.bench.kernel import Layer, Shape, backward, base, eager, error, layer_shapes
from minidistill.bench.workloads import SIZES, Setup, distil
from minidistill.kernels import FusedLoRALinear, install
from minidistill.kernels.build import obstacle
from minidistill.kernels.conv import lora_conv
from minidistill.kernels.dispatch import EVERYWHERE, FASTER, addmm_chain
from minidistill.kernels.linear import lora_linear, reference

OPS = torch.ops.minidistill
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ODD = [Shape(1, 8, 8), Shape(3, 24, 200), Shape(129, 328, 168), Shape(300, 72, 1000)]
USUAL, LARGE = Shape(300, 320, 640), Shape(18000, 320, 640)  # small blocks; large blocks, which use wgmma on Hopper
both_sizes = pytest.mark.parametrize("shape", [USUAL, LARGE], ids=["small blocks", "large blocks"])
SHAPES = [USUAL]
if torch.cuda.is_available():
    SHAPES = list(dict.fromkeys([*layer_shapes(), *map(Shape._make, SDXL), *ODD]))
SECONDS_A_TEST = 300
BOUND = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module", autouse=True)
def build_kernel() -> None:
    if reason := obstacle(torch.device("cuda")):
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def stop_a_hanging_kernel() -> Iterator[None]:
    """A kernel that waits for a transfer that never comes would hold the GPU for ever: show where, and exit."""
    faulthandler.dump_traceback_later(SECONDS_A_TEST, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill uninitialised memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1000, device="cuda", dtype=torch.bfloat16).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def a_layer(shape: Shape = USUAL, rank: int = 16, dtype: torch.dtype = torch.bfloat16) -> Layer:
    return Layer.random(shape, rank, dtype, "cuda")


def norm_error(actual: Tensor, expected: Tensor) -> float:
    """The relative error in the norm of a tensor, less subject to chance than the largest error."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.M}x{s.K}-{s.N}")
def test_forward_and_backward(shape: Shape, dtype: torch.dtype, poisoned):
    """y, dx, dA, dB: the largest error is within the bound, and the norm's at most a tenth above that of cuBLAS."""
    for rank in (1, 4, 13, 16, 32, 64, 128):
        layer = a_layer(shape, rank, dtype)
        expected = backward(eager, layer.double())()
        ours, chain = backward(lora_linear, layer)(), backward(addmm_chain, layer)()
        assert error(ours, expected) < BOUND[dtype], rank
        for actual, cublas, exact in zip(ours, chain, expected):
            small = exact.numel() < 100  # where chance decides which is closer
            assert small or norm_error(actual, exact) <= 1.1 * norm_error(cublas, exact), rank


@both_sizes
def test_the_fused_kernel_is_launched(shape: Shape):
    layer = a_layer(shape)
    backward(lora_linear, layer)()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        backward(lora_linear, layer)()
        torch.cuda.synchronize()
    launches = [event.name for event in profile.events() if "lora_gemm" in event.name]
    assert len(launches) == 2  # (y, t) and (dx, dt)
    sm90 = shape == LARGE and torch.cuda.get_device_capability() == (9, 0)
    assert all(("lora_gemm_sm90" in name) == sm90 for name in launches)
    assert "LoRALinear" in lora_linear(*layer).grad_fn.name()  # the gradient in C++


@both_sizes
def test_rank_zero_is_w_alone(shape: Shape, poisoned):
    layer = a_layer(shape, rank=0)
    actual, expected = backward(lora_linear, layer)(), backward(base, layer.double())()
    assert error(actual[:2], expected) < BOUND[torch.bfloat16] and actual[2].shape == (0, 320)


@both_sizes
def test_it_agrees_with_its_reference(shape: Shape):
    """The reference rounds where the kernel does, so that y and t differ by the order of summation only."""
    layer = a_layer(shape)
    for actual, expected in zip(OPS.lora_linear(*layer), reference(*layer)):
        assert error((actual.detach(),), (expected.detach().double(),)) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@both_sizes
def test_memory_layouts_of_x(shape: Shape, view):
    """Also of dy, here with transposed weights, which are not contiguous."""
    x, W, b, A, B, scale = a_layer(shape)
    rows = view(x.detach())
    contiguous = rows.clone(memory_format=torch.contiguous_format)
    for layer, *weights in ((OPS.lora_linear, W, b, A, B), (OPS.lora_linear_dx, W.T, B.T, A.T)):
        actual, expected = (layer(x, *weights, scale) for x in (rows, contiguous))
        assert actual[0].shape == (*rows.shape[:-1], 640)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected))


UNSUPPORTED = {
    "float32": "x.float(), W.float(), b.float(), A, B",
    "no multiple of 8": "x[:, :-4], W[:, :-4], b, A[:, :-4], B",
    "LoRA in half precision": "x, W, b, A.half(), B",
}


@pytest.mark.parametrize("operands", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_operands_are_errors(operands: str):
    """Each in a process of its own: on an H200 one of them ended the process."""
    code = f"""
import torch
from minidistill.kernels.build import obstacle
from minidistill.kernels.linear import lora_linear

assert obstacle(torch.device("cuda")) is None
x, W, b = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in ((300, 320), (640, 320), (640,)))
A, B = (torch.randn(size, device="cuda", requires_grad=True) for size in ((16, 320), (640, 16)))
x.requires_grad_()
try:
    lora_linear({operands}, 1.0)
except RuntimeError:
    print("refused")
"""
    command = [sys.executable, "-X", "faulthandler", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "refused", f"exit status {done.returncode}\n{done.stderr}"


def test_opcheck():
    layer = a_layer(Shape(20, 64, 72), rank=5)
    torch.library.opcheck(OPS.lora_linear.default, tuple(layer))
    dy = torch.randn(20, 72, device="cuda", dtype=torch.bfloat16)
    x, W, b, A, B, scale = layer
    torch.library.opcheck(OPS.lora_linear_dx.default, (dy, W, A.detach(), B.detach(), scale))


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    layer = a_layer()
    compiled = torch.compile(lora_linear, fullgraph=True)
    for actual, expected in zip(backward(compiled, layer)(), backward(lora_linear, layer)()):
        assert error((actual,), (expected.double(),)) < BOUND[torch.bfloat16]


def test_under_autocast():
    layer = a_layer()
    x, W, b = (tensor.detach().float() for tensor in layer[:3])
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(lora_linear(x, W, b, *layer[3:]), lora_linear(*layer))


def test_under_activation_checkpointing():
    layer = a_layer()
    recomputed = backward(lambda *operands: checkpoint(lora_linear, *operands, use_reentrant=False), layer)
    assert all(torch.equal(a, b) for a, b in zip(recomputed(), backward(lora_linear, layer)()))


@both_sizes
def test_in_a_cuda_graph_and_on_another_stream(shape: Shape):
    layer = a_layer(shape)
    run = backward(lora_linear, layer)
    expected = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other_stream = run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for tensor in captured:
        tensor.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) and torch.equal(c, b) for a, b, c in zip(captured, expected, other_stream))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_the_current_one():
    layer = a_layer()
    moved = (x.to("cuda:1") for x in layer[:5])
    assert torch.equal(lora_linear(*moved, layer.scale).to("cuda:0"), lora_linear(*layer))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer(tool: str):
    """Only our two launches run and are checked; their operands come from the host. A few ranks, as it is slow."""
    if not (sanitizer := shutil.which("compute-sanitizer")):
        pytest.skip("needs compute-sanitizer")
    script = """
import torch
from minidistill.bench.kernel import Layer, Shape
from minidistill.kernels.build import obstacle
ops, device = torch.ops.minidistill, torch.device("cuda")
assert obstacle(device) is None
for shape in (Shape(70, 72, 88), Shape(16384, 72, 328)):  # small blocks, large blocks
    for rank in (0, 5, 16, 128):
        layer = Layer.random(shape, rank, torch.bfloat16, "cpu")
        dy = torch.randn(shape.M, shape.N).bfloat16()
        dy, x, W, b, A, B = (tensor.detach().to(device) for tensor in (dy, *layer[:5]))
        ops.lora_linear(x, W, b, A, B, layer.scale)
        ops.lora_linear_dx(dy, W, A, B, layer.scale)
torch.cuda.synchronize()
"""
    flags = ["--tool", tool, "--kernel-name", "kernel_substring=lora_gemm", "--error-exitcode", "1"]
    flags += ["--report-api-errors", "no", "--padding", "256"] if tool == "memcheck" else []
    command = [sanitizer, *flags, sys.executable, "-c", script]
    # One allocation per tensor: accesses within PyTorch's cached blocks are never out of bounds.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def plain_conv(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, scale: float, *how: tuple[int, int]) -> Tensor:
    return F.conv2d(x, W, b, *how) + scale * F.conv2d(F.conv2d(x, A.to(x.dtype), None, *how), B.to(x.dtype))


@pytest.mark.parametrize(
    "k, C, N, side, layout",
    [
        *((3, *sizes, torch.channels_last) for sizes in CONVS),
        (3, 320, 640, 32, torch.contiguous_format),
        *((1, 320, 640, 32, layout) for layout in (torch.channels_last, torch.contiguous_format)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_convolutions(dtype: torch.dtype, k: int, C: int, N: int, side: int, layout: torch.memory_format, poisoned):
    g = torch.Generator("cuda").manual_seed(0)
    sizes = {"x": (2, C, side, side), "W": (N, C, k, k), "b": (N,), "A": (16, C, k, k), "B": (N, 16, 1, 1)}
    tensors = {name: torch.randn(size, generator=g, device="cuda") for name, size in sizes.items()}
    for name in ("W", "A"):
        tensors[name] /= (C * k * k) ** 0.5
    narrow = {name: x if name in "AB" else x.to(dtype) for name, x in tensors.items()}
    narrow["x"] = narrow["x"].contiguous(memory_format=layout)
    dy = torch.randint(-8, 9, (2, N, side, side), generator=g, device="cuda") / 8  # exact in every dtype

    def results(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        x, W, b, A, B = tensors.values()
        leaves = [leaf.detach().requires_grad_() for leaf in (x, A, B)]
        y = function(leaves[0], W, b, *leaves[1:], 0.5, *((n, n) for n in (1, k // 2, 1)))
        return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y))

    expected = results(plain_conv, {name: x.to(dtype).double() for name, x in tensors.items()})
    actual, plain = results(partial(lora_conv, EVERYWHERE), narrow), results(plain_conv, narrow)
    for a, p, exact in zip(actual, plain, expected):
        assert norm_error(a, exact) < BOUND[dtype] and norm_error(a, exact) <= 1.1 * norm_error(p, exact)
    # dx of a 3x3 is the sum of two rounded gradients, as in plain PyTorch: its largest error depends on chance.
    others = [i for i in range(4) if k == 1 or i != 1]
    assert error([actual[i] for i in others], [expected[i] for i in others]) < BOUND[dtype]


def losses(kernel: str, steps: int = 40) -> Tensor:
    """The losses of a student of the pocket model's size that learns a teacher's prediction."""
    setup = Setup(SIZES["pocket"], torch.device("cuda"), torch.bfloat16, rank=8, timed_steps=1, kernel=kernel)
    step = distil(setup, "ours", teacher_in_loop=True)
    return torch.stack([step()[0] for _ in range(steps)])


def test_distillation_has_the_same_losses_with_the_kernel():
    plain, fused = losses("torch"), losses("fused")
    assert ((plain - fused).abs() < 0.01 * plain).all() and plain[-1] < plain[0]


def test_a_unet_has_the_same_output_with_the_kernel():
    setup = Setup(SIZES["pocket"], torch.device("cuda"), torch.bfloat16, rank=8, timed_steps=1)
    outputs = []
    for kernel in ("torch", "fused"):
        setup.kernel = kernel
        t, context = torch.tensor([621], device="cuda"), setup.contexts(1)[0]
        with torch.no_grad():
            outputs.append(setup.lora_unet()(setup.latents(1), t, context, lora_enabled=True))
    assert error((outputs[1],), (outputs[0].double(),)) < 5e-2


def test_auto_chooses_only_what_was_measured():
    net = torch.nn.Sequential(torch.nn.Linear(64, 64)).to("cuda", torch.bfloat16)
    model = inject_lora(net, targets=["*"])
    install(model, "auto")
    fused = isinstance(model.base[0], FusedLoRALinear)
    assert fused == (torch.cuda.get_device_capability() in FASTER)
    x = randn(2, 64).to("cuda", torch.bfloat16)
    assert model(x, lora_enabled=True).shape == (2, 64)
