"""Teacher, its cheaper variants and students, measured on the same prompts and from the same noise.

  python -m minidistill.evaluate runs/NAME [runs/OTHER ...] --prompts held-out
  python -m minidistill.evaluate runs/pocket-emoji --judge minidistill.pocket.judge

Writes a table (Markdown and JSON), pictures side by side and the noise error by time step. The pictures of each method
are kept, so that an interrupted evaluation goes on with the method it stopped in. A LoRA as FILE:SCALE, the dial, is
compared with a teacher of guidance 1 + SCALE (s - 1).
"""

import importlib
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import CLIPTokenizer

from minidistill.checkpoint import read_checkpoint
from minidistill.data import fingerprint, prompt_split, spread
from minidistill.distill import FullStudent
from minidistill.evaluate.drawing import Drawn, comparison_grid, draw
from minidistill.evaluate.metrics import (
    ClipScore,
    ErrorShare,
    Interval,
    frechet_distance,
    interval,
    noise_error_share,
    pixels,
    psnr,
    resampled,
    ssim,
)
from minidistill.files import digest, written_whole
from minidistill.folder import STEMS, read_weights
from minidistill.layout import write_json
from minidistill.lora import merge_lora
from minidistill.lora_files import inject_file
from minidistill.lora_formats import read_run
from minidistill.pipeline import StableDiffusion, load, place
from minidistill.prompts import read_prompts
from minidistill.settings import ModelSettings, ScaledFile, count, one_sentence, parse, setting, share
from minidistill.tensor_files import read_tensors
from minidistill.unet import UNet

Row = dict[str, Interval]  # what was measured of one method


@dataclass
class Settings(ModelSettings):
    runs: list[ScaledFile] = setting(
        ...,
        "students: folders of runs, or LoRA files",
        "what",
        nargs="*",
        type=ScaledFile.parse,
        metavar="RUN_OR_LORA[:SCALE]",
    )
    prompts: str = setting("held-out", 'a text file, one prompt a line, or "held-out"', "what")
    pictures: int = setting(1000, "pictures of each method, as many of each prompt", "what", type=count)
    guidance: float = setting(None, "the teacher's scale (default: what was learned, else 2.5)", "what", type=float)
    selective: list[float] = setting(
        None,
        "also the teacher without guidance on this share of the steps, the last ones",
        "what",
        nargs="+",
        type=share,
    )
    clip: str = setting(None, "a CLIP, as folder or hub id (default: the model's own, if any)", "how", type=str)
    judge: str = setting(None, "a module with measures for this model's pictures", "how", type=str)
    steps: int = setting(25, "DDIM steps", "how", type=count)
    batch: int = setting(32, "pictures drawn at once", "how", type=count)
    out: Path = setting(Path("runs/evaluation"), "folder for the results", "how")


