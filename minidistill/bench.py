"""How fast, and how much memory: this code beside diffusers and peft, on the same random weights, in one run.

  python -m minidistill.bench                         both sizes; on two CPU cores some minutes
  python -m minidistill.bench --size pocket --memory
  python -m minidistill.bench --size sd15 --device cuda --dtype bfloat16
  python -m minidistill.bench kernel                  LoRA layers alone, on a GPU (bench_kernel)

The contestants take turns (A, B, A, B, ...) and medians are compared, after ours and the peers' outputs were found to
agree. Without diffusers and peft, ours stands alone. How fast a checkpoint loads is measured by bench_load.
"""

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from minidistill import bench_kernel
from minidistill.config import POCKET_UNET, POCKET_VAE, SD15_UNET, SD15_VAE, ScheduleConfig, UNetConfig, VAEConfig
from minidistill.distill import student, teacher
from minidistill.guidance import guided_noise
from minidistill.layout import write_json
from minidistill.lora import LoRAModel, inject_lora, lora_layers, merge_lora
from minidistill.peers import peer_guided_picture, peer_lora, peer_unet
from minidistill.schedule import Schedule, ddim_sample
from minidistill.settings import parse, setting
from minidistill.unet import UNet
from minidistill.vae import VAE

GUIDANCE = 7.5
# How far apart the outputs of right implementations may lie, relative to the largest value.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True)
class Size:
    unet: UNetConfig
    vae: VAEConfig
    tokens: int  # of a prompt
    steps: int  # DDIM steps of a picture
    batch: int  # of a distillation step; pictures are drawn one by one
    cpu_steps: int  # how many of a picture's steps are timed on a CPU
    cpu_repeats: int


SIZES = {
    "pocket": Size(POCKET_UNET, POCKET_VAE, tokens=16, steps=25, batch=16, cpu_steps=25, cpu_repeats=9),
    "sd15": Size(SD15_UNET, SD15_VAE, tokens=77, steps=50, batch=1, cpu_steps=1, cpu_repeats=2),
}


@dataclass
class Settings:
    size: list[str] = setting(None, "what to measure (default: both)", type=str, nargs="+", choices=tuple(SIZES))
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "where to compute")
    dtype: str = setting("float32", "of the weights", choices=("float32", "bfloat16", "float16"))
    rank: int = setting(16, "of the LoRA")
    repeats: int = setting(None, "turns of each contestant (default: 10; on a CPU pocket 9, sd15 2)", type=int)
    memory: bool = setting(False, "measure peak memory too, each contestant in a process of its own")
    out: Path = setting(Path("results/bench.json"), "where the measurements go as JSON")
    row: str = setting(None, "only print one contestant's peak bytes (unet/ours, unet/peer, ...): what --memory runs")


@dataclass
class Setup:
    """Weights and inputs of one size, from seeds: ours, the peers' and another process's are the same numbers."""

    size: Size
    device: torch.device
    dtype: torch.dtype
    rank: int
    timed_steps: int
    kernel: str = "auto"  # of the LoRA

    def randn(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)

    def latents(self, batch: int, seed: int = 1) -> Tensor:
        side = self.size.unet.sample_size
        return self.randn(batch, self.size.unet.in_channels, side, side, seed=seed)

    def contexts(self, batch: int) -> tuple[Tensor, Tensor]:
        """In place of the embeddings of prompts and of the empty prompt, each [B, L, D]."""
        shape = (batch, self.size.tokens, self.size.unet.context_width)
        return self.randn(*shape, seed=2), self.randn(*shape, seed=3)

    def random_weights(self, make: Callable[[], nn.Module], layout: torch.memory_format) -> dict[str, Tensor]:
        """Matrices that keep the variance; norms near 1 and biases near 0, but not there."""
        with torch.device("meta"):
            shapes = {name: x.shape for name, x in make().state_dict().items()}
        weights = {}
        for seed, (name, shape) in enumerate(shapes.items()):
            x = self.randn(*shape, seed=seed).mul_(shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.1)
            x.add_(1 if len(shape) == 1 and name.endswith("weight") else 0)
            weights[name] = x.contiguous(memory_format=layout) if len(shape) == 4 else x
        return weights

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return self.random_weights(lambda: UNet(self.size.unet), torch.channels_last)  # as load() converts them

    @cached_property
    def peer_weights(self) -> dict[str, Tensor]:
        return self.random_weights(lambda: UNet(self.size.unet), torch.contiguous_format)  # as from_pretrained() does

    def unet(self) -> UNet:
        return filled(lambda: UNet(self.size.unet), self.weights)

    def lora_unet(self, zero: bool = False) -> LoRAModel:
        unet = inject_lora(self.unet(), self.rank, kernel=self.kernel)  # lora_up is zero
        if not zero:
            fill_pairs({name: (layer.lora_down, layer.lora_up) for name, layer in lora_layers(unet).items()})
        return unet

    def peer_unet(self) -> nn.Module:
        return peer_unet(self.size.unet, self.peer_weights)

    def peer_lora_unet(self) -> nn.Module:
        with torch.device("meta"):
            names = list(lora_layers(inject_lora(UNet(self.size.unet), self.rank)))
        unet = self.peer_unet()
        fill_pairs(peer_lora(unet, self.rank, names))
        return unet


