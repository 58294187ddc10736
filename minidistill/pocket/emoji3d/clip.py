"""Stage 1: train a small CLIP. Its frozen text encoder conditions the UNet; both halves together score images."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from minidistill.distill import learning_rate
from minidistill.pocket.clip import MAX_LOGIT_SCALE, clip_config, tokenize
from minidistill.pocket.emoji3d.compositions import Composition
from minidistill.pocket.emoji3d.images import Renderer, as_tensors
from minidistill.pocket.images import to_pixels

PATCH_SIZE = 8  # pixels: a thing of a pair is 27 pixels large


@torch.no_grad()
def embed_captions(model: CLIPModel, compositions: Sequence[Composition], tokenizer: CLIPTokenizer) -> Tensor:
    """The unit embeddings [C, D] of the compositions' captions."""
    ids = tokenize([c.caption for c in compositions], tokenizer).to(model.device)
    features = [model.get_text_features(input_ids=some).pooler_output for some in ids.split(1024)]
    return F.normalize(torch.cat(features), dim=-1)


def train_clip(
    compositions: Sequence[Composition],
    renderer: Renderer,
    tokenizer: CLIPTokenizer,
    steps: int,
    batch: int = 128,
    lr: float = 1e-3,
    warmup: int = 50,
    weight_decay: float = 0.2,
    bfloat16: bool = False,
) -> CLIPModel:
    """Train a CLIP from scratch on renders of the compositions, with CLIP's symmetric loss (section 2.3).

    The compositions of a batch are distinct, so no caption is a negative for its own image.
    """
    torch.manual_seed(0)
    model = CLIPModel(clip_config(tokenizer, PATCH_SIZE)).to(renderer.device).train()
    ids = tokenize([c.caption for c in compositions], tokenizer).to(renderer.device)  # [C, L]
    things, rgb = as_tensors(compositions, renderer.device)

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]  # no weight decay for biases, gains and the temperature
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    batch = min(batch, len(compositions))
    target = torch.arange(batch, device=renderer.device)
    progress = tqdm(range(steps), desc="clip", unit="step", mininterval=1)
    for step in progress:
        some = torch.randperm(len(compositions))[:batch].to(renderer.device)
        pixels = to_pixels(renderer.draw(things[some], rgb[some]))
        with torch.autocast(renderer.device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(input_ids=ids[some], pixel_values=pixels).logits_per_image.float()  # [B, B]
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def tune_image_encoder(
    model: CLIPModel,
    compositions: Sequence[Composition],
    renderer: Renderer,
    tokenizer: CLIPTokenizer,
    steps: int,
    batch: int = 128,
    lr: float = 1e-3,
    warmup: int = 50,
    bfloat16: bool = False,
) -> None:
    """Train the image encoder further, against the captions of *all* compositions; the text encoder is fixed.

    ``train_clip`` tells an image from 127 others in the batch, most of them very different; here it is told from every
    caption. As the text encoder is fixed, its embeddings are computed once, and the UNet's conditioning stays the same.
    """
    captions = embed_captions(model, compositions, tokenizer)  # [C, D]
    things, rgb = as_tensors(compositions, renderer.device)
    parameters = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.2, fused=True)
    progress = tqdm(range(steps), desc="clip, images", unit="step", mininterval=1)
    model.train()
    for step in progress:
        some = torch.randint(len(compositions), (batch,), device=renderer.device)
        pixels = to_pixels(renderer.draw(things[some], rgb[some]))
        with torch.autocast(renderer.device.type, torch.bfloat16, enabled=bfloat16):
            features = model.get_image_features(pixel_values=pixels).pooler_output  # [B, D]
        features = F.normalize(features.float(), dim=-1)
        loss = F.cross_entropy(model.logit_scale.detach().exp() * features @ captions.T, some)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


@torch.no_grad()
def nearest_captions(model: CLIPModel, images: Tensor, captions: Tensor) -> Tensor:
    """uint8 images [N, 3, H, W] and unit embeddings [C, D] -> the index of the caption nearest to each image, [N]."""
    features = [model.get_image_features(pixel_values=to_pixels(some)).pooler_output for some in images.split(256)]
    return (torch.cat(features) @ captions.T).argmax(1)
