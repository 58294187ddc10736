"""Judge from the pixels alone whether images show what their captions say, without the model or its CLIP.

  python -m minidistill.pocket.emoji3d.judge --model weights/pocket-emoji-3d
  python -m minidistill.pocket.emoji3d.judge --check

The background is the median colour of the border. Each thing is identified twice: as the nearest of all things, drawn
at several sizes and places, and by a small classifier trained on rendered images only. Both need the emoji.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from minidistill import load
from minidistill.evaluate import interval
from minidistill.evaluate.metrics import Estimate
from minidistill.evaluate.tables import markdown_table
from minidistill.formats.files import atomic_write, write_json
from minidistill.pipeline import pil_images
from minidistill.pocket.emoji3d.compositions import COLOURS, THINGS, Composition, all_compositions, read_compositions
from minidistill.pocket.emoji3d.images import (
    ALONE,
    IN_A_PAIR,
    NOTHING,
    PACKAGE,
    Renderer,
    as_tensors,
    centred,
    render,
    stamp,
)
from minidistill.pocket.judge import (
    JUDGING_SEED,
    MEASURES,
    TRAINING_SEED,
    background,
    blur,
    border_colour,
    degraded,
    mean_distance,
    sample_all,
)
from minidistill.training.command_line import (
    DEFAULT_DEVICE,
    finite,
    new_parser,
    one_line_errors,
    positive_int,
    provenance,
)

OUT, WORK = Path("weights/pocket-emoji-3d"), Path("runs/pocket3d")
CROP_SIDE = 32  # pixels a side at which one thing is judged
SIZE_IN_A_CROP = (ALONE[0], 2 * IN_A_PAIR[1])  # smallest and largest; a pair's crop is half an image wide
TEMPLATE_SIZES = 6  # sizes of each thing, in this range
TEMPLATE_SHIFT = 2  # pixels each way, the largest shift from the middle of a crop


def read_flags(argv: list[str]) -> Namespace:
    parser = new_parser(__doc__, prog="python -m minidistill.pocket.emoji3d.judge")
    flag = parser.add_argument
    flag("--model", type=Path, default=OUT, metavar="FOLDER",
         help="the embedded model, with its compositions.json (default: %(default)s)")  # fmt: skip
    flag("--lora", type=Path, metavar="FILE", help="a distilled LoRA: judge its student too")
    flag("--check", action="store_true", help="check the judges instead, on rendered images, plain and degraded")
    flag("--guidance", type=finite, metavar="SCALE", help="guidance scale (default: the LoRA's own, else 2.5)")
    flag("--steps", type=positive_int, default=25, metavar="N", help="DDIM steps (default: %(default)s)")
    flag("--seeds", type=positive_int, default=4, metavar="N", help="images per composition (default: %(default)s)")
    flag("--limit", type=positive_int, metavar="N", help="judge N compositions, evenly spread (default: all held-out)")
    flag("--batch", type=positive_int, default=32, metavar="N", help="images to sample at once (default: %(default)s)")
    flag("--device", default=DEFAULT_DEVICE, help="where to sample (default: %(default)s)")
    flag("--out", type=Path, metavar="FILE", help="write the numbers to this JSON file")
    flag("--work", type=Path, default=WORK, metavar="FOLDER", help="for the trained classifier (default: %(default)s)")
    flag(
        "--emoji", type=Path, default=PACKAGE, metavar="FOLDER", help="the unpacked npm package (default: %(default)s)"
    )
    return parser.parse_args(argv)


@lru_cache(maxsize=1)
def templates(folder: Path) -> Tensor:
    """Every thing at several sizes, [E * TEMPLATE_SIZES, 4, h, w] in [0, 1]: colour times coverage, and coverage."""
    fine = 4 * CROP_SIDE  # half the side of the package's images
    sizes = [share * fine for share in np.linspace(*SIZE_IN_A_CROP, TEMPLATE_SIZES)]
    images = (stamp(emoji, folder) for emoji in THINGS)
    stamps = [centred(image, size, fine) for image in images for size in sizes]
    return F.adaptive_avg_pool2d(torch.stack(stamps).float() / 255, CROP_SIDE)


def crops(images: Tensor, pair: bool) -> Tensor:
    """What holds one thing each: whole images, or the left and the right half of their middle. uint8 [N, 3, S, S] ->
    [N, 1, 3, h, w], or for pairs [N, 2, 3, h, w], in [0, 1], with h = w = CROP_SIDE."""
    side = images.shape[-1]
    middle = images[:, :, side // 4 : 3 * side // 4]
    parts = middle.split(side // 2, dim=3) if pair else [images]
    return torch.stack([F.adaptive_avg_pool2d(part.float() / 255, CROP_SIDE) for part in parts], 1)


def identity_by_template(crops: Tensor, backgrounds: Tensor, stamps: Tensor, batch: int = 64) -> Tensor:
    """[K, 3, h, w] and their background colours [K, 3] -> the row in THINGS of the nearest template, int64 [K].

    For a crop x with background b, and a template with colour P and coverage A, over all pixels and channels:
    |x - (P + (1 - A) b)|^2 = |y|^2 - 2 <y, P - A b> + |P - A b|^2 with y = x - b.
    """
    flat, colour, coverage = stamps.flatten(1), stamps[:, :3].flatten(2), stamps[:, 3].flatten(1)
    squares = colour.square().sum((1, 2)), torch.einsum("kcp,kp->kc", colour, coverage), coverage.square().sum(1)
    nearest = []
    pieces = list(zip(crops.split(batch), backgrounds.split(batch)))
    for x, b in tqdm(pieces, desc="templates", unit="batch", leave=False):
        y = x - b[:, :, None, None]
        y = torch.cat([y, -torch.einsum("bchw,bc->bhw", y, b)[:, None]], 1)  # [B, 4, h, w], for products with (P, A)
        shifted = F.unfold(F.pad(y, [TEMPLATE_SHIFT] * 4), CROP_SIDE)  # [B, 4 h w, shifts]
        match = (shifted.transpose(1, 2) @ flat.T).amax(1)  # [B, K], at the best shift
        energy = squares[0] - 2 * b @ squares[1].T + b.square().sum(1, keepdim=True) * squares[2]
        nearest.append((energy - 2 * match).argmin(1) // TEMPLATE_SIZES)
    return torch.cat(nearest)


def build_classifier() -> nn.Sequential:
    """A small CNN: [K, 3, h, w] in [0, 1] -> logits [K, E]."""
    layers: list[nn.Module] = []
    for inner, outer, stride in [(3, 48, 1), (48, 96, 2), (96, 128, 2), (128, 192, 2), (192, 256, 2)]:
        layers += [nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * (CROP_SIDE // 16) ** 2, len(THINGS)))


def train_classifier(renderer: Renderer, steps: int = 2000, batch: int = 32) -> nn.Sequential:
    """Train on renders with random backgrounds, a little blurred and noisy to make the classifier robust."""
    torch.manual_seed(TRAINING_SEED)
    model = build_classifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    progress = tqdm(range(steps), desc="classifier", unit="step")
    for step in progress:
        things = torch.randint(len(THINGS), (batch, 2))
        if not (pair := step % 2 == 1):
            things[:, 1] = NOTHING
        images = renderer.draw(things, torch.randint(6, 250, (batch, 3)))
        x = blur(images.float() / 255, 1.5 * torch.rand(()).item())
        x = x + 0.1 * torch.rand(batch, 1, 1, 1) * torch.randn_like(x)
        seen = crops((255 * x.clamp(0, 1)).to(torch.uint8), pair)  # [B, 1 or 2, 3, h, w]
        loss = F.cross_entropy(model(seen.flatten(0, 1)), things[:, : seen.shape[1]].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def load_classifier(work: Path, emoji: Path) -> nn.Sequential:
    """The classifier in the folder ``work``; trained first if there is none, which takes a few minutes."""
    path = work / "judge.safetensors"
    if not path.exists():
        trained = train_classifier(Renderer(emoji))
        with atomic_write(path) as file:
            save_file(trained.state_dict(), file)
    model = build_classifier()
    model.load_state_dict(load_file(path))
    return model.eval()


@torch.no_grad()
def identity_by_classifier(crops: Tensor, model: nn.Module, batch: int = 256) -> Tensor:
    """[K, 3, h, w] -> the row in THINGS, int64 [K]."""
    return torch.cat([model(some).argmax(1) for some in crops.split(batch)])


def judge(
    images: Tensor, compositions: Sequence[Composition], classifier: nn.Module, stamps: Tensor
) -> dict[str, Tensor]:
    """Judge uint8 [C * S, 3, H, W], S consecutive images per composition, by each of MEASURES: 1 if right, [C, S].

    The compositions must be all single, or all pairs. Both things of a pair must be right, each in its place.
    """
    each = len(images) // len(compositions)
    things, _ = as_tensors(compositions)
    pair = bool((things[:, 1] != NOTHING).all())
    seen = crops(images, pair)  # [N, T, 3, h, w]
    expected = things[:, : seen.shape[1]].repeat_interleave(each, 0)  # [N, T]
    backgrounds = border_colour(images)[:, None].expand(-1, seen.shape[1], -1)
    flat = seen.flatten(0, 1)
    found = [identity_by_template(flat, backgrounds.flatten(0, 1), stamps), identity_by_classifier(flat, classifier)]
    right = [(f.view_as(expected) == expected).all(1) for f in found]
    colour = torch.tensor([list(COLOURS).index(c.colour) for c in compositions]).repeat_interleave(each)
    right.append(background(images) == colour)
    right.append(right[0] & right[1] & right[2])
    return {measure: r.view(-1, each).float() for measure, r in zip(MEASURES, right)}


def compositions_of(captions: Sequence[str]) -> list[Composition]:
    """The compositions with these captions. Raises ValueError for an unknown caption."""
    known = {c.caption: c for c in all_compositions()}
    if unknown := [caption for caption in captions if caption not in known]:
        raise ValueError(f"This judge knows only the embedded model's captions, not: {', '.join(unknown[:5])}.")
    return [known[caption] for caption in captions]


def measures(images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    """uint8 [N, 3, H, W] -> MEASURES of each image, [N]. ``evaluate --judge`` calls this and ``rendered``."""
    compositions, classifier = compositions_of(captions), load_classifier(WORK, PACKAGE)
    result = {measure: torch.empty(len(images)) for measure in MEASURES}
    for length in (1, 2):
        rows = [i for i, c in enumerate(compositions) if len(c.emoji) == length]
        if rows:
            right = judge(images[rows], [compositions[i] for i in rows], classifier, templates(PACKAGE))
            for measure, values in right.items():
                result[measure][rows] = values.flatten()
    return result


def rendered(captions: Sequence[str], side: int) -> list[Image.Image]:
    """Reference images of the captions, ``side`` pixels wide."""
    images = render(Renderer(PACKAGE, side), compositions_of(captions), 1, JUDGING_SEED)
    return pil_images(images)


def row(method: str, kind: str, right: dict[str, Tensor], images: Tensor, compositions: Sequence[Composition]) -> dict:
    """One method's numbers for the JSON file; ``wrong`` counts, by caption, the images that are not all right."""
    each = right[MEASURES[0]].shape[1]
    numbers = {m: interval(values)._asdict() for m, values in right.items()}
    counts = (each - right["all right"].sum(1)).int().tolist()
    wrong = {c.caption: n for c, n in zip(compositions, counts) if n}
    distance = mean_distance(images, each)
    return {"method": method, "things": kind, **numbers, "distance over seeds": distance, "wrong": wrong}