def filled(make: Callable[[], nn.Module], weights: dict[str, Tensor]) -> nn.Module:
    """A frozen module of these very tensors, not of copies."""
    with torch.device("meta"):
        module = make()
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)


@torch.no_grad()
def fill_pairs(pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    """The same random LoRA for all models whose layers have the same names."""
    generator = torch.Generator(next(iter(pairs.values()))[0].device).manual_seed(4)
    for _, (down, up) in sorted(pairs.items()):
        down.normal_(std=down[0].numel() ** -0.5, generator=generator)
        up.normal_(std=0.1, generator=generator)


# The contestants. Each function below returns one: a function to be timed, whose results can be compared.
Contestant = Callable[[], tuple[Tensor, ...]]


def peer_call(unet: nn.Module, z_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
    return unet(z_t, t, context, return_dict=False)[0]


def forward(setup: Setup, who: str) -> Contestant:
    model = setup.unet() if who == "ours" else partial(peer_call, setup.peer_unet())
    inputs = setup.latents(1), torch.tensor([621], device=setup.device), setup.contexts(1)[0]
    return torch.no_grad()(lambda: (model(*inputs),))


def decode(setup: Setup, who: str) -> Contestant:
    weights = setup.random_weights(lambda: VAE(setup.size.vae), torch.channels_last)
    vae = filled(lambda: VAE(setup.size.vae), weights)
    z = setup.latents(1)
    return torch.no_grad()(lambda: (vae.decode(z),))


def picture(setup: Setup, who: str, how: str) -> Contestant:
    """The first ``timed_steps`` of a picture: the latents after each."""
    if who == "peer":
        size = setup.size
        return peer_guided_picture(
            setup.peer_unet(), setup.latents(1), setup.contexts(1), GUIDANCE, size.steps, setup.timed_steps
        )
    cond, uncond = setup.contexts(1)
    unet = setup.unet() if how == "guided" else setup.lora_unet(zero=how == "merged")
    if how == "merged":
        merge_lora(unet)  # of zeros: the shared weights keep every bit, and the time is that of any merged LoRA

    def model(z_t: Tensor, t: Tensor) -> Tensor:
        if how == "guided":
            return guided_noise(unet, z_t, t, cond, uncond, GUIDANCE)
        return unet(z_t, t, cond, lora_enabled=True)

    schedule, z_T = Schedule.from_config(ScheduleConfig()), setup.latents(1)
    return lambda: tuple(islice(ddim_sample(model, schedule, z_T, setup.size.steps), setup.timed_steps))


def distil(setup: Setup, who: str, teacher_in_loop: bool) -> Contestant:
    """One update as in train.py, towards a stored prediction of the teacher's or one made in the step."""
    batch = setup.size.batch
    z_t, stored, (cond, uncond) = setup.latents(batch), setup.latents(batch, seed=5), setup.contexts(batch)
    t = torch.linspace(999, 1, batch, device=setup.device).long()
    unet = setup.lora_unet() if who == "ours" else setup.peer_lora_unet()
    trainable = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0)

    def ask_teacher() -> Tensor:
        if who == "ours":
            return teacher(unet, z_t, t, cond, uncond, GUIDANCE)
        unet.disable_adapters()
        with torch.no_grad():
            eps_hat = guided_noise(partial(peer_call, unet), z_t, t, cond, uncond, GUIDANCE)
        unet.enable_adapters()
        return eps_hat

    def step() -> tuple[Tensor, Tensor]:
        eps_hat = ask_teacher() if teacher_in_loop else stored
        eps = student(unet, z_t, t, cond) if who == "ours" else peer_call(unet, z_t, t, cond)
        loss = F.mse_loss(eps.float(), eps_hat.float())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), norm

    return step


