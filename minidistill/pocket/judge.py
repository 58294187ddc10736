"""Do pictures show what their captions say? Judged from the pixels alone: neither the model nor its CLIP has a say.

The background is the median of the border. The emoji is told twice: by the nearest of all emoji drawn at several sizes
and places, and by a small classifier that has seen rendered pictures only. Both need the emoji font.

python -m minidistill.pocket.judge --lora weights/pocket-emoji/guidance-lora.safetensors --out results/pocket.json
python -m minidistill.pocket.judge --check
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from minidistill.evaluate.metrics import with_interval
from minidistill.formats.files import written_whole
from minidistill.formats.lora_formats import read_lora
from minidistill.formats.model_configs import write_json
from minidistill.pipeline import StableDiffusion
from minidistill.pocket.compositions import COLOURS, EMOJI, Composition, all_compositions
from minidistill.pocket.pictures import DRAWN_SIZE, find_font, glyph, render
from minidistill.training.settings import count, finite, made_by, one_sentence, parse, setting

TEMPLATE_SIDE = 32  # templates are compared at this size
TEMPLATE_SIZES = 5  # sizes of each emoji, from the smallest that is drawn to the largest
TEMPLATE_SHIFT = 2  # pixels of TEMPLATE_SIDE either way: as far as emoji are drawn from the centre
CLASSIFIER_SIDE = 64
TRAINING_SEED, JUDGING_SEED = 1001, 1002  # the renders that the model learned from have seed 0
MEASURES = ("identity by template", "identity by classifier", "background", "all right")


@dataclass
class Settings:
    model: Path = setting(Path("weights/pocket-emoji"), "the embedded model, with its compositions.json", "what")
    lora: Path = setting(None, "a distilled LoRA: its student is judged too, in one pass", "what", type=Path)
    check: bool = setting(False, "judge the judges instead: rendered pictures, plain and degraded", "what")
    guidance: float = setting(None, "guidance scale (default: the LoRA's own, else 2.5)", "how", type=finite)
    steps: int = setting(25, "DDIM steps", "how", type=count)
    seeds: int = setting(4, "pictures of each held-out composition", "how", type=count)
    limit: int = setting(None, "judge only this many compositions, evenly chosen", "how", type=count)
    batch: int = setting(32, "pictures drawn at once", "how", type=count)
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "where to draw", "how")
    out: Path = setting(None, "a JSON file for the numbers", "files", type=Path)
    work: Path = setting(Path("runs/pocket"), "folder in which the trained classifier is kept", "files")
    font: str = setting(None, "path of NotoColorEmoji.ttf (found by itself on Debian)", "files")


def border_colour(pictures: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> the median of the outermost pixels, in [0, 1], [N, 3]."""
    ring = torch.ones(pictures.shape[2:], dtype=torch.bool)
    ring[1:-1, 1:-1] = False
    return pictures[:, :, ring].float().median(-1).values / 255


