"""How fast an update of the distillation is: the plain loop beside each technique alone, and beside all together.

  python -m minidistill.bench train                              the embedded model's size
  python -m minidistill.bench train --size sd15 --device cuda

The plain loop computes in float32, channels first, attention in separate operations, the teacher in two calls, and
reads every loss as it comes. All ways take turns (A, B, C, A, B, C, ...) in one run, and medians are compared, after
their losses were found to agree.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from minidistill.bench.timing import device_name, timed
from minidistill.bench.workloads import GUIDANCE, SIZES, Setup
from minidistill.data.trajectories import to_device
from minidistill.distill import student, teacher
from minidistill.formats.model_configs import write_json
from minidistill.lora import LoRAModel
from minidistill.training.settings import count, made_by, parse, setting

TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1}  # of a loss, relative; a GPU's float32 is TF32 in convolutions


@dataclass
class Settings:
    size: list[str] = setting(None, "what to measure (default: pocket)", type=str, nargs="+", choices=tuple(SIZES))
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "where to compute")
    rank: int = setting(16, "of the LoRA", type=count)
    repeats: int = setting(None, "turns of each way (default: 10; on a CPU pocket 9, sd15 2)", type=count)
    no_compile: bool = setting(False, "leave out what takes torch.compile, and so minutes before the first turn")
    out: Path = setting(Path("results/bench-train.json"), "where the measurements go as JSON")


@dataclass(frozen=True)
class Way:
    """How an update is computed: plainly, but for these."""

    channels_last: bool = False
    fused_attention: bool = False
    autocast: bool = False  # computes in bfloat16, from weights in float32
    weights: torch.dtype = torch.float32
    ahead: bool = False  # never waits for the GPU: pinned memory, and losses that are read when the turn is over
    batched_teacher: bool = False
    compiled: bool = False
    graphs: bool = False  # in CUDA graphs

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.autocast else self.weights


ALL = Way(
    channels_last=True,
    fused_attention=True,
    weights=torch.bfloat16,
    ahead=True,
    batched_teacher=True,
    compiled=True,
)
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
    "all, not compiled": replace(ALL, compiled=False),
    "all": ALL,
}
METHODS = ("trajectories", "noised")


def ways(method: str, device: torch.device, compiled: bool) -> list[str]:
    """Those that make a difference here."""
    return [
        name
        for name, way in WAYS.items()
        if (compiled or not way.compiled)
        and (device.type == "cuda" or not way.graphs and way != Way(ahead=True))
        and (method == "noised" or way != Way(batched_teacher=True))
    ]


def network(setup: Setup, way: Way) -> LoRAModel:
    """The same numbers for every way, in its dtype and layout. ``setup`` is of float32."""
    weights = setup.weights if way.channels_last else setup.peer_weights
    own = replace(setup, dtype=way.weights)
    own.weights = {name: x.to(way.weights) for name, x in weights.items()}  # the very same where nothing is to change
    return own.lora_unet()


def updates(setup: Setup, way: Way, method: str, number: int) -> Callable[[], Tensor]:
    """A turn: this many updates as in train.py, on batches that wait in the host's memory. Returns their losses."""
    unet = network(setup, way)
    trainable = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0)
    if way.compiled:
        unet = torch.compile(unet, fullgraph=True, dynamic=False, mode="reduce-overhead" if way.graphs else None)
    size, device = setup.size.batch, setup.device
    cond, uncond = (x.to(way.weights) for x in setup.contexts(size))
    t = torch.linspace(999, 1, size).long()
    batches = [(setup.latents(size, seed=10 + i).cpu(), setup.latents(size, seed=5).cpu(), t) for i in range(number)]

    def update(z_t: Tensor, stored: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=way.autocast):
            noised = method == "noised"
            eps_hat = teacher(unet, z_t, t, cond, uncond, GUIDANCE, way.batched_teacher) if noised else stored
            eps = student(unet, z_t, t, cond)
        loss = F.mse_loss(eps, eps_hat)
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def turn() -> Tensor:
        losses = []
        with nullcontext() if way.fused_attention else sdpa_kernel(SDPBackend.MATH):
            for batch in batches:
                if way.graphs:
                    torch.compiler.cudagraph_mark_step_begin()  # what the graphs returned before may be overwritten
                batch = (to_device(x, device) if way.ahead else x.to(device) for x in batch)
                loss = update(*batch)
                losses.append(loss if way.ahead else loss.cpu())
        return torch.stack(losses).cpu()

    return turn


def measure(setup: Setup, repeats: int, number: int, compiled: bool) -> dict[str, dict[str, dict]]:
    """Method -> way -> seconds of an update, beside the plain loop's, and how well the losses agree."""
    names = [(method, name) for method in METHODS for name in ways(method, setup.device, compiled)]
    turns = {key: updates(setup, WAYS[key[1]], key[0], number) for key in names}
    with torch._dynamo.config.patch(recompile_limit=4 * len(names)):  # all of them compile the same lines
        losses = {key: turn() for key, turn in tqdm(turns.items(), "warming up and comparing")}
        differences = {key: (found / losses[key[0], "plain"] - 1).abs().max().item() for key, found in losses.items()}
        for (method, name), difference in differences.items():
            if not difference <= TOLERANCE[WAYS[name].dtype]:  # NaN is no agreement either
                raise ValueError(f"{method}, {name}: the loss differs from the plain loop's by {difference:.1%}.")
        times: dict[tuple[str, str], list[float]] = {key: [] for key in turns}
        for _ in tqdm(range(repeats), "timing"):
            for key, turn in turns.items():
                times[key].append(timed(turn, setup.device) / number)
    seconds = {key: median(taken) for key, taken in times.items()}
    rows: dict[str, dict[str, dict]] = {method: {} for method in METHODS}
    for method, name in names:
        rows[method][name] = {
            "seconds": seconds[method, name],
            "to_plain": seconds[method, name] / seconds[method, "plain"],
            "difference": differences[method, name],
            "turns_s": times[method, name],
        }
    return rows


def markdown(size: str, rows: dict[str, dict[str, dict]]) -> str:
    lines = [
        f"| {size} | from trajectories | of plain | teacher in the loop | of plain |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in WAYS:
        cells = [rows[method].get(name) for method in METHODS]
        if any(cells):
            shown = [(f"{1e3 * row['seconds']:.1f} ms", f"{row['to_plain']:.2f}") if row else ("", "") for row in cells]
            lines.append(f"| {' | '.join([name, *shown[0], *shown[1]])} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    args = parse(Settings, __doc__, argv)
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here: use --device cpu.")
    report = made_by("minidistill.bench.speed", ["train", *argv]) | {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rank": args.rank,
        "guidance": GUIDANCE,
        "sizes": {},
    }
    for name in args.size or ["pocket"]:
        size = SIZES[name]
        repeats, number = args.repeats or (10 if cuda else size.cpu_repeats), 5 if cuda else 1
        setup = Setup(size, device, torch.float32, args.rank, timed_steps=1)
        rows = measure(setup, repeats, number, not args.no_compile)
        report["sizes"][name] = {"batch": size.batch, "repeats": repeats, "updates": number, "methods": rows}
        print(f"\n{markdown(name, rows)}\n", flush=True)
        turns = f"{repeats} interleaved turns of {number} update{'s' if number > 1 else ''}"
        print(f"Time of an update on a batch of {size.batch}, medians of {turns}.")
    print(f"{report['device']}, {report['threads']} threads, rank {args.rank}; torch {report['torch']}")
    write_json(args.out, report)
    print(f"Wrote {args.out}")
