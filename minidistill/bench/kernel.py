"""How fast the fused kernel is on a GPU: a LoRA layer beside the ways that need only cuBLAS, and a distillation step.

  python -m minidistill.bench kernel                   the ten shapes of the study and all of SD 1.5, four ranks
  python -m minidistill.bench kernel --rank 16 --no-compile

Each way is timed with its forward pass alone and with the backward pass for x, A and B; launched one by one, and in a
CUDA graph, where launching costs nothing. Times are medians of CUDA's own clock, caches warm; errors, beside float64.
"base" is cuBLAS without a pair, and "r = 0" the fused kernel without one, which still multiplies sixteen columns of
zeros.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from minidistill.bench.timing import markdown_table
from minidistill.config import SD15_UNET, UNetConfig
from minidistill.formats.model_configs import write_json
from minidistill.kernels.build import obstacle
from minidistill.kernels.dispatch import LoRAFunction, addmm_chain
from minidistill.kernels.op import lora_linear
from minidistill.lora import inject_lora, lora_layers
from minidistill.training.settings import new_parser, positive_int, provenance
from minidistill.unet import UNet


class Shape(NamedTuple):
    """A layer: [M, K] -> [M, N]."""

    M: int
    K: int
    N: int


STUDY = [
    Shape(64, 1280, 1280),
    Shape(1024, 640, 640),
    Shape(4096, 320, 320),
    Shape(16384, 320, 320),
    Shape(4096, 640, 640),
    Shape(1024, 1280, 1280),
    Shape(4096, 1280, 1280),
    Shape(16384, 320, 2560),
    Shape(4096, 5120, 1280),
    Shape(16384, 1280, 1280),
]
INNER = 20  # launches between two readings of the clock
WITHOUT_PAIR = ("base", "r = 0")


def layer_shapes(config: UNetConfig = SD15_UNET, batch: int = 1, tokens: int = 77) -> dict[Shape, int]:
    """The linear layers and 1x1 convolutions that have a LoRA, and how many there are of each shape."""
    shapes: dict[Shape, int] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if layer.weight[0, 0].numel() == 1:  # a 1x1 convolution is linear in the channels
            N, K = layer.weight.shape[:2]
            shape = Shape(inputs[0].numel() // K, K, N)
            shapes[shape] = shapes.get(shape, 0) + 1

    with torch.device("meta"):
        unet = inject_lora(UNet(config))
        for layer in lora_layers(unet).values():
            layer.register_forward_pre_hook(note)
        z_t = torch.empty(batch, config.in_channels, config.sample_size, config.sample_size)
        unet(z_t, torch.empty(batch, dtype=torch.long), torch.empty(batch, tokens, config.context_width))
    return dict(sorted(shapes.items()))


# The contestants: (x, W, b, A, B, scale) -> y.


def base(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The frozen layer alone: what there is to come near to."""
    return F.linear(x, W, b)