def background(pictures: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> the index in COLOURS of the named colour nearest to the border's, int64 [N]."""
    named = torch.tensor(list(COLOURS.values())) / 255
    return torch.cdist(border_colour(pictures), named).argmin(1)


def shrink(pictures: Tensor, side: int) -> Tensor:
    """uint8 [N, 3, H, W] -> float [N, 3, side, side] in [0, 1]."""
    return F.adaptive_avg_pool2d(pictures.float() / 255, side)


@lru_cache(maxsize=1)
def templates(font: str) -> Tensor:
    """Every emoji at several sizes: colour times coverage, and coverage. [E * TEMPLATE_SIZES, 4, h, w] in [0, 1]."""
    fine = 4 * TEMPLATE_SIDE  # about the font's own size
    stamps = []
    for emoji in EMOJI:
        drawn = glyph(emoji, font)
        for share in np.linspace(*DRAWN_SIZE, TEMPLATE_SIZES):
            scale = share * fine / max(drawn.size)
            stamp = drawn.resize([round(side * scale) for side in drawn.size], Image.Resampling.LANCZOS)
            sheet = Image.new("RGBA", (fine, fine))
            sheet.paste(stamp, ((fine - stamp.width) // 2, (fine - stamp.height) // 2))
            pixels = torch.from_numpy(np.array(sheet)).permute(2, 0, 1).float() / 255
            pixels[:3] *= pixels[3]
            stamps.append(F.adaptive_avg_pool2d(pixels, TEMPLATE_SIDE))
    return torch.stack(stamps)


def identity_by_template(pictures: Tensor, font: str | None = None, batch: int = 64) -> Tensor:
    """uint8 [N, 3, H, W] -> the index in EMOJI of the template with the least squared error, int64 [N].

    With picture x, measured background b, and a template of colour P and coverage A, summed over pixels and channels:
    |x - (P + (1 - A) b)|^2 = |y|^2 - 2 <y, P - A b> + |P - A b|^2 where y = x - b.
    """
    stamps = templates(find_font(font))
    flat, colour, coverage = stamps.flatten(1), stamps[:, :3].flatten(2), stamps[:, 3].flatten(1)
    squares = colour.square().sum((1, 2)), torch.einsum("kcp,kp->kc", colour, coverage), coverage.square().sum(1)
    found = []
    for some in tqdm(pictures.split(batch), desc="templates", unit="batch", leave=False):
        b = border_colour(some)  # [B, 3]
        y = shrink(some, TEMPLATE_SIDE) - b[:, :, None, None]
        y = torch.cat([y, -torch.einsum("bchw,bc->bhw", y, b)[:, None]], 1)  # [B, 4, h, w], to be paired with (P, A)
        shifted = F.unfold(F.pad(y, [TEMPLATE_SHIFT] * 4), TEMPLATE_SIDE)  # [B, 4 h w, shifts]
        match = (shifted.transpose(1, 2) @ flat.T).amax(1)  # [B, K], at the best shift
        energy = squares[0] - 2 * b @ squares[1].T + b.square().sum(1, keepdim=True) * squares[2]
        found.append((energy - 2 * match).argmin(1) // TEMPLATE_SIZES)
    return torch.cat(found)


def build_classifier() -> nn.Sequential:
    """A light CNN: [B, 3, 64, 64] in [0, 1] -> logits [B, E]."""
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
    """Train on rendered pictures, on backgrounds of any colour, a little blurred and noisy lest it be brittle."""
    rng = np.random.default_rng(TRAINING_SEED)
    of_emoji = {c.emoji: c for c in all_compositions()}
    shown = [
        replace(of_emoji[e], rgb=tuple(int(v) for v in rng.integers(6, 250, 3))) for e in EMOJI for _ in range(renders)
    ]
    pictures, index = render(shown, 1, TRAINING_SEED, CLASSIFIER_SIDE, font)
    torch.manual_seed(TRAINING_SEED)
    model = build_classifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    progress = tqdm(range(steps), desc="classifier", unit="step")
    for _ in progress:
        chosen = torch.randint(len(index), (batch,))
        x = blur(pictures[chosen].float() / 255, 1.5 * torch.rand(()).item())
        x = x + 0.1 * torch.rand(batch, 1, 1, 1) * torch.randn_like(x)
        loss = F.cross_entropy(model(x), index[chosen] // renders)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def load_classifier(work: Path, font: str | None = None) -> nn.Sequential:
    """The classifier kept in the folder ``work``; trained first, in a few minutes, where there is none."""
    path = work / "judge.safetensors"
    if not path.exists():
        trained = train_classifier(font)
        with written_whole(path) as beside:
            save_file(trained.state_dict(), beside)
    model = build_classifier()
    model.load_state_dict(load_file(path))
    return model.eval()


@torch.no_grad()
def identity_by_classifier(pictures: Tensor, model: nn.Module, batch: int = 256) -> Tensor:
    """uint8 [N, 3, H, W] -> index in EMOJI, int64 [N]."""
    return torch.cat([model(shrink(some, CLASSIFIER_SIDE)).argmax(1) for some in pictures.split(batch)])


def judge(
    pictures: Tensor, compositions: Sequence[Composition], classifier: nn.Module, font: str | None = None
) -> dict[str, Tensor]:
    """Judge uint8 [C * S, 3, H, W], S pictures a composition, in turn: by each of MEASURES, 1 where right, [C, S]."""
    each = len(pictures) // len(compositions)
    emoji = torch.tensor([EMOJI.index(c.emoji) for c in compositions]).repeat_interleave(each)
    colour = torch.tensor([list(COLOURS).index(c.colour) for c in compositions]).repeat_interleave(each)
    right = [
        identity_by_template(pictures, font) == emoji,
        identity_by_classifier(pictures, classifier) == emoji,
        background(pictures) == colour,
    ]
    right.append(right[0] & right[1] & right[2])
    return {measure: r.view(-1, each).float() for measure, r in zip(MEASURES, right)}


def compositions_of(captions: Sequence[str]) -> list[Composition]:
    """Raises ValueError for a caption that no emoji here shows."""
    known = {c.caption: c for c in all_compositions()}
    if strange := [caption for caption in captions if caption not in known]:
        raise ValueError(f"This judge knows the embedded model's captions only, not: {', '.join(strange[:5])}.")
    return [known[caption] for caption in captions]


def measures(pictures: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    """uint8 [N, 3, H, W] -> MEASURES of each, [N]. With ``rendered``, what minidistill.evaluate asks of a judge."""
    right = judge(pictures, compositions_of(captions), load_classifier(Settings.work))
    return {measure: values.flatten() for measure, values in right.items()}


def rendered(captions: Sequence[str], side: int) -> list[Image.Image]:
    """What the captions' pictures should look like: each drawn anew, ``side`` pixels wide."""
    pictures, _ = render(compositions_of(captions), 1, JUDGING_SEED, side)
    return [Image.fromarray(picture) for picture in pictures.permute(0, 2, 3, 1).numpy()]


def mean_distance(pictures: Tensor, each: int) -> float:
    """Mean RMS distance between two pictures of one composition, in [0, 1]; ``each`` of them lie in turn."""
    sets = (pictures.float() / 255).flatten(1).view(-1, each, pictures[0].numel())  # [C, S, 3 H W]
    apart = [(sets[:, i] - sets[:, j]).square().mean(-1).sqrt() for i in range(each) for j in range(i)]
    return torch.stack(apart).mean().item()


def row(method: str, right: dict[str, Tensor], pictures: Tensor, compositions: Sequence[Composition]) -> dict:
    """The numbers of one method, as they go to JSON; ``wrong`` counts the pictures that any judge refused."""
    each = right[MEASURES[0]].shape[1]
    numbers = {m: interval(values)._asdict() for m, values in right.items()}
    missed = (each - right["all right"].sum(1)).int().tolist()
    wrong = {c.caption: n for c, n in zip(compositions, missed) if n}
    return {"method": method, **numbers, "distance over seeds": mean_distance(pictures, each), "wrong": wrong}


def table(rows: Sequence[dict]) -> str:
    """Rows as Markdown: percentages with their intervals."""
    lines = ["| | " + " | ".join(MEASURES) + " | distance over seeds |", "|---" * (len(MEASURES) + 2) + "|"]
    for r in rows:
        cells = [with_interval(r[m], "{:.1%}") for m in MEASURES]
        lines.append(f"| {r['method']} | {' | '.join(cells)} | {r['distance over seeds']:.3f} |")
    return "\n".join(lines)


def degraded(pictures: Tensor) -> dict[str, Tensor]:
    """uint8 [N, 3, H, W] in the ways that drawn pictures may fall short of rendered ones."""
    x, generator = pictures.float() / 255, torch.Generator().manual_seed(JUDGING_SEED)
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
    """The held-out compositions that a model's compositions.json lists, or ``limit`` of them, evenly chosen."""
    captions = [entry["caption"] for entry in json.loads(path.read_text(encoding="utf-8")) if entry["held_out"]]
    known = compositions_of(captions)
    chosen = np.linspace(0, len(captions) - 1, min(limit or len(captions), len(captions))).round().astype(int)
    return [known[i] for i in chosen]


def drawings(sd: StableDiffusion, args: Settings, prompts: list[str]) -> dict[str, Tensor]:
    """The prompts drawn by teacher, conditional model and, with a LoRA, student: uint8 [N, 3, H, W] each."""
    learned = read_lora(args.lora).metadata if args.lora else {}
    guidance = args.guidance if args.guidance is not None else float(learned.get("guidance", 2.5))
    options = dict(steps=args.steps, guidance=guidance, batch=args.batch, progress=True)
    options |= dict(negative_prompt=learned.get("negative_prompt", ""))
    drawn = {f"teacher, guidance {guidance:g}": draw(sd, "teacher", prompts, **options)}
    drawn["no guidance"] = draw(sd, "no guidance", prompts, **options)
    if args.lora:
        sd.unet = load_lora(sd.unet, args.lora)
        merge_lora(sd.unet)
        drawn["student, one pass"] = draw(sd, "student", prompts, **options)
    return {method: pixels(d.images) for method, d in drawn.items()}


def main(argv: list[str] | None = None) -> None:
    args = parse(Settings, __doc__, argv)
    if args.seeds < 2:
        raise ValueError("--seeds has to be 2 at least, for a distance over seeds.")
    compositions = held_out(args.model / "compositions.json", args.limit)
    classifier = load_classifier(args.work, args.font)
    if args.check:
        judged = degraded(render(compositions, args.seeds, JUDGING_SEED, font=args.font)[0])
    else:
        prompts = [c.caption for c in compositions for _ in range(args.seeds)]
        judged = drawings(load(args.model, device=args.device), args, prompts)
        size = next(iter(judged.values())).shape[-1]
        judged["rendered"] = render(compositions, args.seeds, JUDGING_SEED, size, args.font)[0]
    rows = [row(m, judge(p, compositions, classifier, args.font), p, compositions) for m, p in judged.items()]
    print(f"{len(compositions)} held-out compositions, {args.seeds} pictures each\n\n{table(rows)}")
    if args.out:
        made = made_by("minidistill.pocket.judge", sys.argv[1:] if argv is None else argv)
        counts = dict(compositions=len(compositions), seeds=args.seeds, steps=args.steps)
        write_json(args.out, made | counts | dict(rows=rows))


if __name__ == "__main__":
    with one_sentence("minidistill.pocket.judge", "stopped."):
        main()