def sd15_step(kernel: str) -> Contestant:
    setup = Setup(SIZES["sd15"], torch.device("cuda"), torch.bfloat16, rank=16, timed_steps=1, kernel=kernel)
    return distil(setup, "ours", teacher_in_loop=False)


class Row(NamedTuple):
    label: str
    calls: int  # of the UNet; of a picture, a step
    make: Callable[[Setup, str], Contestant]


ROWS = {
    "unet": Row("UNet forward", 1, forward),
    "decode": Row("VAE decoder", 0, decode),
    "guided": Row("guided picture", 2, partial(picture, how="guided")),
    "merged": Row("one-pass picture, LoRA merged", 1, partial(picture, how="merged")),
    "unmerged": Row("one-pass picture, LoRA beside", 1, partial(picture, how="unmerged")),
    "trajectories": Row("distillation step, trajectories", 1, partial(distil, teacher_in_loop=False)),
    "noised": Row("distillation step, teacher in the loop", 3, partial(distil, teacher_in_loop=True)),
}
PICTURES = ("guided", "merged", "unmerged")
WITH_PEER = ("unet", "guided", "trajectories", "noised")
PEERS = ("diffusers", "peft")


def contestants() -> list[tuple[str, str]]:
    """(row, "ours") and, where there is one and its packages are installed, (row, "peer")."""
    rows_with_peer = WITH_PEER if all(map(find_spec, PEERS)) else ()
    return [(row, who) for row in ROWS for who in ("ours", "peer") if who == "ours" or row in rows_with_peer]


def check_agreement(outputs: dict[tuple[str, str], tuple[Tensor, ...]], tolerance: float) -> dict[str, float]:
    """Row -> the largest difference between ours and the peer's, relative to the largest value. Raises ValueError."""
    differences = {}
    for row in [row for row, who in outputs if who == "peer"]:
        pairs = zip(outputs[row, "ours"], outputs[row, "peer"], strict=True)
        errors = [(ours - peer).abs().max() / peer.abs().max() for ours, peer in pairs]
        differences[row] = torch.stack(errors).max().item()
        if not differences[row] <= tolerance:  # NaN is no agreement either
            raise ValueError(f"{row}: ours and the peer's differ by {differences[row]:.1e} of the largest value.")
    return differences