def table(rows: Sequence[dict]) -> str:
    """A Markdown table of percentages with their intervals."""
    lines = [["", "things", *MEASURES, "distance over seeds"], ["---"] * (len(MEASURES) + 3)]
    for r in rows:
        percentages = (f"{Estimate(**r[measure]):.1%}" for measure in MEASURES)
        lines.append([r["method"], r["things"], *percentages, f"{r['distance over seeds']:.3f}"])
    return markdown_table(lines)


def held_out(compositions: Sequence[Composition], limit: int | None = None) -> list[Composition]:
    """The held-out compositions, or ``limit`` of them, evenly spread."""
    held_out = [c for c in compositions if c.held_out]
    chosen = np.linspace(0, len(held_out) - 1, min(limit or len(held_out), len(held_out))).round().astype(int)
    return [held_out[i] for i in chosen]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = read_flags(argv)
    if args.seeds < 2:
        raise ValueError("--seeds must be at least 2, to measure a distance over seeds.")
    path = args.model / "compositions.json"
    compositions = held_out(all_compositions() if args.check else read_compositions(path), args.limit)
    reference = render(Renderer(args.emoji), compositions, args.seeds, JUDGING_SEED)
    if args.check:
        judged = degraded(reference)
    else:
        prompts = [c.caption for c in compositions for _ in range(args.seeds)]
        judged = sample_all(load(args.model, device=args.device), args, prompts) | {"rendered": reference}
    classifier, stamps = load_classifier(args.work, args.emoji), templates(args.emoji)
    rows = []
    for number, things in enumerate(("one", "two"), start=1):
        chosen = [i for i, c in enumerate(compositions) if len(c.emoji) == number]
        some = [compositions[i] for i in chosen]
        for method, images in judged.items() if some else ():
            images = images.unflatten(0, (-1, args.seeds))[chosen].flatten(0, 1)
            rows.append(row(method, things, judge(images, some, classifier, stamps), images, some))
    print(f"{len(compositions)} held-out compositions, {args.seeds} images each\n\n{table(rows)}")
    if args.out:
        report = provenance("-m minidistill.pocket.emoji3d.judge", argv)
        counts = dict(compositions=len(compositions), seeds=args.seeds, steps=args.steps)
        write_json(args.out, report | counts | dict(rows=rows))


if __name__ == "__main__":
    with one_line_errors("minidistill.pocket.emoji3d.judge", "stopped."):
        main()
