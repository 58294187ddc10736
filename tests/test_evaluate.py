"""evaluate.py: the measures have the values they must have where those are known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ROOT, error
from torch import Tensor, nn

from minidistill import StableDiffusion, inject_lora
from minidistill.evaluate import ClipScore, comparison_grid, draw, noise_error_share, psnr

PROMPTS = ["a red apple", "a green pear", "a rocket on a purple background"]
GUIDANCE = 4.0


class Imitation(nn.Module):
    """A UNet whose student misses ``1 - learned`` of the guidance towards ``uncond``, exactly."""

    def __init__(self, learned: float, uncond: Tensor):
        super().__init__()
        self.learned, self.uncond = learned, uncond

    def forward(self, z_t: Tensor, t: Tensor, context: Tensor, lora_enabled: bool = False) -> Tensor:
        def eps(c: Tensor) -> Tensor:
            return 0.3 * torch.tanh(z_t * c.flatten(1).std(1)[:, None, None, None] + c[:, -1, :4, None, None])

        cond, uncond = eps(context), eps(self.uncond.expand_as(context))
        return cond + self.learned * (GUIDANCE - 1) * (cond - uncond) if lora_enabled else cond


@pytest.mark.parametrize("learned, expected", [(1.0, 0.0), (0.0, 1.0), (0.5, 0.25), (-1.0, 4.0)])
def test_noise_error_share(learned: float, expected: float, sd: StableDiffusion):
    sd.unet = Imitation(learned, sd.encode_prompt([""]))
    share = noise_error_share(sd, PROMPTS, steps=4, guidance=GUIDANCE, batch=2)
    assert abs(share.pooled - expected) < 1e-5
    assert share.errors.shape == share.gaps.shape == (4,)
    assert ((share.errors / share.gaps - expected).abs() < 1e-4).all()


def test_noise_error_share_of_a_negative_prompt(sd: StableDiffusion):
    sd.unet = Imitation(1.0, sd.encode_prompt(["a cat"]))
    share = noise_error_share(sd, PROMPTS, steps=2, guidance=GUIDANCE, negative_prompt="a cat")
    assert share.pooled < 1e-5


def test_noise_error_share_does_not_depend_on_the_batch(sd: StableDiffusion):
    sd.unet = inject_lora(sd.unet, rank=2)
    one, three = (noise_error_share(sd, PROMPTS, steps=2, guidance=GUIDANCE, batch=batch) for batch in (1, 3))
    assert error(one.errors, three.errors) < 1e-4 and error(one.gaps, three.gaps) < 1e-4


def test_an_untrained_student_misses_all_of_the_guidance(sd: StableDiffusion):
    sd.unet = inject_lora(sd.unet, rank=2)
    assert abs(noise_error_share(sd, PROMPTS, steps=2, guidance=GUIDANCE).pooled - 1) < 1e-6


def flat(level: int) -> Image.Image:
    return Image.new("RGB", (8, 6), (level, level, level))


def test_psnr():
    found = psnr([flat(100), flat(110), flat(0)], [flat(100), flat(100), flat(255)])
    assert found[0] >= 99  # the same picture
    assert math.isclose(found[1], 20 * math.log10(255 / 10), abs_tol=1e-3)
    assert math.isclose(found[2], 0, abs_tol=1e-3)


def test_psnr_sees_every_pixel_and_channel():
    picture = np.zeros((6, 8, 3), dtype=np.uint8)
    picture[5, 7, 2] = 255
    expected = 10 * math.log10(6 * 8 * 3)
    assert math.isclose(psnr([Image.fromarray(picture)], [flat(0)])[0], expected, abs_tol=1e-3)


@pytest.mark.parametrize("method, calls", [("teacher", 6), ("no guidance", 3), ("student", 3)])
def test_drawn_says_what_a_picture_cost(method: str, calls: int, sd: StableDiffusion):
    sd.unet = inject_lora(sd.unet, rank=2)
    counted = []
    sd.unet.get_submodule("conv_in").register_forward_hook(lambda *_: counted.append(1))
    drawn = draw(sd, method, PROMPTS[:2], steps=3, guidance=GUIDANCE)
    assert drawn.unet_calls == len(counted) == calls
    assert drawn.method == method and len(drawn.images) == 2 and drawn.seconds > 0


def test_methods_start_from_the_same_noise(sd: StableDiffusion):
    """An untrained student is the teacher without guidance, pixel by pixel."""
    sd.unet = inject_lora(sd.unet, rank=2)
    student, unguided = (draw(sd, method, PROMPTS, steps=2, guidance=GUIDANCE) for method in ("student", "no guidance"))
    assert all(np.array_equal(a, b) for a, b in zip(student.images, unguided.images))


def test_grid_shows_every_picture(sd: StableDiffusion):
    sd.unet = inject_lora(sd.unet, rank=2)
    rows = [draw(sd, method, PROMPTS, steps=1, guidance=GUIDANCE) for method in ("teacher", "student")]
    for i, row in enumerate(rows):
        row.images = [Image.new("RGB", (16, 16), (10 * i + 50, 10 * j + 50, 200)) for j in range(3)]
    sheet = np.asarray(comparison_grid(rows, PROMPTS, side=64)).reshape(-1, 3)
    found = {tuple(pixel) for pixel in sheet[(sheet[:, 2] == 200)].tolist()}
    assert found >= {(10 * i + 50, 10 * j + 50, 200) for i in range(2) for j in range(3)}


def test_grid_takes_any_prompt(sd: StableDiffusion):
    rows = [draw(sd, "teacher", PROMPTS[:1], steps=1, guidance=1.0)]
    for prompt in ("", "x" * 500, "a prompt of many words " * 30, "苹果\n\t"):
        comparison_grid(rows, [prompt])


CLIP = ROOT / "weights/pocket-emoji/clip"


@pytest.mark.skipif(not (CLIP / "model.safetensors").is_file(), reason="weights/pocket-emoji has no clip")
def test_clip_score_is_transformers_logit(sd: StableDiffusion):
    score = ClipScore(CLIP, sd.tokenizer)
    images = [flat(0), flat(255), Image.linear_gradient("L").convert("RGB")]
    inputs = score.preprocess(images, return_tensors="pt") | dict(
        score.tokenizer(PROMPTS, padding="max_length", return_tensors="pt")
    )
    with torch.no_grad():
        reference = score.model(**inputs).logits_per_image.diagonal() / score.model.logit_scale.exp() * 100
    assert error(score(images, PROMPTS), reference) < 1e-4


def test_a_missing_clip_is_an_error(sd: StableDiffusion, tmp_path: Path):
    with pytest.raises(OSError):
        ClipScore(tmp_path / "nowhere", sd.tokenizer)