def eager(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The lines of LoRALinear.forward."""
    return F.linear(x, W, b) + F.linear(F.linear(x, A.to(x.dtype)), (scale * B).to(x.dtype))


def stacked(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """One matmul for W and A. They are put together anew each time: A changes, and W must stay the teacher's."""
    z = x @ torch.cat([W, A.to(x.dtype)]).T
    return torch.addmm(z[:, : len(W)] + b, z[:, len(W) :], B.to(x.dtype).T, alpha=scale)


def merged(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """A new W in every step."""
    return F.linear(x, torch.addmm(W, B.to(x.dtype), A.to(x.dtype), alpha=scale), b)


CONTESTANTS: dict[str, LoRAFunction] = {
    "base": base,
    "r = 0": lora_linear,  # on a layer of that rank
    "eager": eager,
    "compile": torch.compile(eager, fullgraph=True, dynamic=False),
    "addmm": addmm_chain,
    "stacked": stacked,
    "merge": merged,
    "fused": lora_linear,
}


class Layer(NamedTuple):
    """The operands of a contestant; x, A and B want gradients."""

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
        """The same numbers in float64, A and B as every way rounds them."""
        tensors = (x.detach().to(self.x.dtype).double().requires_grad_(x.requires_grad) for x in self[:5])
        return Layer(*tensors, self.scale)


def forward(function: LoRAFunction, layer: Layer) -> Callable[[], tuple[Tensor, ...]]:
    return torch.no_grad()(lambda: (function(*layer),))


def backward(function: LoRAFunction, layer: Layer) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward: y, and the gradients of x, A and B for one dy."""
    g = torch.Generator(layer.x.device).manual_seed(1)
    size = len(layer.x), len(layer.W)
    dy = (torch.randint(-8, 9, size, generator=g, device=g.device) / 8).to(layer.x)  # the same in every dtype
    learning = [layer.x] if function is base else [layer.x, layer.A, layer.B]

    def run() -> tuple[Tensor, ...]:
        y = function(*layer)
        return y.detach(), *torch.autograd.grad(y, learning, dy)

    return run


PASSES = {"forward": forward, "forward and backward": backward}


def error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest difference, relative to the largest value, in the worst of the tensors; NaN where there is one."""
    pairs = zip(found, expected, strict=True)
    return torch.stack([(a.double() - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()


def cost(shape: Shape, rank: int, which: str) -> tuple[int, int]:
    """(operations, bytes that have to move) of a layer. The backward pass is a forward's arithmetic, then dA and dB."""
    M, K, N = shape
    pair = rank * (K + N)
    operations, moved = 2 * M * (N * K + pair), 2 * (M * K + N * K + M * N) + 4 * pair
    if which == "forward":
        return operations, moved
    return 2 * operations + 2 * M * pair, 2 * moved + 2 * M * (K + N) + 4 * pair


# The clock


@contextmanager
def captured() -> Iterator[torch.cuda.CUDAGraph]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        yield graph


def seconds(run: Callable[[], object], repeats: int, in_graph: bool, inner: int = INNER) -> float:
    """The median time of a call."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()

    def calls() -> None:
        for _ in range(inner):
            run()

    launch = calls
    if in_graph:
        with captured() as graph:
            calls()
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
    """What this card does at best, (operations, bytes) a second: in a large matmul, and in a large copy."""
    a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    target, source = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
    matmul, copy = seconds(lambda: a @ a, 10, in_graph=True), seconds(lambda: target.copy_(source), 10, in_graph=True)
    return 2 * 8192**3 / matmul, 2 * 2**30 / copy


def measure(shape: Shape, rank: int, args: Namespace, best: tuple[float, float]) -> list[dict]:
    """A row for each pass and way of launching."""
    torch._dynamo.reset()  # which compiles a function for a few shapes only
    layer, base_alone = (Layer.random(shape, r, getattr(torch, args.dtype), "cuda") for r in (rank, 0))
    names = [name for name in CONTESTANTS if name != "compile" or not args.no_compile]
    rows = []
    for which, make in PASSES.items():
        expected = make(eager, layer.double())()
        runs = {name: make(CONTESTANTS[name], base_alone if name == "r = 0" else layer) for name in names}
        errors = {name: error(run(), expected) for name, run in runs.items() if name not in WITHOUT_PAIR}
        costs = {name: cost(shape, 0 if name in WITHOUT_PAIR else rank, which) for name in names}
        least = {name: max(operations / best[0], moved / best[1]) for name, (operations, moved) in costs.items()}
        for in_graph in (False, True):
            times = {name: seconds(run, args.repeats, in_graph) for name, run in runs.items()}
            row = shape._asdict() | {"rank": rank, "pass": which, "graph": in_graph, "seconds": times, "errors": errors}
            row["tflops"] = {name: costs[name][0] / time / 1e12 for name, time in times.items()}
            row["of_roofline"] = {name: least[name] / time for name, time in times.items()}
            rows.append(row)
    return rows


def fastest(row: dict) -> str:
    """The fastest contestant that computes the pair."""
    times = {name: time for name, time in row["seconds"].items() if name not in WITHOUT_PAIR}
    return min(times, key=times.get)


def markdown(rows: list[dict]) -> str:
    """A table for each pass and way of launching; times in microseconds, the fastest with the pair in bold."""
    names = list(rows[0]["seconds"])
    text = ""
    for which, in_graph in product(PASSES, (False, True)):
        text += f"\n{which.capitalize()}, {'in a CUDA graph' if in_graph else 'launched one by one'}, microseconds:\n\n"
        columns = ["M x K -> N", "rank", *names, "fused TFLOP/s", "of roofline", "error", "of addmm"]
        lines = [columns, ["---"] * len(columns)]
        for row in (row for row in rows if row["pass"] == which and row["graph"] == in_graph):
            first = fastest(row)
            times = [f"**{1e6 * t:.1f}**" if name == first else f"{1e6 * t:.1f}" for name, t in row["seconds"].items()]
            line = [f"{row['M']} x {row['K']} -> {row['N']}", str(row["rank"]), *times]
            line += [f"{row['tflops']['fused']:.0f}", f"{row['of_roofline']['fused']:.2f}"]
            lines.append([*line, *(f"{row['errors'][name]:.1e}" for name in ("fused", "addmm"))])
        text += f"{markdown_table(lines)}\n"
    return text


def main(argv: list[str], distillation_step: Callable[[str], Callable[[], object]]) -> None:
    """``distillation_step(kernel)`` makes a step of SD 1.5 to be timed, whose LoRA "fused" or "torch" computes."""
    parser = new_parser(__doc__)
    parser.add_argument("--rank", type=positive_int, nargs="+", default=[4, 16, 64, 128], help="ranks of the LoRA")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="dtype of x and W")
    parser.add_argument("--repeats", type=positive_int, default=30, help="measurements, of which the median counts")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=Path("results/bench-kernel.json"), help="JSON file for the results")
    args = parser.parse_args(argv)
    if reason := obstacle(torch.device("cuda")):
        raise ValueError(f"there is nothing to measure: {reason}.")
    shapes = list(dict.fromkeys([*STUDY, *layer_shapes()]))
    best = limits(getattr(torch, args.dtype))
    tasks = list(product(shapes, args.rank))
    rows = [row for task in tqdm(tasks, "layers") for row in measure(*task, args, best)]
    steps = {kernel: seconds(distillation_step(kernel), 10, in_graph=False, inner=1) for kernel in ("torch", "fused")}

    device = torch.cuda.get_device_name()
    print(markdown(rows))
    print(f"{device}: at best {best[0] / 1e12:.0f} TFLOP/s, {best[1] / 1e12:.2f} TB/s; torch {torch.__version__}.")
    print(f"A distillation step of SD 1.5: {1e3 * steps['torch']:.1f} ms, fused {1e3 * steps['fused']:.1f} ms.")
    report = provenance("-m minidistill.bench kernel", argv) | {"device": device}
    report |= {"torch": torch.__version__, "dtype": args.dtype, "repeats": args.repeats, "inner": INNER}
    report |= {"operations_per_second": best[0], "bytes_per_second": best[1], "step_s": steps, "rows": rows}
    write_json(args.out, report)
    print(f"Wrote {args.out}")