def timed(run: Contestant, device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def measure(setup: Setup, repeats: int) -> dict[str, dict]:
    """Row -> seconds of ours and of the peer, their ratio, and how well the two agree."""
    runs = {(row, who): ROWS[row].make(setup, who) for row, who in contestants()}
    tf32 = setup.device.type == "cuda" and setup.dtype == torch.float32  # its convolutions are as precise as float16
    outputs = {key: run() for key, run in tqdm(runs.items(), "warming up and comparing")}
    differences = check_agreement(outputs, TOLERANCE[torch.float16 if tf32 else setup.dtype])
    del outputs

    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in tqdm(range(repeats), "timing"):
        for key, run in runs.items():
            times[key].append(timed(run, setup.device))

    seconds = {key: median(values) for key, values in times.items()}
    for row, who in seconds:
        if row in PICTURES:
            seconds[row, who] *= setup.size.steps / setup.timed_steps
            seconds[row, who] += seconds["decode", "ours"]
    rows = {}
    for name, (label, calls, _) in ROWS.items():
        ours, peer = seconds[name, "ours"], seconds.get((name, "peer"))
        rows[name] = {
            "label": label,
            "calls": calls * (setup.size.steps if name in PICTURES else 1),
            "ours_s": ours,
            "peer_s": peer,
            "ours_to_peer": ours / peer if peer else None,
            "to_guided": ours / seconds["guided", "ours"] if name in PICTURES else None,
            "difference": differences.get(name),
            "turns_s": {who: turns for (row, who), turns in times.items() if row == name},
        }
    return rows


def resident(field: str) -> int:
    """Bytes this process holds ("VmRSS") or held at most ("VmHWM"); getrusage's peak would begin at its parent's."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def peak_bytes(make: Callable[[], Callable[[], object]], device: torch.device) -> int:
    """Peak bytes of making something and running it twice, beyond what this process holds before."""
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    run = make()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    run(), run()  # the second update has AdamW's state beside it
    return (torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - before


def peak_memory(setup: Setup, row: str, who: str) -> int:
    """Peak bytes of one contestant in a fresh process, weights included, Python and its packages not."""
    for package in PEERS if who == "peer" else ():
        import_module(package)
    return peak_bytes(lambda: ROWS[row].make(setup, who), setup.device)


def printed_elsewhere(module: str, flags: list[str], **environment: str) -> int:
    """The number that ``python -m module`` prints, in a process of its own."""
    command = [sys.executable, "-m", module, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise ValueError(f"{module} {shlex.join(flags)} could not be measured:\n{done.stderr}")
    return int(done.stdout)


def peak_memory_elsewhere(args: Settings, size: str, row: str, who: str) -> int:
    flags = ["--row", f"{row}/{who}", "--size", size, "--device", args.device, "--dtype", args.dtype]
    return printed_elsewhere("minidistill.bench", [*flags, "--rank", str(args.rank)])


def markdown(size: str, result: dict) -> str:
    """A table without the columns that nothing was measured for, and how to read it."""

    def seconds(s: float) -> str:
        return f"{s:.2f} s" if s >= 1 else f"{s * 1e3:.1f} ms"

    formats = {
        size: ("label", str),
        "UNet calls": ("calls", str),
        "ours": ("ours_s", seconds),
        "peer": ("peer_s", seconds),
        "ours / peer": ("ours_to_peer", "{:.2f}".format),
        "of guided": ("to_guided", "{:.2f}".format),
        "ours, peak MB": ("ours_bytes", lambda n: f"{n / 1e6:,.0f}"),
        "peer, peak MB": ("peer_bytes", lambda n: f"{n / 1e6:,.0f}"),
    }
    rows = list(result["rows"].values())
    shown = {title: f for title, f in formats.items() if any(row.get(f[0]) is not None for row in rows)}
    lines = [list(shown), ["---"] * len(shown)]
    lines += [["" if row.get(key) is None else show(row[key]) for key, show in shown.values()] for row in rows]

    steps, timed_steps = result["steps"], result["timed_steps"]
    how = "all timed" if steps == timed_steps else f"{timed_steps} timed, times {steps / timed_steps:g}"
    text = f"Medians of {result['repeats']} interleaved turns. A picture is {steps} DDIM steps ({how}) and our decoder;"
    text += f" a distillation step is on a batch of {result['batch']}."
    if "peer" in shown:
        worst = max(row["difference"] for row in rows if row["difference"] is not None)
        text += " Peer: diffusers, which guides in one call on a batch of two, and peft for distillation."
        text += f" Its outputs differ from ours by at most {worst:.0e} of the largest value."
    else:
        text += f" No peer beside ours: {' and '.join(PEERS)} are not both installed."
    if "ours, peak MB" in shown:
        text += " Peak memory: weights included, Python and its packages not; a picture's without the decoder."
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{text}\n"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return models[0].split(": ")[1] if models else platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["kernel"]:
        return bench_kernel.main(argv[1:], sd15_step)
    args = parse(Settings, __doc__, argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    cuda = device.type == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here: use --device cpu.")
    if args.repeats is not None and args.repeats < 1:
        raise ValueError(f"--repeats is 1 or more, not {args.repeats}.")
    sizes = args.size or list(SIZES)
    if args.row:
        key = tuple(args.row.split("/"))
        if key not in contestants() or len(sizes) > 1:
            raise ValueError(f"--row takes one --size and one of {', '.join(map('/'.join, contestants()))}.")
        print(peak_memory(Setup(SIZES[sizes[0]], device, dtype, args.rank, timed_steps=1), *key))
        return

    report = {
        "command": shlex.join(["python", "-m", "minidistill.bench", *argv]),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "rank": args.rank,
        "guidance": GUIDANCE,
        "versions": {package: version(package) for package in ("torch", *PEERS) if find_spec(package)},
        "sizes": {},
    }
    for name in sizes:
        size = SIZES[name]
        repeats, steps = args.repeats or (10 if cuda else size.cpu_repeats), size.steps if cuda else size.cpu_steps
        rows = measure(Setup(size, device, dtype, args.rank, steps), repeats)
        for row, who in tqdm(contestants(), "peak memory") if args.memory else ():
            rows[row][f"{who}_bytes"] = peak_memory_elsewhere(args, name, row, who)
        counts = {"steps": size.steps, "timed_steps": steps, "batch": size.batch, "repeats": repeats}
        report["sizes"][name] = counts | {"rows": rows}
        print(f"\n{markdown(name, report['sizes'][name])}", flush=True)
    versions = ", ".join(map(" ".join, report["versions"].items()))
    print(f"{report['device']}, {report['threads']} threads, {args.dtype}, rank {args.rank}; {versions}")
    write_json(args.out, report)
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"bench: {error}")
