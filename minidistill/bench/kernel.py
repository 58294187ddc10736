"""How fast the fused kernel is on a GPU: one LoRA layer computed in several ways, then a whole training step.

  python -m minidistill.bench kernel                        ten chosen shapes and all of SD 1.5, four ranks
  python -m minidistill.bench kernel --rank 16 --no-compile

Each way is timed with its forward pass alone, and with the backward pass for x, A and B; with calls launched one by
one, and in a CUDA graph, where launching costs nothing. Times are medians of CUDA's own clock with warm caches; errors
are against float64. "base" is the frozen layer in cuBLAS, "r = 0" the fused kernel with a LoRA of rank 0.
"""

import faulthandler
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable
from itertools import product
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from minidistill.bench.output import add_out_flag, new_report, save_report, save_so_far
from minidistill.bench.workloads import SIZES, Setup, distil, error
from minidistill.config import SD15_UNET, UNetConfig
from minidistill.evaluate.tables import markdown_table
from minidistill.kernels.build import obstacle
from minidistill.kernels.dispatch import addmm_chain
from minidistill.kernels.linear import lora_linear
from minidistill.lora import inject_lora, lora_layers
from minidistill.training.command_line import positive_int
from minidistill.unet import UNet

INNER = 20  # calls between two readings of the clock
SECONDS_A_LAYER = 900  # with its compilation


