"""Stage 1: a small CLIP. Its text encoder, frozen, conditions the UNet; both halves together score pictures later."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from minidistill.distill import learning_rate
from minidistill.formats.files import written_whole
from minidistill.formats.model_configs import write_json
from minidistill.pocket.compositions import Composition
from minidistill.pocket.pictures import to_pixels
from minidistill.pocket.tokenizer import CONTEXT

MAX_LOGIT_SCALE = math.log(100)  # as in CLIP


def clip_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """Two transformers for captions and pictures of 64x64, and one embedding of both."""
    both = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4, projection_dim=128)
    text = dict(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # where the caption is pooled
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=CONTEXT,
        num_hidden_layers=3,
    )
    pictures = dict(image_size=64, patch_size=16, num_hidden_layers=4)
    return CLIPConfig(text_config=text | both, vision_config=pictures | both, projection_dim=128)


def tokenize(captions: list[str], tokenizer: CLIPTokenizer) -> Tensor:
    """Captions -> token ids, int64 [B, L], padded to the longest: attention is causal, so padding changes nothing."""
    return tokenizer(captions, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt").input_ids


def train_clip(
    compositions: list[Composition],
    pictures: Tensor,
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

    pictures: uint8 [N, 3, 64, 64]; index: int64 [N], the composition each picture shows. A batch holds distinct
    compositions, so that no caption is a negative of its own picture.
    """
    torch.manual_seed(seed)
    model = CLIPModel(clip_config(tokenizer)).train()
    ids = tokenize([c.caption for c in compositions], tokenizer)  # [C, L]
    trained = torch.tensor([i for i, c in enumerate(compositions) if not c.held_out])
    pictures_of = [(index == i).nonzero().squeeze(1) for i in range(len(compositions))]

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]  # biases, gains and the temperature do not decay
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    target = torch.arange(batch)
    progress = tqdm(range(steps), desc="clip", unit="step")
    for step in progress:
        chosen = trained[torch.randperm(len(trained))[:batch]]
        shown = torch.stack([pictures_of[i][torch.randint(len(pictures_of[i]), ())] for i in chosen.tolist()])
        logits = model(input_ids=ids[chosen], pixel_values=to_pixels(pictures[shown])).logits_per_image  # [B, B]
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def tune_pictures(
    model: CLIPModel,
    compositions: list[Composition],
    pictures: Tensor,
    index: Tensor,
    tokenizer: CLIPTokenizer,
    steps: int = 1500,
    batch: int = 128,
    lr: float = 1e-3,
) -> None:
    """Train the picture half on, against the captions of *all* trained compositions; the text half stays as it is.

    In a batch of 128 a picture is told from 127 others, most of them very different; here from every caption there is.
    With the text half fixed the captions' embeddings are computed once, and the UNet's conditioning does not change.
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
    progress = tqdm(range(steps), desc="clip, pictures", unit="step")
    model.train()
    for _ in progress:
        shown = usable[torch.randint(len(usable), (batch,))]
        seen = model.get_image_features(pixel_values=to_pixels(pictures[shown])).pooler_output
        logits = model.logit_scale.detach().exp() * F.normalize(seen, dim=-1) @ texts.T  # [B, C]
        loss = F.cross_entropy(logits, row[index[shown]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def save_clip(model: CLIPModel, folder: str | Path) -> None:
    """Write `clip/` (the whole CLIPModel) and `text_encoder/` (its text half, as Stable Diffusion names it) in fp16.

    The model given is turned into fp16 on the way.
    """
    clip, text_encoder = Path(folder) / "clip", Path(folder) / "text_encoder"
    model = model.half()
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

    # save_pretrained would leave out the prefix that the published checkpoints have.
    text_encoder.mkdir(parents=True, exist_ok=True)
    config = model.text_model.config
    config.architectures = ["CLIPTextModel"]
    config.dtype = torch.float32  # transformers would take the file's fp16, and diffusers a float32 UNet beside it
    config.save_pretrained(text_encoder)
    weights = {f"text_model.{key}": value.contiguous() for key, value in model.text_model.state_dict().items()}
    with written_whole(text_encoder / "model.safetensors") as beside:
        save_file(weights, beside, metadata={"format": "pt"})


@torch.no_grad()
def held_out_accuracy(
    model: CLIPModel, compositions: list[Composition], pictures: Tensor, index: Tensor, tokenizer: CLIPTokenizer
) -> float:
    """Share of the held-out compositions' pictures whose nearest caption, among all compositions', is their own."""
    held_out = torch.tensor([c.held_out for c in compositions])[index]
    pictures, index = pictures[held_out], index[held_out]
    captions = model.get_text_features(input_ids=tokenize([c.caption for c in compositions], tokenizer)).pooler_output
    captions = F.normalize(captions, dim=-1)  # [C, D]
    right = 0
    for some, own in zip(pictures.split(256), index.split(256)):
        seen = model.get_image_features(pixel_values=to_pixels(some)).pooler_output  # [B, D]
        right += ((seen @ captions.T).argmax(dim=1) == own).sum().item()
    return right / len(index)
