"""Judge from the pixels alone whether images show what their captions say, without the model or its CLIP.

  python -m minidistill.pocket.judge --lora weights/pocket-emoji/guidance-lora.safetensors --out results/pocket.json
  python -m minidistill.pocket.judge --check

The background is the median colour of the border. The emoji is identified twice: as the nearest of all emoji, rendered
at several sizes and places, and by a small classifier trained on rendered images only. Both need the emoji font.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from minidistill import load, load_lora, merge_lora
from minidistill.evaluate import draw, interval, pixels
from minidistill.evaluate.metrics import Estimate
from minidistill.evaluate.tables import markdown_table
from minidistill.formats.files import atomic_write, write_json
from minidistill.formats.lora_formats import read_lora
from minidistill.pipeline import StableDiffusion, pil_images
from minidistill.pocket.compositions import COLOURS, EMOJI, Composition, all_compositions
from minidistill.pocket.images import EMOJI_SIZE, find_font, glyph, render
from minidistill.pocket.stage import update
from minidistill.training.command_line import (
    DEFAULT_DEVICE,
    DEFAULT_MODEL,
    finite,
    new_parser,
    one_line_errors,
    positive_int,
    provenance,
)

WORK = Path("runs/pocket")
TEMPLATE_SIDE = 32  # pixels a side at which templates are compared
TEMPLATE_SIZES = 5  # sizes of each emoji, from the smallest rendered to the largest
TEMPLATE_SHIFT = 2  # pixels each way, the largest shift of rendered emoji from the centre at this size
CLASSIFIER_SIDE = 64
TRAINING_SEED, JUDGING_SEED = 1001, 1002  # the model's training images have seed 0
MEASURES = ("identity by template", "identity by classifier", "background", "all right")


def read_flags(argv: list[str]) -> Namespace:
    parser = new_parser(__doc__, prog="python -m minidistill.pocket.judge")
    flag = parser.add_argument
    flag("--model", type=Path, default=DEFAULT_MODEL, metavar="FOLDER",
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
    flag("--font", metavar="PATH", help="NotoColorEmoji.ttf (default: where Debian has it)")
    return parser.parse_args(argv)


def border_colour(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> the median of the outermost pixels, in [0, 1], [N, 3]."""
    ring = torch.ones(images.shape[2:], dtype=torch.bool)
    ring[1:-1, 1:-1] = False
    return images[:, :, ring].float().median(-1).values / 255