def main(argv: list[str] | None = None) -> None:
    args = parse(Settings, __doc__, argv)
    students = read_students(args)
    guidance, negative_prompt = one_teacher(students, args.guidance)
    prompts = prompt_split(args.model)[1] if args.prompts == "held-out" else read_prompts(args.prompts)
    prompts = spread(prompts, args.pictures)
    each = -(-args.pictures // len(prompts))
    shown = [prompt for prompt in prompts for _ in range(each)]
    options = dict(steps=args.steps, guidance=guidance, negative_prompt=negative_prompt, batch=args.batch)
    print(f"{len(prompts)} prompts, {each} pictures of each, guidance {guidance:g}, {args.steps} DDIM steps")

    sd = load(args.model, **args.load_options())
    clip, judge = read_clip(sd, args.clip), read_judge(args.judge)
    truth = judge.rendered(shown, sd.unet_config.sample_size * sd.vae.config.factor) if judge else None
    stamp = options | {
        "networks": [fingerprint(part) for part in (sd.unet, sd.vae, sd.text_encoder)],
        "prediction": sd.schedule.prediction,
        "tokenizer": str(sd.tokenizer_folder),
        "where": f"{args.device} {args.dtype}",
    }

    def pictures(sd: StableDiffusion, method: str, label: str, **how: object) -> Drawn:
        def make() -> dict[str, Tensor]:
            drawn = draw(sd, method, shown, selective=how.get("selective", 0.0), progress=True, **options)
            cost = dict(unet_calls=torch.tensor(drawn.unet_calls), seconds=torch.tensor(drawn.seconds))
            return dict(pictures=pixels(drawn.images), **cost)

        made_with = dict(stamp, prompts=digest("\n".join(shown).encode()), method=method, **how)
        found = kept(args.out / "kept" / f"{label} pictures.safetensors", made_with, make)
        images = [Image.fromarray(picture) for picture in found["pictures"].permute(0, 2, 3, 1).numpy()]
        return Drawn(label, images, found["unet_calls"].item(), found["seconds"].item())

    def error_share(sd: StableDiffusion, label: str, learned: str, noised: bool) -> ErrorShare:
        def make() -> dict[str, Tensor]:
            found = noise_error_share(sd, prompts, noised=noised, progress=True, **options)
            return dict(errors=found.errors, gaps=found.gaps)

        where = f"{label} error on {'noised latents' if noised else 'trajectories'}.safetensors"
        made_with = dict(stamp, prompts=digest("\n".join(prompts).encode()), learned=learned)
        return ErrorShare(**kept(args.out / "kept" / where, made_with, make))

    drawn = [pictures(sd, "teacher", "teacher"), pictures(sd, "no guidance", "no guidance")]
    for part in dict.fromkeys(args.selective or []):
        drawn.append(pictures(sd, "teacher", f"guided but for the last {100 * part:g}%", selective=part))
    shares: dict[str, dict[str, ErrorShare]] = {}
    for label, student in students.items():
        sd = load(args.model, **args.load_options())
        sd.unet = student.beside(sd.unet)
        learned = f"{digest(student.file.read_bytes())} {label}"
        shares[label] = {
            "noise error share": error_share(sd, label, learned, noised=False),
            "on noised latents": error_share(sd, label, learned, noised=True),
        }
        merge_lora(sd.unet)
        drawn.append(pictures(sd, "student", label, learned=learned))

    references = {}  # what pictures are compared with as sets: features [N, D]
    if clip:
        references["teacher"] = clip.embed_pictures(drawn[0].images)
    if clip and truth:
        references["rendered"] = clip.embed_pictures(truth)
    rows = {}
    for one in drawn:
        print(f"measuring: {one.method}", flush=True)
        errors = {name: interval(found.errors, found.gaps) for name, found in shares.get(one.method, {}).items()}
        rows[one.method] = errors | measure(one, drawn[0], shown, each, clip, judge, references)

    command = shlex.join(["python", "-m", "minidistill.evaluate", *(sys.argv[1:] if argv is None else argv)])
    write_results(args.out, drawn, rows, prompts, each, command)
    if shares:
        curves = {label: found["noise error share"] for label, found in shares.items()}
        with written_whole(args.out / "error_by_step.png") as beside:
            plot_shares(curves, sd.schedule.timesteps(args.steps), beside)
    print(f"\n{markdown(drawn, rows)}\n\nPictures, plot and JSON: {args.out}")


class Student(NamedTuple):
    """What is compared with the teacher: a LoRA, or a UNet of its own."""

    file: Path
    guidance: float
    negative_prompt: str
    beside: Callable[[UNet], nn.Module]  # the teacher's UNet -> that with the student, called with the flag


def read_student(path: Path, scale: float, args: Settings) -> Student:
    """Of a run's folder its LoRA, or the checkpoint that ``--method full`` left there; or a LoRA file."""
    full = next((found for found in (path / "student", path / "student.safetensors") if found.exists()), None)
    if full is None:
        file = read_run(path, scale)
        weights, header, beside = file.path, file.metadata, partial(inject_file, file=file)
    elif scale == 1:
        weights = read_weights(full / "unet", STEMS["unet"], args.variant).file if full.is_dir() else full
        header, beside = read_tensors(weights)[1], partial(beside_full, full, args)
    else:
        raise ValueError(f"{full} is a whole model: only a LoRA has a strength.")
    if "guidance" not in header:
        raise ValueError(f"{weights} does not say which guidance it has learned: it is no student.")
    if style := header.get("teacher_lora"):
        raise ValueError(
            f"{weights} was distilled from a teacher with the LoRA {style}. Merge that one into the model first "
            "(python -m minidistill.export --to checkpoint), and name the result with --model."
        )
    guidance = float(header["guidance"]) if full else file.guidance
    return Student(weights, guidance, header.get("negative_prompt", ""), beside)


def beside_full(path: Path, args: Settings, base: UNet) -> FullStudent:
    options = args.load_options()
    found = read_checkpoint(path, options["dtype"], variant=args.variant if path.is_dir() else None)
    return FullStudent(base, place(found.unet, args.device))


def read_students(args: Settings) -> dict[str, Student]:
    """Each by a name for the table."""
    students = {}
    for path, scale in args.runs:
        label = (path.name if path.is_dir() else path.stem) + (f" x {scale:g}" if scale != 1 else "")
        if label in students or label in ("teacher", "no guidance"):
            raise ValueError(f'{path} would be called "{label}" in the table, as another method is: rename it.')
        students[label] = read_student(path, scale, args)
    return students


def one_teacher(students: Mapping[str, Student], guidance: float | None) -> tuple[float, str]:
    """The guidance scale and negative prompt that all students learned from. Raises ValueError if they differ."""
    found = {(s.guidance, s.negative_prompt) for s in students.values()}
    if guidance is not None and not students:
        found = {(guidance, "")}
    if len(found) > 1 or any(guidance not in (None, scale) for scale, _ in found):
        learned = [f'{label}: {s.guidance:g}, away from "{s.negative_prompt}"' for label, s in students.items()]
        raise ValueError(f"There is one teacher to compare with, and these learned from others: {'; '.join(learned)}.")
    return next(iter(found), (2.5, ""))


def read_judge(name: str | None) -> ModuleType | None:
    """A module with ``measures(pictures, prompts)`` and ``rendered(prompts, side)``."""
    try:
        return importlib.import_module(name) if name else None
    except ImportError as error:
        raise ValueError(f"--judge {name}: {error}") from error


def read_clip(sd: StableDiffusion, name: str | None) -> ClipScore | None:
    """The CLIP asked for with its own tokenizer, or the one that a model folder brings along."""
    if name:
        return ClipScore(name, CLIPTokenizer.from_pretrained(name))
    return ClipScore(sd.folder / "clip", sd.tokenizer) if (sd.folder / "clip").is_dir() else None


def kept(file: Path, made_with: Mapping[str, object], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in ``file``, if they are there and were made with the same settings; else made now, and kept."""
    stamp = json.dumps(made_with)
    try:
        with safe_open(file, "pt") as found:
            if (found.metadata() or {}).get("made_with") == stamp:
                return {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118 (it is no dict)
    except (FileNotFoundError, SafetensorError):
        pass
    tensors = {name: tensor.contiguous() for name, tensor in make().items()}
    with written_whole(file) as beside:
        beside.write_bytes(save(tensors, {"made_with": stamp}))
    return tensors


def measure(
    drawn: Drawn,
    teacher: Drawn,
    prompts: Sequence[str],
    each: int,
    clip: ClipScore | None,
    judge: ModuleType | None,
    references: Mapping[str, Tensor],
) -> Row:
    """One method's pictures, ``each`` of a prompt in turn: beside the teacher's, the prompts and the ``references``."""
    by_picture = {}
    if drawn is not teacher:
        by_picture["PSNR"] = psnr(drawn.images, teacher.images)
        if find_spec("skimage"):  # a development extra
            by_picture["SSIM"] = ssim(drawn.images, teacher.images)
    if clip:
        features = clip.embed_pictures(drawn.images)
        by_picture["CLIP score"] = 100 * (features * clip.embed_prompts(prompts)).sum(-1)
    if clip and drawn is not teacher:
        by_picture["CLIP similarity"] = 100 * (features * references["teacher"]).sum(-1)
    if judge:
        by_picture |= judge.measures(pixels(drawn.images), prompts)
    row = {name: interval(values.view(-1, each)) for name, values in by_picture.items()}
    for name, others in references.items():
        if not (name == "teacher" and drawn is teacher):
            row[f"Fréchet to {name}"] = frechet_interval(features, others, each)
    return row


def frechet_interval(features: Tensor, references: Tensor, each: int, resamples: int = 200) -> Interval:
    """The distance between two sets of features [P * each, D], of the same prompts in turn, which are resampled.

    A resample lacks some prompts, which moves every distance up: it is the width around their mean that counts.
    """
    value = frechet_distance(features, references)
    ours, theirs = (x.view(-1, each, x.shape[-1]) for x in (features, references))
    again = [frechet_distance(ours[i].flatten(0, 1), theirs[i].flatten(0, 1)) for i in resampled(len(ours), resamples)]
    low, high = torch.tensor(again).quantile(torch.tensor([0.025, 0.975])).tolist()
    middle = sum(again) / len(again)
    return Interval(value, max(0.0, value + low - middle), value + high - middle)


def write_results(
    out: Path, drawn: Sequence[Drawn], rows: Mapping[str, Row], prompts: Sequence[str], each: int, command: str
) -> None:
    """results.json, table.md, and pictures.png: a row a method, the first picture of some of the prompts."""
    cost = {one.method: dict(method=one.method, unet_calls=one.unet_calls, seconds=one.seconds) for one in drawn}
    found = [cost[method] | {name: x._asdict() for name, x in row.items()} for method, row in rows.items()]
    write_json(out / "results.json", dict(command=command, prompts=len(prompts), each=each, rows=found))
    with written_whole(out / "table.md") as beside:
        beside.write_text(f"{markdown(drawn, rows)}\n\n`{command}`\n", encoding="utf-8")
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
            value, low, high = map(FORMATS.get(name, "{:.1%}").format, found) if found else ("", "", "")
            cells.append(f"{value} ({low} to {high})" if found else "")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot_shares(shares: Mapping[str, ErrorShare], timesteps: Sequence[int], path: Path) -> None:
    """The noise error share at each time step, one line a student; the guidance gap behind, in grey."""
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for label, found in shares.items():
        axes.plot(timesteps, found.per_step, label=f"{label} ({found.pooled:.2f} pooled)")
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
    plt.close(figure)


if __name__ == "__main__":
    with one_sentence("minidistill.evaluate", "stopped. The same command goes on from what is drawn."):
        main()
