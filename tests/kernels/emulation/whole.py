"""Builds and checks the whole operator on a CPU: binding, launcher and C++ gradient, with launches under emulation.

    python tests/kernels/emulation/whole.py FOLDER sm_80|sm_90a [FILE RIGHT WRONG]

FOLDER receives the build. The last three arguments plant a fault: RIGHT, which occurs once in FILE, becomes WRONG.
Run it as a separate process: what it builds replaces the operator's Python implementation.
"""

import ctypes
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from kernel_shapes import VIEWS  # noqa: E402
from tiny import TINY_SIZE  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402

from minidistill.bench.kernel import Layer, Shape, backward, base, eager, error  # noqa: E402
from minidistill.bench.workloads import Setup, distil  # noqa: E402
from minidistill.kernels import dispatch  # noqa: E402
from minidistill.kernels.conv import lora_conv  # noqa: E402
from minidistill.kernels.dispatch import EVERYWHERE, addmm_chain  # noqa: E402
from minidistill.kernels.linear import lora_linear  # noqa: E402

CSRC, EMULATION = ROOT / "minidistill/kernels/csrc", ROOT / "tests/kernels/emulation"
OPS = torch.ops.minidistill
LAUNCH = "kernel<<<blocks, P::THREADS, P::SHARED_BYTES, target.stream>>>("
CHANGES = {  # in place of what a CPU lacks
    "binding.cpp": [
        ("(minidistill, CUDA, library)", "(minidistill, CPU, library)"),
        ("x.device().index()", "emulated_device"),
        ("    const auto stream = at::accelerator::getCurrentStream(device);\n", ""),
        ("stream.native_handle()", "nullptr"),
    ],
    "lora_gemm.cu": [(LAUNCH, "launch_emulated(kernel, blocks, P::THREADS, P::SHARED_BYTES, ")],
    "autograd.cpp": [],
}
BOUND = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
LARGE, SMALL = 0, 1  # the emulated device for which the launcher chooses blocks of this size (driver.h)
THREADS = {LARGE: 256, SMALL: 128}


def build(folder: Path, hopper: bool) -> ctypes.CDLL:
    """Compile and load the operator for an emulated GPU."""
    sources = []
    for file in CSRC.iterdir():
        if file.name.startswith("primitives"):
            continue  # replaced by the emulation
        text = file.read_text()
        for old, new in CHANGES.get(file.name, []):
            assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {file.name}"
            text = text.replace(old, new)
        target = folder / file.name.replace(".cu", ".cpp")
        target.write_text(text)
        sources += [str(target)] if file.name in CHANGES else []
    flags = [f"-I{EMULATION}", f"-I{folder}", "-O1", "-include", str(EMULATION / "driver.h")]
    flags += ["-DSM90"] if hopper else []
    cpp_extension.load("emulated", sources, extra_cflags=flags, build_directory=str(folder), is_python_module=False)
    return ctypes.CDLL(str(folder / "emulated.so"))


def rejects(layer, *operands) -> bool:
    """True if ``layer`` raises a RuntimeError."""
    try:
        layer(*operands)
    except RuntimeError:
        return True
    return False


def losses(kernel: str, steps: int = 4) -> Tensor:
    """The losses of a tiny student that learns a teacher's prediction."""
    size = replace(TINY_SIZE, unet=replace(TINY_SIZE.unet, context_width=16))  # the kernel needs a multiple of 8
    setup = Setup(size, torch.device("cpu"), torch.bfloat16, rank=8, timed_steps=1, kernel=kernel)
    step = distil(setup, "ours", teacher_in_loop=True)
    return torch.stack([step()[0] for _ in range(steps)])


def check(folder: Path, hopper: bool) -> None:
    library = build(folder, hopper)
    print("built", flush=True)
    device = ctypes.c_int.in_dll(library, "emulated_device")
    threads = ctypes.c_int.in_dll(library, "threads_of_last_launch")
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    assert torch.empty(99).isnan().all()

    for device.value in (LARGE, SMALL):
        shapes = Shape(1, 8, 8), Shape(70, 72, 88), Shape(130, 136, 168)
        for shape, rank, dtype in product(shapes, (1, 5, 16, 32, 64, 128), BOUND):
            layer = Layer.random(shape, rank, dtype, "cpu")
            actual, expected = backward(lora_linear, layer)(), backward(eager, layer.double())()
            assert threads.value == THREADS[device.value], (threads.value, device.value, shape)
            assert error(actual, expected) < BOUND[dtype], (device.value, shape, rank, dtype)

        layer = Layer.random(Shape(70, 72, 88), 0, torch.bfloat16, "cpu")
        actual, expected = backward(lora_linear, layer)(), backward(base, layer.double())()
        assert error(actual[:2], expected) < 1e-2 and actual[2].shape == (0, 72)

        x, W, b, A, B, scale = Layer.random(Shape(60, 72, 88), 5, torch.bfloat16, "cpu")
        for name, view in VIEWS.items():
            rows = view(x.detach())
            contiguous = rows.clone(memory_format=torch.contiguous_format)
            for layer, *weights in ((OPS.lora_linear, W, b, A, B), (OPS.lora_linear_dx, W.T, B.T, A.T)):
                actual, expected = (layer(x, *weights, scale) for x in (rows, contiguous))
                assert actual[0].shape == (*rows.shape[:-1], 88), name
                assert all(torch.equal(a, b) for a, b in zip(actual, expected)), name

    x, W, b, A, B, scale = layer = Layer.random(Shape(20, 64, 72), 5, torch.bfloat16, "cpu")
    assert "LoRALinear" in lora_linear(*layer).grad_fn.name()
    assert rejects(lora_linear, x.float(), W.float(), b.float(), A, B, scale)
    assert rejects(lora_linear, x[:, :-4], W[:, :-4], b, A[:, :-4], B, scale)
    assert rejects(lora_linear, x, W[:0], b[:0], A, B[:0], scale)
    assert rejects(lora_linear, x, W, b, A.half(), B, scale)
    torch.library.opcheck(OPS.lora_linear.default, tuple(layer))
    dy = torch.randn(20, 72).bfloat16()
    torch.library.opcheck(OPS.lora_linear_dx.default, (dy, W, A.detach(), B.detach(), scale))

    x = torch.randn(2, 24, 5, 6).bfloat16().contiguous(memory_format=torch.channels_last)
    W, b, A, B = torch.randn(40, 24).bfloat16(), torch.randn(40).bfloat16(), torch.randn(3, 24), torch.randn(40, 3)
    threads.value = 0
    y = lora_conv(
        EVERYWHERE, x, W[..., None, None], b, A[..., None, None], B[..., None, None], 0.5, (1, 1), (0, 0), (1, 1)
    )
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    expected = addmm_chain(rows.double(), W.double(), b.double(), A.bfloat16().double(), B.bfloat16().double(), 0.5)
    assert threads.value and error((y.permute(0, 2, 3, 1).flatten(0, 2),), (expected,)) < 1e-2

    dispatch.obstacle = lambda device: None  # as if the CPU had the kernel
    threads.value = 0
    plain = losses("torch")
    assert threads.value == 0
    fused = losses("fused")
    assert threads.value and ((plain - fused).abs() < 0.01 * plain).all() and plain[-1] < plain[0]


if __name__ == "__main__":
    folder, target, *fault = sys.argv[1:]
    if fault:
        CHANGES[fault[0]].append(tuple(fault[1:]))
    check(Path(folder), hopper=target == "sm_90a")
