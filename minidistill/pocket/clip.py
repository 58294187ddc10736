"""Stage 1: train a small CLIP. Its frozen text encoder conditions the UNet; both halves together score images."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from minidistill.distill import learning_rate
from minidistill.formats.files import write_json
from minidistill.formats.tensor_files import write_tensors
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


@torch.no_grad()
def embed_captions(model: CLIPModel, ids: Tensor) -> Tensor:
    """Token ids [C, L] -> unit embeddings [C, D]."""
    features = [model.get_text_features(input_ids=some).pooler_output for some in ids.split(1024)]
    return F.normalize(torch.cat(features), dim=-1)


def train_clip(
    compositions: Sequence[Composition],
    renderer: Renderer,
    tokenizer: CLIPTokenizer,
    steps: int,
    batch: int,
    bfloat16: bool,
) -> CLIPModel:
    """Train a CLIP on renders of the compositions: both encoders for ``steps``, then the image encoder for as many.

    First by CLIP's symmetric loss (section 2.3), which tells an image from 127 others, most of them very different. The
    compositions of a batch are distinct, so no caption is a negative for its own image. Then each image is told from
    the captions of *all* compositions. Their embeddings are computed once, because the text encoder is fixed by then.
    """
    torch.manual_seed(0)
    device = renderer.device
    model = CLIPModel(clip_config(tokenizer)).to(device).train()
    # Padded to the longest: attention is causal, so padding changes nothing.
    tokens = tokenizer([c.caption for c in compositions], padding=True, truncation=True, return_tensors="pt")
    ids = tokens.input_ids.to(device)  # [C, L]
    things, rgb = as_tensors(compositions, device)
    precision = partial(torch.autocast, device.type, torch.bfloat16, enabled=bfloat16)
    batch = min(batch, len(compositions))
    target = torch.arange(batch, device=device)

    def draw(some: Tensor) -> Tensor:
        return to_pixels(renderer.draw(things[some], rgb[some]))

    def symmetric_loss() -> Tensor:
        some = torch.randperm(len(compositions))[:batch].to(device)
        pixels = draw(some)
        with precision():
            logits = model(input_ids=ids[some], pixel_values=pixels).logits_per_image.float()  # [B, B]
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]  # no weight decay for biases, gains and the temperature
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    for _ in minimise(symmetric_loss, groups, steps, "clip"):
        model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)

    captions = embed_captions(model, ids)  # [C, D]

    def loss_of_images() -> Tensor:
        some = torch.randint(len(compositions), (batch,), device=device)
        pixels = draw(some)
        with precision():
            features = model.get_image_features(pixel_values=pixels).pooler_output  # [B, D]
        features = F.normalize(features.float(), dim=-1)
        return F.cross_entropy(model.logit_scale.detach().exp() * features @ captions.T, some)

    parameters = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    for _ in minimise(loss_of_images, [{"params": parameters, "weight_decay": WEIGHT_DECAY}], steps, "clip, images"):
        pass
    return model.eval()


def minimise(loss: Callable[[], Tensor], groups: list[dict], steps: int, name: str) -> Iterator[None]:
    """Update by ``loss()`` ``steps`` times, with warm-up and cosine, gradients clipped at norm 1; yields after each."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    trained = [p for group in groups for p in group["params"]]
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


def save_clip(model: CLIPModel, folder: Path) -> None:
    """Write `clip/` (the whole CLIPModel) and `text_encoder/` (its text half, where Stable Diffusion has it) in fp16.

    Moves ``model`` itself to the CPU and casts it to fp16.
    """
    clip, text_encoder = folder / "clip", folder / "text_encoder"
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
    config = model.text_model.config
    config.architectures = ["CLIPTextModel"]
    config.dtype = torch.float32  # not fp16 as in the file: transformers would load that, and diffusers a float32 UNet
    config.save_pretrained(text_encoder)
    weights = {f"text_model.{key}": value for key, value in model.text_model.state_dict().items()}
    write_tensors(text_encoder / "model.safetensors", weights, {})
