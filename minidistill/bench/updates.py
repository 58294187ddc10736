"""How fast a training step is: the plain loop, each technique alone, and all of them together.

  python -m minidistill.bench updates                              the emoji model's size
  python -m minidistill.bench updates --size sd15 --device cuda

The plain loop computes in float32 with channels first and attention in separate operations; it calls the teacher twice
and reads every loss at once. Nothing is timed before all losses agree. Then the techniques take turns (A, B, C, A, B,
C, ...), and medians are compared.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minidistill.bench.output import add_out_flag, device_name, find_device, new_report, save_report
from minidistill.bench.timing import take_turns
from minidistill.bench.workloads import GUIDANCE, SIZES, Setup, Update, attention
from minidistill.data.examples import to_device
from minidistill.evaluate.tables import markdown_table
from minidistill.guidance import interval_noise
from minidistill.lora import LoRAModel
from minidistill.training.command_line import DEFAULT_DEVICE, positive_int

# Relative differences of a loss. Convolutions in float32 use TF32 on a GPU.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1}


def add_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--size", nargs="+", choices=SIZES, default=["pocket"], help="which networks (default: pocket)")
    add("--device", default=DEFAULT_DEVICE, help="where to compute (default: %(default)s)")
    add("--rank", type=positive_int, default=16, metavar="N", help="rank of the LoRA (default: %(default)s)")
    add("--repeats", type=positive_int, metavar="N", help="turns of each way (default: 10; on a CPU pocket 9, sd15 2)")
    add("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes at first")
    add_out_flag(parser, "results/bench-train.json")


@dataclass(frozen=True)
class Way:
    """How a training step is computed. The defaults are the plain loop."""

    channels_last: bool = False
    fused_attention: bool = False
    autocast: bool = False  # computes in bfloat16 from float32 weights
    weights: torch.dtype = torch.float32
    ahead: bool = False  # never waits for the GPU: pinned memory, and losses are read at the end of the turn
    batched_teacher: bool = False
    compiled: bool = False
    graphs: bool = False  # compiled into CUDA graphs

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.autocast else self.weights


ALL = Way(channels_last=True, fused_attention=True, weights=torch.bfloat16, ahead=True, batched_teacher=True)
WAYS = {
    "plain": Way(),
    "channels last": Way(channels_last=True),
    "fused attention": Way(fused_attention=True),
    "bfloat16 by autocast": Way(autocast=True),
    "bfloat16 weights": Way(weights=torch.bfloat16),
    "never waiting for the GPU": Way(ahead=True),
    "teacher in one call": Way(batched_teacher=True),
    "compiled": Way(compiled=True),
    "compiled, in CUDA graphs": Way(compiled=True, graphs=True),
    "all, not compiled": ALL,
    "all": replace(ALL, compiled=True),
}
METHODS = {"trajectories": "from trajectories", "noised": "teacher in the loop"}


def ways(method: str, device: torch.device, compiled: bool) -> list[str]:
    """Names of the ways that make a difference for this method on this device."""
    return [
        name
        for name, way in WAYS.items()
        if (compiled or not way.compiled)
        and (device.type == "cuda" or not way.graphs and way != Way(ahead=True))
        and (method == "noised" or way != Way(batched_teacher=True))
    ]


def network(setup: Setup, way: Way) -> LoRAModel:
    """The float32 weights of ``setup`` in the dtype and memory layout of ``way``."""
    weights = setup.weights if way.channels_last else setup.peer_weights
    converted = replace(setup, dtype=way.weights)
    converted.weights = {name: x.to(way.weights) for name, x in weights.items()}  # no copies where nothing changes
    return converted.lora_unet()


def updates(setup: Setup, way: Way, method: str, number: int) -> Callable[[], Tensor]:
    """A turn: ``number`` updates as in train.py, on batches that wait in the host's memory. It returns their losses."""
    unet, device, (_, t, cond, uncond, target) = network(setup, way), setup.device, setup.inputs()
    cond, uncond = cond.to(way.weights), uncond.to(way.weights)
    latents = [setup.latents(len(t), seed=10 + i) for i in range(number)]
    batches = [tuple(x.cpu() for x in (z_t, target, t)) for z_t in latents]
    model = unet
    if way.compiled:
        model = torch.compile(unet, fullgraph=True, dynamic=False, mode="reduce-overhead" if way.graphs else None)

    frozen = partial(model, lora_enabled=False)

    def loss(z_t: Tensor, stored: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=way.autocast):
            eps_hat = stored
            if method == "noised":
                with torch.no_grad():
                    eps_hat = interval_noise(frozen, z_t, t, cond, uncond, GUIDANCE, batched=way.batched_teacher)
            eps = model(z_t, t, cond, lora_enabled=True)
        return F.mse_loss(eps, eps_hat)

    update = Update([unet], loss)

    def turn() -> Tensor:
        losses = []
        with attention(way.fused_attention):
            for batch in batches:
                if way.graphs:
                    torch.compiler.cudagraph_mark_step_begin()  # the results of earlier graphs may be overwritten
                value, _ = update(*(to_device(x, device) if way.ahead else x.to(device) for x in batch))
                losses.append(value if way.ahead else value.cpu())
        return torch.stack(losses).cpu()

    return turn


