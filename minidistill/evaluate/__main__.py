"""Teacher, its cheaper variants and students, measured on the same prompts and from the same noise.

  python -m minidistill.evaluate runs/NAME [runs/OTHER ...] --prompts held-out
  python -m minidistill.evaluate runs/pocket-emoji --judge minidistill.pocket.judge
  python -m minidistill.evaluate --all

Writes a table (Markdown and JSON), pictures side by side and the noise error by time step. The pictures of each method
are kept, so that an interrupted evaluation goes on with the method it stopped in. A LoRA as FILE:SCALE, the dial, is
compared with a teacher of guidance 1 + SCALE (s - 1).
"""

import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import CLIPTokenizer

from minidistill.data.prompts import read_prompts
from minidistill.data.trajectories import fingerprint, prompt_split, spread
from minidistill.evaluate import everything
from minidistill.evaluate.drawing import Drawn, draw
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
from minidistill.evaluate.results import Row, markdown, plot_shares, write_results
from minidistill.evaluate.students import one_teacher, read_students
from minidistill.formats.files import digest, written_whole
from minidistill.lora import merge_lora
from minidistill.pipeline import StableDiffusion, load
from minidistill.training.settings import (
    ModelSettings,
    ScaledFile,
    count,
    finite,
    made_by,
    one_sentence,
    parse,
    setting,
    share,
)


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
    pictures: int = setting(1000, "pictures of each method, or more: of each prompt equally many", "what", type=count)
    guidance: float = setting(None, "the teacher's scale (default: what was learned, else 2.5)", "what", type=finite)
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
    work: Path = setting(
        Path("runs/evaluation"), "what is drawn is kept here, under kept/: gigabytes at full size", "how"
    )
    all: bool = setting(False, "make results/ again, but for what its README says; takes no other flag", "how")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(Settings, __doc__, argv)
    if args.all:
        if argv != ["--all"]:
            raise ValueError("--all makes results/ as it is, and takes no other flag.")
        return everything.run()
    students = read_students(args.runs, args)
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
        found = kept(args.work / "kept" / f"{label} pictures.safetensors", made_with, make)
        images = [Image.fromarray(picture) for picture in found["pictures"].permute(0, 2, 3, 1).numpy()]
        return Drawn(label, images, found["unet_calls"].item(), found["seconds"].item())

    def error_share(sd: StableDiffusion, label: str, learned: str, noised: bool) -> ErrorShare:
        where = "noised latents" if noised else "trajectories"
        made_with = dict(stamp, prompts=digest("\n".join(prompts).encode()))

        def teacher(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:  # once for all students
            return kept(args.work / "kept" / f"teacher on {where} {name}.safetensors", made_with, make)

        def student() -> dict[str, Tensor]:
            found = noise_error_share(sd, prompts, noised=noised, progress=True, keep=teacher, **options)
            return vars(found)

        file = args.work / "kept" / f"{label} error on {where}.safetensors"
        return ErrorShare(**kept(file, dict(made_with, learned=learned, measures="errors gaps along"), student))

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

    timesteps = sd.schedule.timesteps(args.steps)
    write_results(args.out, drawn, rows, shares, timesteps, made_by("minidistill.evaluate", argv), prompts, each)
    if shares:
        curves = {label: found["noise error share"] for label, found in shares.items()}
        with written_whole(args.out / "error_by_step.png") as beside:
            plot_shares(curves, timesteps, beside)
    print(f"\n{markdown(drawn, rows)}\n\nPictures, plot and JSON: {args.out}")


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


def frechet_interval(features: Tensor, references: Tensor, each: int) -> Interval:
    """The distance between two sets of features [P * each, D], of the same prompts in turn, which are resampled.

    A resample lacks some prompts, which moves every distance up: it is the width around their mean that counts.
    """
    value = frechet_distance(features, references)
    ours, theirs = (x.view(-1, each, x.shape[-1]) for x in (features, references))
    again = [frechet_distance(ours[i].flatten(0, 1), theirs[i].flatten(0, 1)) for i in resampled(len(ours), 200)]
    low, high = torch.tensor(again).quantile(torch.tensor([0.025, 0.975])).tolist()
    middle = sum(again) / len(again)
    return Interval(value, max(0.0, value + low - middle), value + high - middle)


if __name__ == "__main__":
    with one_sentence("minidistill.evaluate", "stopped. The same command goes on from what is drawn."):
        main()
