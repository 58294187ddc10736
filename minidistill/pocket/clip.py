"""Stage 1: train a small CLIP. Its frozen text encoder conditions the UNet; both halves together score images."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from minidistill.distill import learning_rate
from minidistill.formats.files import atomic_write, write_json
from minidistill.pocket.compositions import Composition
from minidistill.pocket.images import to_pixels
from minidistill.pocket.stage import set_learning_rate, update

MAX_LOGIT_SCALE = math.log(100)  # as in CLIP


def clip_config(tokenizer: CLIPTokenizer, patch_size: int = 16) -> CLIPConfig:
    """The configuration of two small transformers, for captions and for 64x64 images, with a shared embedding."""
    shared = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4, projection_dim=128)
    text = dict(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # the caption's embedding is taken there
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=tokenizer.model_max_length,
        num_hidden_layers=3,
    )
    images = dict(image_size=64, patch_size=patch_size, num_hidden_layers=4)
    return CLIPConfig(text_config=text | shared, vision_config=images | shared, projection_dim=128)


def tokenize(captions: list[str], tokenizer: CLIPTokenizer) -> Tensor:
    """Captions -> token ids, int64 [B, L], padded to the longest (attention is causal, so padding changes nothing)."""
    return tokenizer(captions, padding=True, truncation=True, return_tensors="pt").input_ids


def train_clip(
    compositions: list[Composition],
    images: Tensor,
    index: Tensor,
    tokenizer: CLIPTokenizer,
    steps: int = 1000,
    batch: int = 128,
    lr: float = 1e-3,
    warmup: int = 50,
    weight_decay: float = 0.2,
    seed: int = 0,
) -> CLIPModel:
    """Train a CLIP from scratch on the compositions that are not held out, with CLIP's symmetric loss (section 2.3).

    images: uint8 [N, 3, 64, 64]; index: int64 [N], the composition of each image. The compositions of a batch are
    distinct, so no caption is a negative for its own image.
    """
    torch.manual_seed(seed)
    model = CLIPModel(clip_config(tokenizer)).train()
    ids = tokenize([c.caption for c in compositions], tokenizer)  # [C, L]
    trained = torch.tensor([i for i, c in enumerate(compositions) if not c.held_out])
    images_of = [(index == i).nonzero().squeeze(1) for i in range(len(compositions))]

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]  # no weight decay for biases, gains and the temperature
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    target = torch.arange(batch)
    progress = tqdm(range(steps), desc="clip", unit="step")
    for step in progress:
        chosen = trained[torch.randperm(len(trained))[:batch]]
        rows = torch.stack([images_of[i][torch.randint(len(images_of[i]), ())] for i in chosen.tolist()])
        logits = model(input_ids=ids[chosen], pixel_values=to_pixels(images[rows])).logits_per_image  # [B, B]
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        set_learning_rate(optimizer, learning_rate(step, steps, lr, warmup))
        update(loss, optimizer, model.parameters())
        model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def tune_image_encoder(
    model: CLIPModel,
    compositions: list[Composition],
    images: Tensor,
    index: Tensor,
    tokenizer: CLIPTokenizer,
    steps: int = 1500,
    batch: int = 128,
    lr: float = 1e-3,
) -> None:
    """Train the image encoder further, against the captions of *all* trained compositions; the text encoder is fixed.

    ``train_clip`` tells an image from 127 others in the batch, most of them very different; here it is told from every
    caption. As the text encoder is fixed, its embeddings are computed once, and the UNet's conditioning stays the same.
    """
    trained = torch.tensor([i for i, c in enumerate(compositions) if not c.held_out])
    captions = tokenize([compositions[i].caption for i in trained], tokenizer)
    with torch.no_grad():
        texts = F.normalize(model.get_text_features(input_ids=captions).pooler_output, dim=-1)  # [C, D]
    row = torch.full((len(compositions),), -1)
    row[trained] = torch.arange(len(trained))
    usable = (row[index] >= 0).nonzero().squeeze(1)

    parameters = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    progress = tqdm(range(steps), desc="clip, images", unit="step")
    model.train()
    for _ in progress:
        chosen = usable[torch.randint(len(usable), (batch,))]
        features = model.get_image_features(pixel_values=to_pixels(images[chosen])).pooler_output
        logits = model.logit_scale.detach().exp() * F.normalize(features, dim=-1) @ texts.T  # [B, C]
        loss = F.cross_entropy(logits, row[index[chosen]])
        update(loss, optimizer, parameters)
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def save_clip(model: CLIPModel, folder: str | Path) -> None:
    """Write `clip/` (the whole CLIPModel) and `text_encoder/` (its text half, where Stable Diffusion has it) in fp16.

    Moves ``model`` itself to the CPU and casts it to fp16.
    """
    clip, text_encoder = Path(folder) / "clip", Path(folder) / "text_encoder"
    model = model.cpu().half()
    model.save_pretrained(clip)
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 64},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": 64, "width": 64},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,  # to [-1, 1], as in training
        "image_std": [0.5] * 3,
    }
    write_json(clip / "preprocessor_config.json", preprocessor)

    # Not save_pretrained, which would omit the prefix of the published checkpoints.
    text_encoder.mkdir(parents=True, exist_ok=True)
    config = model.text_model.config
    config.architectures = ["CLIPTextModel"]
    config.dtype = torch.float32  # not fp16 as in the file: transformers would load that, and diffusers a float32 UNet
    config.save_pretrained(text_encoder)
    weights = {f"text_model.{key}": value.contiguous() for key, value in model.text_model.state_dict().items()}
    with atomic_write(text_encoder / "model.safetensors") as file:
        save_file(weights, file, metadata={"format": "pt"})


@torch.no_grad()
def held_out_accuracy(
    model: CLIPModel, compositions: list[Composition], images: Tensor, index: Tensor, tokenizer: CLIPTokenizer
) -> float:
    """The share of held-out images whose nearest caption, among those of all compositions, is their own."""
    held_out = torch.tensor([c.held_out for c in compositions])[index]
    images, index = images[held_out], index[held_out]
    captions = model.get_text_features(input_ids=tokenize([c.caption for c in compositions], tokenizer)).pooler_output
    captions = F.normalize(captions, dim=-1)  # [C, D]
    right = 0
    for some, own in zip(images.split(256), index.split(256)):
        features = model.get_image_features(pixel_values=to_pixels(some)).pooler_output  # [B, D]
        right += ((features @ captions.T).argmax(dim=1) == own).sum().item()
    return right / len(index)