def measure(setup: Setup, repeats: int, number: int, compiled: bool) -> dict[str, dict[str, dict]]:
    """Method -> way -> seconds of an update, their ratio to the plain loop's, and how far the losses differ."""
    names = [(method, name) for method in METHODS for name in ways(method, setup.device, compiled)]
    turns = {(method, name): updates(setup, WAYS[name], method, number) for method, name in names}
    with torch._dynamo.config.patch(recompile_limit=4 * len(names)):  # all of them compile the same lines
        losses = {key: turn() for key, turn in tqdm(turns.items(), "warming up and comparing")}
        differences = {key: (loss / losses[key[0], "plain"] - 1).abs().max().item() for key, loss in losses.items()}
        for (method, name), difference in differences.items():
            if not difference <= TOLERANCE[WAYS[name].dtype]:  # also refuses NaN
                raise ValueError(f"{method}, {name}: the loss differs from the plain loop's by {difference:.1%}.")
        times = take_turns(turns, repeats, setup.device)
    rows: dict[str, dict[str, dict]] = {method: {} for method in METHODS}
    for method, name in names:
        each = [seconds / number for seconds in times[method, name]]
        rows[method][name] = {"seconds": median(each), "difference": differences[method, name], "turns_s": each}
        rows[method][name]["to_plain"] = median(each) / rows[method]["plain"]["seconds"]
    return rows


def markdown(size: str, rows: dict[str, dict[str, dict]]) -> str:
    """Milliseconds of an update, and their ratio to the plain loop's."""
    lines = [[size, *(title for method in METHODS.values() for title in (method, "/ plain"))]]
    for name in WAYS:
        cells = [rows[method].get(name) for method in METHODS]
        if any(cells):
            texts = [(f"{1e3 * row['seconds']:.1f} ms", f"{row['to_plain']:.2f}") if row else ("", "") for row in cells]
            lines.append([name, *texts[0], *texts[1]])
    return markdown_table(lines)


def run(args: Namespace) -> None:
    device = find_device(args.device)
    cuda = device.type == "cuda"
    report = new_report(args, device_name(device), rank=args.rank, guidance=GUIDANCE, sizes={})
    for name in args.size:
        size = SIZES[name]
        repeats, number = args.repeats or (10 if cuda else size.cpu_repeats), 5 if cuda else 1
        rows = measure(Setup(size, device, torch.float32, args.rank), repeats, number, not args.no_compile)
        report["sizes"][name] = {"batch": size.batch, "repeats": repeats, "updates": number, "methods": rows}
        print(f"\n{markdown(name, rows)}\n")
        turns = f"{repeats} interleaved turns of {number} update{'s' if number > 1 else ''}"
        print(f"Time of an update on a batch of {size.batch}, medians of {turns}.", flush=True)
        save_report(report, args.out)
    print(f"{report['device']}, {report['threads']} threads, rank {args.rank}; torch {report['torch']}")
