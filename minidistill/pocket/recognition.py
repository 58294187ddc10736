"""Recognise the background, and what stands on it, in the images of the emoji model from their pixels alone.

The background is the median colour of the border. Each thing is identified twice: as the nearest of all things, drawn
at several sizes and places, and by a small classifier trained on rendered images only.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from minidistill.formats.files import digest
from minidistill.formats.tensor_files import read_tensors, write_tensors
from minidistill.pocket.compositions import COLOURS, THINGS
from minidistill.pocket.images import ALONE, IN_A_PAIR, NOTHING, Renderer, centred, find_emoji, stamp

CROP_SIDE = 32  # pixels a side at which one thing is judged
SIZE_IN_A_CROP = (ALONE[0], 2 * IN_A_PAIR[1])  # smallest and largest; a pair's crop is half an image wide
TEMPLATE_SIZES = 6  # sizes of each thing, in this range
TEMPLATE_SHIFT = 2  # pixels each way, the largest shift from the middle of a crop
SEED = 1001  # of the classifier; the model's training images have seed 0


def border_colour(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> the median of the outermost pixels, in [0, 1], [N, 3]."""
    ring = torch.ones(images.shape[2:], dtype=torch.bool)
    ring[1:-1, 1:-1] = False
    return images[:, :, ring].float().median(-1).values / 255


def background(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> the index in COLOURS of the colour nearest to the border's, int64 [N]."""
    named = torch.tensor(list(COLOURS.values())) / 255
    return torch.cdist(border_colour(images), named).argmin(1)


@lru_cache(maxsize=1)
def templates(folder: Path) -> Tensor:
    """Every thing at several sizes, [E * TEMPLATE_SIZES, 4, h, w] in [0, 1]: colour times coverage, and coverage."""
    fine = 4 * CROP_SIDE  # half the side of the package's images
    sizes = [share * fine for share in np.linspace(*SIZE_IN_A_CROP, TEMPLATE_SIZES)]
    images = (stamp(emoji, folder) for emoji in THINGS)
    stamps = [centred(image, size, fine) for image in images for size in sizes]
    return F.adaptive_avg_pool2d(torch.stack(stamps).float() / 255, CROP_SIDE)


def crops(images: Tensor, pair: bool) -> Tensor:
    """Crops that hold one thing each: the whole image, or for a pair the left and the right half of its middle.

    uint8 [N, 3, S, S] -> [N, 1, 3, h, w], for pairs [N, 2, 3, h, w], in [0, 1], with h = w = CROP_SIDE.
    """
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


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [B, 3, H, W]."""
    radius = max(1, round(3 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / max(sigma, 1e-3)) ** 2)
    kernel = (weights / weights.sum()).expand(3, 1, 1, -1)
    x = F.conv2d(F.pad(x, [radius] * 4, "replicate"), kernel, groups=3)
    return F.conv2d(x, kernel.transpose(2, 3), groups=3)


def train_classifier(renderer: Renderer, steps: int = 2000, batch: int = 32) -> nn.Sequential:
    """Train on renders with random backgrounds, a little blurred and noisy to make the classifier robust."""
    torch.manual_seed(SEED)
    model = build_classifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    progress = tqdm(range(steps), desc="classifier", unit="step")
    for step in progress:
        things, pair = torch.randint(len(THINGS), (batch, 2)), step % 2 == 1
        if not pair:
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
    """The classifier in ``work`` for THINGS and their images in ``emoji``.

    If the one there learned others, or there is none, it is trained first, which takes a few minutes.
    """
    path = work / "judge.safetensors"
    images = b"".join(find_emoji(thing, emoji).read_bytes() for thing in THINGS)
    learned = {"things": " ".join(THINGS), "images": digest(images)}
    if not path.exists() or not learned.items() <= read_tensors(path)[1].items():
        write_tensors(path, train_classifier(Renderer(emoji)).state_dict(), learned)
    model = build_classifier()
    model.load_state_dict(read_tensors(path)[0])
    return model.eval()


@torch.no_grad()
def identity_by_classifier(crops: Tensor, model: nn.Module, batch: int = 256) -> Tensor:
    """[K, 3, h, w] -> the row in THINGS, int64 [K]."""
    return torch.cat([model(some).argmax(1) for some in crops.split(batch)])