def background(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> the index in COLOURS of the colour nearest to the border's, int64 [N]."""
    named = torch.tensor(list(COLOURS.values())) / 255
    return torch.cdist(border_colour(images), named).argmin(1)


def shrink(images: Tensor, side: int) -> Tensor:
    """uint8 [N, 3, H, W] -> float [N, 3, side, side] in [0, 1]."""
    return F.adaptive_avg_pool2d(images.float() / 255, side)


@lru_cache(maxsize=1)
def templates(font: str) -> Tensor:
    """Every emoji at several sizes, [E * TEMPLATE_SIZES, 4, h, w] in [0, 1]: colour times coverage, and coverage."""
    fine = 4 * TEMPLATE_SIDE  # about the font's own size
    stamps = []
    for emoji in EMOJI:
        bitmap = glyph(emoji, font)
        for share in np.linspace(*EMOJI_SIZE, TEMPLATE_SIZES):
            scale = share * fine / max(bitmap.size)
            stamp = bitmap.resize([round(side * scale) for side in bitmap.size], Image.Resampling.LANCZOS)
            sheet = Image.new("RGBA", (fine, fine))
            sheet.paste(stamp, ((fine - stamp.width) // 2, (fine - stamp.height) // 2))
            pixels = torch.from_numpy(np.array(sheet)).permute(2, 0, 1).float() / 255
            pixels[:3] *= pixels[3]
            stamps.append(F.adaptive_avg_pool2d(pixels, TEMPLATE_SIDE))
    return torch.stack(stamps)


def identity_by_template(images: Tensor, font: str | None = None, batch: int = 64) -> Tensor:
    """uint8 [N, 3, H, W] -> the index in EMOJI of the template with the least squared error, int64 [N].

    For an image x with background b, and a template with colour P and coverage A, over all pixels and channels:
    |x - (P + (1 - A) b)|^2 = |y|^2 - 2 <y, P - A b> + |P - A b|^2 with y = x - b.
    """
    stamps = templates(find_font(font))
    flat, colour, coverage = stamps.flatten(1), stamps[:, :3].flatten(2), stamps[:, 3].flatten(1)
    squares = colour.square().sum((1, 2)), torch.einsum("kcp,kp->kc", colour, coverage), coverage.square().sum(1)
    nearest = []
    for some in tqdm(images.split(batch), desc="templates", unit="batch", leave=False):
        b = border_colour(some)  # [B, 3]
        y = shrink(some, TEMPLATE_SIDE) - b[:, :, None, None]
        y = torch.cat([y, -torch.einsum("bchw,bc->bhw", y, b)[:, None]], 1)  # [B, 4, h, w], for products with (P, A)
        shifted = F.unfold(F.pad(y, [TEMPLATE_SHIFT] * 4), TEMPLATE_SIDE)  # [B, 4 h w, shifts]
        match = (shifted.transpose(1, 2) @ flat.T).amax(1)  # [B, K], at the best shift
        energy = squares[0] - 2 * b @ squares[1].T + b.square().sum(1, keepdim=True) * squares[2]
        nearest.append((energy - 2 * match).argmin(1) // TEMPLATE_SIZES)
    return torch.cat(nearest)


def build_classifier() -> nn.Sequential:
    """A small CNN: [B, 3, 64, 64] in [0, 1] -> logits [B, E]."""
    layers: list[nn.Module] = []
    for inner, outer in [(3, 32), (32, 64), (64, 128), (128, 192), (192, 256)]:  # 64 -> 2 pixels a side
        layers += [nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 2 * 2, len(EMOJI)))


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [B, 3, H, W]."""
    radius = max(1, round(3 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / max(sigma, 1e-3)) ** 2)
    kernel = (weights / weights.sum()).expand(3, 1, 1, -1)
    x = F.conv2d(F.pad(x, [radius] * 4, "replicate"), kernel, groups=3)
    return F.conv2d(x, kernel.transpose(2, 3), groups=3)


def train_classifier(font: str | None = None, renders: int = 48, steps: int = 800, batch: int = 64) -> nn.Sequential:
    """Train on rendered images with random backgrounds, a little blurred and noisy to make the classifier robust."""
    rng = np.random.default_rng(TRAINING_SEED)
    of_emoji = {c.emoji: c for c in all_compositions()}
    chosen = [
        replace(of_emoji[e], rgb=tuple(int(v) for v in rng.integers(6, 250, 3))) for e in EMOJI for _ in range(renders)
    ]
    images, index = render(chosen, 1, TRAINING_SEED, CLASSIFIER_SIDE, font)
    torch.manual_seed(TRAINING_SEED)
    model = build_classifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    progress = tqdm(range(steps), desc="classifier", unit="step")
    for _ in progress:
        rows = torch.randint(len(index), (batch,))
        x = blur(images[rows].float() / 255, 1.5 * torch.rand(()).item())
        x = x + 0.1 * torch.rand(batch, 1, 1, 1) * torch.randn_like(x)
        loss = F.cross_entropy(model(x), index[rows] // renders)
        update(loss, optimizer, model.parameters(), max_norm=float("inf"))
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def load_classifier(work: Path, font: str | None = None) -> nn.Sequential:
    """The classifier in the folder ``work``; trained first if there is none, which takes a few minutes."""
    path = work / "judge.safetensors"
    if not path.exists():
        trained = train_classifier(font)
        with atomic_write(path) as file:
            save_file(trained.state_dict(), file)
    model = build_classifier()
    model.load_state_dict(load_file(path))
    return model.eval()


@torch.no_grad()
def identity_by_classifier(images: Tensor, model: nn.Module, batch: int = 256) -> Tensor:
    """uint8 [N, 3, H, W] -> index in EMOJI, int64 [N]."""
    return torch.cat([model(shrink(some, CLASSIFIER_SIDE)).argmax(1) for some in images.split(batch)])


def judge(
    images: Tensor, compositions: Sequence[Composition], classifier: nn.Module, font: str | None = None
) -> dict[str, Tensor]:
    """Judge uint8 [C * S, 3, H, W], S consecutive images per composition, by each of MEASURES: 1 if right, [C, S]."""
    each = len(images) // len(compositions)
    emoji = torch.tensor([EMOJI.index(c.emoji) for c in compositions]).repeat_interleave(each)
    colour = torch.tensor([list(COLOURS).index(c.colour) for c in compositions]).repeat_interleave(each)
    right = [
        identity_by_template(images, font) == emoji,
        identity_by_classifier(images, classifier) == emoji,
        background(images) == colour,
    ]
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
    right = judge(images, compositions_of(captions), load_classifier(WORK))
    return {measure: values.flatten() for measure, values in right.items()}


def rendered(captions: Sequence[str], side: int) -> list[Image.Image]:
    """Reference images of the captions, ``side`` pixels wide."""
    images, _ = render(compositions_of(captions), 1, JUDGING_SEED, side)
    return pil_images(images)


def mean_distance(images: Tensor, each: int) -> float:
    """Mean RMS distance in [0, 1] between two images of one composition, which has ``each`` consecutive images."""
    sets = (images.float() / 255).flatten(1).view(-1, each, images[0].numel())  # [C, S, 3 H W]
    distances = [(sets[:, i] - sets[:, j]).square().mean(-1).sqrt() for i in range(each) for j in range(i)]
    return torch.stack(distances).mean().item()


def row(method: str, right: dict[str, Tensor], images: Tensor, compositions: Sequence[Composition]) -> dict:
    """One method's numbers for the JSON file; ``wrong`` counts, by caption, the images that are not all right."""
    each = right[MEASURES[0]].shape[1]
    numbers = {m: interval(values)._asdict() for m, values in right.items()}
    counts = (each - right["all right"].sum(1)).int().tolist()
    wrong = {c.caption: n for c, n in zip(compositions, counts) if n}
    return {"method": method, **numbers, "distance over seeds": mean_distance(images, each), "wrong": wrong}


def table(rows: Sequence[dict]) -> str:
    """A Markdown table of percentages with their intervals."""
    lines = [["", *MEASURES, "distance over seeds"], ["---"] * (len(MEASURES) + 2)]
    for r in rows:
        percentages = (f"{Estimate(**r[measure]):.1%}" for measure in MEASURES)
        lines.append([r["method"], *percentages, f"{r['distance over seeds']:.3f}"])
    return markdown_table(lines)


def degraded(images: Tensor) -> dict[str, Tensor]:
    """uint8 [N, 3, H, W], plain and degraded in the ways that sampled images may be."""
    x, generator = images.float() / 255, torch.Generator().manual_seed(JUDGING_SEED)
    coarse = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    versions = {
        "rendered": x,
        "rendered, blurred (sigma 1)": blur(x, 1.0),
        "rendered, noisy (sigma 0.1)": x + 0.1 * torch.randn(x.shape, generator=generator),
        "rendered, smoothed (half the size and back)": blur(coarse, 0.7),
        "rendered, faded (contrast 0.7)": 0.5 + 0.7 * (x - 0.5),
    }
    return {name: (255 * v.clamp(0, 1)).round().to(torch.uint8) for name, v in versions.items()}


def held_out(path: Path, limit: int | None = None) -> list[Composition]:
    """The held-out compositions in a model's compositions.json, or ``limit`` of them, evenly spread."""
    captions = [entry["caption"] for entry in json.loads(path.read_text(encoding="utf-8")) if entry["held_out"]]
    known = compositions_of(captions)
    chosen = np.linspace(0, len(captions) - 1, min(limit or len(captions), len(captions))).round().astype(int)
    return [known[i] for i in chosen]


def sample_all(sd: StableDiffusion, args: Namespace, prompts: list[str]) -> dict[str, Tensor]:
    """Images of the prompts by teacher, unguided model and, with a LoRA, student: uint8 [N, 3, H, W] each."""
    lora = read_lora(args.lora) if args.lora else None
    header = lora.metadata if lora else {}
    guidance = args.guidance if args.guidance is not None else float(header.get("guidance", 2.5))
    options = dict(steps=args.steps, guidance=guidance, negative_prompt=header.get("negative_prompt", ""))
    options |= dict(interval=lora.interval if lora else None, batch=args.batch, progress=True)
    rows = {f"teacher, guidance {guidance:g}": draw(sd, "teacher", prompts, **options)}
    rows["no guidance"] = draw(sd, "no guidance", prompts, **options)
    if args.lora:
        sd.unet = load_lora(sd.unet, args.lora)
        merge_lora(sd.unet)
        few = dict(student_steps=lora.few_steps[0]) if lora.few_steps else {}
        rows["student, one pass"] = draw(sd, "student", prompts, **options | few)
    return {method: pixels(drawn.images) for method, drawn in rows.items()}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = read_flags(argv)
    if args.seeds < 2:
        raise ValueError("--seeds must be at least 2, to measure a distance over seeds.")
    compositions = held_out(args.model / "compositions.json", args.limit)
    classifier = load_classifier(args.work, args.font)
    if args.check:
        judged = degraded(render(compositions, args.seeds, JUDGING_SEED, font=args.font)[0])
    else:
        prompts = [c.caption for c in compositions for _ in range(args.seeds)]
        judged = sample_all(load(args.model, device=args.device), args, prompts)
        size = next(iter(judged.values())).shape[-1]
        judged["rendered"] = render(compositions, args.seeds, JUDGING_SEED, size, args.font)[0]
    rows = [row(m, judge(p, compositions, classifier, args.font), p, compositions) for m, p in judged.items()]
    print(f"{len(compositions)} held-out compositions, {args.seeds} images each\n\n{table(rows)}")
    if args.out:
        report = provenance("-m minidistill.pocket.judge", argv)
        counts = dict(compositions=len(compositions), seeds=args.seeds, steps=args.steps)
        write_json(args.out, report | counts | dict(rows=rows))


if __name__ == "__main__":
    with one_line_errors("minidistill.pocket.judge", "stopped."):
        main()