def add_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument
    ranks = [4, 16, 64, 128]
    add("--rank", type=positive_int, nargs="+", default=ranks, metavar="N", help="ranks (default: 4 16 64 128)")
    add("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="dtype of x and W (default: %(default)s)")
    add("--repeats", type=positive_int, default=30, metavar="N", help="timings of each way (default: %(default)s)")
    add("--no-compile", action="store_true", help="leave out torch.compile, which compiles for every shape and rank")
    add_out_flag(parser, "results/bench-kernel.json")


class Shape(NamedTuple):
    """A layer: [M, K] -> [M, N]."""

    M: int
    K: int
    N: int


STUDY = [  # few rows and many, narrow and wide
    *(Shape(64, 1280, 1280), Shape(1024, 640, 640), Shape(4096, 320, 320), Shape(16384, 320, 320)),
    *(Shape(4096, 640, 640), Shape(1024, 1280, 1280), Shape(4096, 1280, 1280), Shape(16384, 320, 2560)),
    *(Shape(4096, 5120, 1280), Shape(16384, 1280, 1280)),
]


def layer_shapes(config: UNetConfig = SD15_UNET, batch: int = 1, tokens: int = 77) -> dict[Shape, int]:
    """Shape -> number of linear layers and 1x1 convolutions with a LoRA that have it."""
    shapes: Counter[Shape] = Counter()

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if layer.weight[0, 0].numel() == 1:  # a 1x1 convolution is linear in the channels
            N, K = layer.weight.shape[:2]
            shapes[Shape(inputs[0].numel() // K, K, N)] += 1

    with torch.device("meta"):
        unet = inject_lora(UNet(config))
        for layer in lora_layers(unet).values():
            layer.register_forward_pre_hook(note)
        z_t = torch.empty(batch, config.in_channels, config.sample_size, config.sample_size)
        unet(z_t, torch.empty(batch, dtype=torch.long), torch.empty(batch, tokens, config.context_width))
    return dict(sorted(shapes.items()))


# The ways to compute a layer: (x, W, b, A, B, scale) -> y.
Way = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


def base(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The frozen layer without its LoRA."""
    return F.linear(x, W, b)


def eager(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """As LoRALinear.forward does it."""
    return torch.add(F.linear(x, W, b), F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)), alpha=scale)


def stacked(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """One matmul for W and A. They are stacked in every call: A changes, and W must stay the teacher's."""
    z = x @ torch.cat([W, A.to(x.dtype)]).T
    return torch.addmm(z[:, : len(W)] + b, z[:, len(W) :], B.to(x.dtype).T, alpha=scale)


def merged(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + scale B A, made in every call."""
    return F.linear(x, torch.addmm(W, B.to(x.dtype), A.to(x.dtype), alpha=scale), b)


WAYS: dict[str, Way] = {
    "base": base,
    "r = 0": lora_linear,  # on a layer of that rank
    "eager": eager,
    "compile": torch.compile(eager, fullgraph=True, dynamic=False),
    "addmm": addmm_chain,
    "stacked": stacked,
    "merge": merged,
    "fused": lora_linear,
}
WITHOUT_LORA = ("base", "r = 0")


class Layer(NamedTuple):
    """The arguments of a way; x, A and B require gradients."""

    x: Tensor
    W: Tensor
    b: Tensor
    A: Tensor
    B: Tensor
    scale: float

    @classmethod
    def random(cls, shape: Shape, rank: int, dtype: torch.dtype, device: str) -> "Layer":
        M, K, N = shape
        g = torch.Generator(device).manual_seed(0)
        x, W, b, A, B = (
            torch.randn(size, generator=g, device=device) for size in ((M, K), (N, K), (N,), (rank, K), (N, rank))
        )
        learn = (A.mul_(K**-0.5).requires_grad_(), B.requires_grad_())
        return cls(x.to(dtype).requires_grad_(), W.mul_(K**-0.5).to(dtype), b.to(dtype), *learn, 0.5)

    def double(self) -> "Layer":
        """The same numbers in float64; A and B are rounded first, as every way rounds them."""
        tensors = (x.detach().to(self.x.dtype).double().requires_grad_(x.requires_grad) for x in self[:5])
        return Layer(*tensors, self.scale)


def forward(function: Way, layer: Layer) -> Callable[[], tuple[Tensor, ...]]:
    return torch.no_grad()(lambda: (function(*layer),))


def backward(function: Way, layer: Layer) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward pass: y, and the gradients of x, A and B for one dy."""
    g = torch.Generator(layer.x.device).manual_seed(1)
    size = len(layer.x), len(layer.W)
    dy = (torch.randint(-8, 9, size, generator=g, device=g.device) / 8).to(layer.x)  # exact in every dtype
    inputs = [layer.x] if function is base else [layer.x, layer.A, layer.B]

    def run() -> tuple[Tensor, ...]:
        y = function(*layer)
        return y.detach(), *torch.autograd.grad(y, inputs, dy)

    return run


PASSES = {"forward": forward, "forward and backward": backward}


def seconds(run: Callable[[], object], repeats: int, in_graph: bool, inner: int = INNER) -> float:
    """The median time of a call, by CUDA's clock."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()

    def launch() -> None:
        for _ in range(inner):
            run()

    if in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        launch = graph.replay
        launch()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / inner)
    return median(times)


def limits(dtype: torch.dtype) -> tuple[float, float]:
    """The most that this GPU does in a second: operations of a large matmul, bytes of a large copy."""
    a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    target, source = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
    matmul, copy = seconds(lambda: a @ a, 10, in_graph=True), seconds(lambda: target.copy_(source), 10, in_graph=True)
    return 2 * 8192**3 / matmul, 2 * 2**30 / copy


def measure(
    shape: Shape, rank: int, dtype: torch.dtype, repeats: int, compiled: bool, device: str = "cuda"
) -> list[dict]:
    """Seconds and errors of every way; one row for each pass, in a CUDA graph and without."""
    torch._dynamo.reset()  # it compiles a function for a limited number of shapes
    layer, base_alone = (Layer.random(shape, r, dtype, device) for r in (rank, 0))
    names = [name for name in WAYS if name != "compile" or compiled]
    rows = []
    for which, make in PASSES.items():
        expected = make(eager, layer.double())()
        runs = {name: make(WAYS[name], base_alone if name == "r = 0" else layer) for name in names}
        errors = {name: error(run(), expected) for name, run in runs.items() if name not in WITHOUT_LORA}
        for in_graph in (False, True):
            times = {name: seconds(run, repeats, in_graph) for name, run in runs.items()}
            rows.append(
                shape._asdict() | {"rank": rank, "pass": which, "graph": in_graph, "seconds": times, "errors": errors}
            )
    return rows


def markdown(rows: list[dict]) -> str:
    """A table per pass, in a CUDA graph and without; microseconds, the fastest way that computes the LoRA in bold."""
    names = list(rows[0]["seconds"])
    text = ""
    for which, in_graph in product(PASSES, (False, True)):
        how = "in a CUDA graph" if in_graph else "launched one by one"
        lines = [["M x K -> N", "rank", *names, "fused error", "addmm error"]]
        for row in (row for row in rows if row["pass"] == which and row["graph"] == in_graph):
            times = {name: f"{1e6 * time:.1f}" for name, time in row["seconds"].items()}
            fastest = min(set(times) - set(WITHOUT_LORA), key=row["seconds"].get)
            times[fastest] = f"**{times[fastest]}**"
            errors = [f"{row['errors'][name]:.1e}" for name in ("fused", "addmm")]
            lines.append([f"{row['M']} x {row['K']} -> {row['N']}", str(row["rank"]), *times.values(), *errors])
        text += f"\n{which.capitalize()}, {how}, microseconds:\n\n{markdown_table(lines)}\n"
    return text


def training_step_seconds(kernel: str) -> float:
    """An update of SD 1.5 from trajectories, in bfloat16, its LoRA layers computed by ``kernel``."""
    setup = Setup(SIZES["sd15"], torch.device("cuda"), torch.bfloat16, rank=16, kernel=kernel)
    return seconds(distil(setup, "ours", teacher_in_loop=False), 10, in_graph=False, inner=1)


def run(args: Namespace) -> None:
    if reason := obstacle(torch.device("cuda")):
        raise ValueError(f"the kernel cannot be measured here: {reason}.")
    dtype = getattr(torch, args.dtype)
    report = new_report(args, torch.cuda.get_device_name(), dtype=args.dtype, repeats=args.repeats, inner=INNER)
    report["operations_per_second"], report["bytes_per_second"] = limits(dtype)
    report["step_s"] = {kernel: training_step_seconds(kernel) for kernel in ("torch", "fused")}
    report["rows"] = []
    shapes = dict.fromkeys([*STUDY, *layer_shapes()])
    for shape, rank in tqdm(list(product(shapes, args.rank)), "layers"):
        faulthandler.dump_traceback_later(SECONDS_A_LAYER, exit=True)  # a kernel that hangs would hold the GPU for ever
        report["rows"] += measure(shape, rank, dtype, args.repeats, not args.no_compile)
        faulthandler.cancel_dump_traceback_later()
        save_so_far(report, args.out)
    print(markdown(report["rows"]))
    limit = f"{report['operations_per_second'] / 1e12:.0f} TFLOP/s, {report['bytes_per_second'] / 1e12:.2f} TB/s"
    print(f"{report['device']}, which reaches {limit}; torch {report['torch']}.")
    step = {kernel: f"{1e3 * time:.1f} ms" for kernel, time in report["step_s"].items()}
    print(f"A training step of SD 1.5: {step['torch']} in plain PyTorch, {step['fused']} with the fused kernel.")
    save_report(report, args.out)
