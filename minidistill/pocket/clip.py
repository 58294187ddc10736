"""Stage 1: train a small CLIP. Its frozen text encoder conditions the UNet; both halves together score images."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from minidistill.distill import learning_rate
from minidistill.formats.files import atomic_write, write_json
from minidistill.pocket.compositions import Composition
from minidistill.pocket.images import Renderer, as_tensors, to_pixels
from minidistill.training.cuda_graph import set_learning_rate

PATCH_SIZE = 8  # pixels: a thing of a pair is 27 pixels large
MAX_LOGIT_SCALE = math.log(100)  # as in CLIP
LEARNING_RATE, WARMUP, WEIGHT_DECAY = 1e-3, 50, 0.2


def clip_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
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
    images = dict(image_size=64, patch_size=PATCH_SIZE, num_hidden_layers=4)
    return CLIPConfig(text_config=text | shared, vision_config=images | shared, projection_dim=128)


def tokenize(captions: list[str], tokenizer: CLIPTokenizer) -> Tensor:
    """Captions -> token ids, int64 [B, L], padded to the longest (attention is causal, so padding changes nothing)."""
    return tokenizer(captions, padding=True, truncation=True, return_tensors="pt").input_ids


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
    bfloat16: bool = False,
) -> CLIPModel:
    """Train a CLIP from scratch on renders of the compositions, with CLIP's symmetric loss (section 2.3).

    The compositions of a batch are distinct, so no caption is a negative for its own image.
    """
    torch.manual_seed(0)
    model = CLIPModel(clip_config(tokenizer)).to(renderer.device).train()
    ids = tokenize([c.caption for c in compositions], tokenizer).to(renderer.device)  # [C, L]
    things, rgb = as_tensors(compositions, renderer.device)

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]  # no weight decay for biases, gains and the temperature
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    batch = min(batch, len(compositions))
    target = torch.arange(batch, device=renderer.device)

    def loss() -> Tensor:
        some = torch.randperm(len(compositions))[:batch].to(renderer.device)
        pixels = to_pixels(renderer.draw(things[some], rgb[some]))
        with torch.autocast(renderer.device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(input_ids=ids[some], pixel_values=pixels).logits_per_image.float()  # [B, B]
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    for _ in minimise(loss, optimizer, steps, "clip"):
        model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)
    return model.eval()


def tune_image_encoder(
    model: CLIPModel,
    compositions: Sequence[Composition],
    renderer: Renderer,
    tokenizer: CLIPTokenizer,
    steps: int,
    batch: int = 128,
    bfloat16: bool = False,
) -> None:
    """Train the image encoder further, against the captions of *all* compositions; the text encoder is fixed.

    ``train_clip`` tells an image from 127 others in the batch, most of them very different; here it is told from every
    caption. As the text encoder is fixed, its embeddings are computed once, and the UNet's conditioning stays the same.
    """
    captions = embed_captions(model, compositions, tokenizer)  # [C, D]
    things, rgb = as_tensors(compositions, renderer.device)
    parameters = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True)
    model.train()

    def loss() -> Tensor:
        some = torch.randint(len(compositions), (batch,), device=renderer.device)
        pixels = to_pixels(renderer.draw(things[some], rgb[some]))
        with torch.autocast(renderer.device.type, torch.bfloat16, enabled=bfloat16):
            features = model.get_image_features(pixel_values=pixels).pooler_output  # [B, D]
        features = F.normalize(features.float(), dim=-1)
        return F.cross_entropy(model.logit_scale.detach().exp() * features @ captions.T, some)

    for _ in minimise(loss, optimizer, steps, "clip, images"):
        pass
    model.eval()


def minimise(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, steps: int, name: str) -> Iterator[None]:
    """Update by ``loss()`` ``steps`` times, with warm-up and cosine, gradients clipped at norm 1; yields after each."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    progress = tqdm(range(steps), desc=name, unit="step", mininterval=1)
    for step in progress:
        set_learning_rate(optimizer, learning_rate(step, steps, LEARNING_RATE, WARMUP))
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield
        if step % 20 == 0:
            progress.set_postfix(loss=f"{value.item():.3f}")


@torch.no_grad()
def nearest_captions(model: CLIPModel, images: Tensor, captions: Tensor) -> Tensor:
    """uint8 images [N, 3, H, W] and unit embeddings [C, D] -> the index of the caption nearest to each image, [N]."""
    features = [model.get_image_features(pixel_values=to_pixels(some)).pooler_output for some in images.split(256)]
    return (torch.cat(features) @ captions.T).argmax(1)


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
