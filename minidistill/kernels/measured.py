"""From the benchmark's measurements to the table in dispatch.py: what that chooses, what it loses, what it should say.

A row is one of bench_kernel: a layer's M, K, N and rank, which pass, whether in a CUDA graph, and the seconds of each
way to compute it. "base" and "r = 0", cuBLAS and the fused kernel without a pair, are no such ways.
"""

from itertools import product
from statistics import mean

from minidistill.kernels.dispatch import Region

WITHOUT_PAIR = ("base", "r = 0")
ENOUGH = 0.97  # of the speed of the better of the two that the dispatcher chooses from


def chosen(region: Region | None, row: dict) -> str:
    """What ``--kernel auto`` takes; where the table has no region, lora.py's own lines."""
    if region is None:
        return "eager"
    return "fused" if region.holds(row["K"], row["N"], row["rank"]) else "addmm"


def share(region: Region | None, row: dict) -> float:
    """The speed of what is chosen, of that of the faster of the fused kernel and the addmm chain."""
    seconds = row["seconds"]
    return min(seconds["fused"], seconds["addmm"]) / seconds[chosen(region, row)]


def best_region(rows: list[dict]) -> Region:
    """The region whose choices are the fastest on average, of those that are always fast enough, if any is."""
    sizes = [sorted({row[name] for row in rows}) for name in Region._fields]
    regions = [Region(0, 0, 0), *(Region(*corner) for corner in product(*sizes))]

    def merit(region: Region) -> tuple[float, float]:
        shares = [share(region, row) for row in rows]
        return min(*shares, ENOUGH), mean(shares)

    return max(regions, key=merit)


def fastest(row: dict) -> str:
    ways = {name: time for name, time in row["seconds"].items() if name not in WITHOUT_PAIR}
    return min(ways, key=ways.get)


def standing(row: dict) -> float:
    """The fused kernel's speed, of that of the fastest way: 1 where it is that."""
    return row["seconds"][fastest(row)] / row["seconds"]["fused"]


def launched(in_graph: bool) -> str:
    return "in a CUDA graph" if in_graph else "launched one by one"


def layer_of(row: dict) -> str:
    return f"{row['M']} x {row['K']} -> {row['N']}"


def label(row: dict) -> str:
    return f"{layer_of(row)}, rank {row['rank']}, {row['pass']}, {launched(row['graph'])}"


def large(row: dict) -> bool:
    """Arithmetic is what takes the time."""
    return row["M"] * row["K"] * row["N"] >= 4096 * 1280 * 1280


def small(row: dict) -> bool:
    """Launches and bytes do."""
    return row["rank"] == 16 and max(row["K"], row["N"]) <= 640


TARGETS = [  # in such rows this way is to be, compared to that, so many times as fast
    (large, "forward", True, "r = 0", "base", 0.8),
    (small, "forward", True, "fused", "base", 1 / 1.5),
    (small, "forward", False, "fused", "eager", 3),
    (small, "forward", False, "fused", "addmm", 2),
    (small, "forward", False, "fused", "merge", 1.3),
    (small, "forward and backward", False, "fused", "addmm", 1.4),
]


def verdict(rows: list[dict], region: Region | None, capability: tuple[int, int]) -> str:
    """In words: the targets, the worst choice by the table's region and by the best, and every row the kernel loses."""
    text = ""
    for size, which, in_graph, way, other, least in TARGETS:
        such = [row["seconds"] for row in rows if size(row) and row["pass"] == which and row["graph"] == in_graph]
        if such:
            worst = min(seconds[other] / seconds[way] for seconds in such)
            text += f"{way}, {size.__name__} layers, {which}, {launched(in_graph)}: "
            text += f"at worst {worst:.2f} times as fast as {other}; the target is {least:.2f}: "
            text += "met.\n" if worst >= least else "missed.\n"

    def at_worst(region: Region | None) -> str:
        row = min(rows, key=lambda row: share(region, row))
        return f"at worst {share(region, row):.2f} of the faster of fused and addmm ({label(row)})"

    best = best_region(rows)
    text += f"--kernel auto, by {region or 'no region, plain PyTorch'}: {at_worst(region)}.\n"
    text += f"The best line for dispatch.FASTER, {capability}: {best}: {at_worst(best)}.\n"

    lost = sorted((row for row in rows if standing(row) < 1), key=standing)
    text += f"The fused kernel is not the fastest in {len(lost)} of {len(rows)} rows:\n"
    return text + "".join(f"  {standing(row):.2f} of {fastest(row)}: {label(row)}\n" for row in lost)
