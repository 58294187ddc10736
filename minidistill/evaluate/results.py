"""What an evaluation leaves to look at: a table, pictures side by side, the error at each time step."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from minidistill.bench.timing import markdown_table
from minidistill.evaluate.drawing import Drawn, comparison_grid
from minidistill.evaluate.metrics import ErrorShare, Interval, with_interval
from minidistill.formats.files import written_whole
from minidistill.formats.model_configs import write_json

Row = dict[str, Interval]  # what was measured of one method


def write_results(
    out: Path,
    drawn: Sequence[Drawn],
    rows: Mapping[str, Row],
    shares: Mapping[str, Mapping[str, ErrorShare]],
    timesteps: Sequence[int],
    made: Mapping[str, str],
    prompts: Sequence[str],
    each: int,
) -> None:
    """results.json, with the error ``shares`` of students at each step; table.md; and pictures.png: a row a method,
    the first picture of some of the prompts.
    """
    cost = {one.method: dict(method=one.method, unet_calls=one.unet_calls, seconds=one.seconds) for one in drawn}
    found = [cost[method] | {name: x._asdict() for name, x in row.items()} for method, row in rows.items()]
    by_step = {
        method: {name: share.per_step.tolist() for name, share in both.items()} for method, both in shares.items()
    }
    counts = dict(prompts=len(prompts), each=each)
    write_json(out / "results.json", {**made, **counts, "rows": found, "t": list(timesteps), "by step": by_step})
    with written_whole(out / "table.md") as beside:
        beside.write_text(f"{markdown(drawn, rows)}\n\n`{made['command']}`\n", encoding="utf-8")
    with written_whole(out / "pictures.png") as beside:
        comparison_grid([replace(one, images=one.images[::each]) for one in drawn], prompts).save(beside, "png")


FORMATS = {"noise error share": "{:.3f}", "on noised latents": "{:.3f}", "PSNR": "{:.1f} dB", "SSIM": "{:.3f}"}
FORMATS |= {"CLIP score": "{:.1f}", "CLIP similarity": "{:.1f}"}
FORMATS |= {"Fréchet to teacher": "{:.4f}", "Fréchet to rendered": "{:.4f}"}  # any other measure is a percentage


def markdown(drawn: Sequence[Drawn], rows: Mapping[str, Row]) -> str:
    """A line a method; each value with its 95% interval."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["", "UNet calls", *names], ["---", "---:", *["---:"] * len(names)]]
    for one in drawn:
        cells = [one.method, str(one.unet_calls)]
        for name in names:
            found = rows[one.method].get(name)
            cells.append(with_interval(found._asdict(), FORMATS.get(name, "{:.1%}")) if found else "")
        lines.append(cells)
    return markdown_table(lines)


def plot_shares(shares: Mapping[str, ErrorShare], timesteps: Sequence[int], path: Path) -> None:
    """The noise error share at each time step, one line a student; the guidance gap behind, in grey."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    looks = cycle(["o-", "s--", "^:", "D-."])  # told apart without colours too
    for (label, found), look in zip(shares.items(), looks):
        axes.plot(timesteps, found.per_step, look, markersize=4, label=f"{label} ({found.pooled:.2f} pooled)")
    gaps = next(iter(shares.values())).gaps.sum(0)
    behind = axes.twinx()
    behind.fill_between(timesteps, gaps / gaps.sum(), color="0.9", zorder=0)
    behind.set(ylim=(0, None), ylabel="part of the squared guidance gap")
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.set(xlabel="time step t", ylabel="noise error share", ylim=(0, None))
    axes.invert_xaxis()  # from noise to picture
    axes.legend()
    figure.savefig(path, format="png", dpi=120)
