"""pipeline.py: the same seed draws the same picture, however it is batched, at the cost that is said."""

import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import error, fill_up, randn
from torch import nn

from minidistill import CheckpointError, StableDiffusion, inject_lora, load, merge_lora, pipeline
from minidistill.pipeline import at_work, to_images
from minidistill.samplers import ddim_sample

APPLE, ROCKET = "a red apple", "a rocket on a purple background"


def pixels(pictures: list) -> np.ndarray:
    return np.stack([np.asarray(picture, dtype=int) for picture in pictures])


@pytest.fixture
def student(sd: StableDiffusion) -> StableDiffusion:
    sd.unet = fill_up(inject_lora(sd.unet, rank=2))
    return sd


def test_same_seed_same_picture(sd: StableDiffusion):
    first, again, other = (pixels(sd.sample([APPLE], steps=2, seed=seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_model_loaded_again_draws_the_same(sd: StableDiffusion, tiny_model: Path):
    again = load(tiny_model).sample([APPLE], steps=2)
    assert np.array_equal(pixels(sd.sample([APPLE], steps=2)), pixels(again))


def test_the_i_th_picture_has_the_i_th_seed(sd: StableDiffusion):
    together = pixels(sd.sample([APPLE, APPLE], steps=2, seed=3))
    apart = pixels(sd.sample([APPLE], steps=2, seed=3) + sd.sample([APPLE], steps=2, seed=4))
    assert np.abs(together - apart).max() <= 1


@pytest.mark.parametrize("lora_enabled", [False, True])
def test_a_picture_does_not_depend_on_the_batch(lora_enabled: bool, student: StableDiffusion):
    prompts = [APPLE, ROCKET, APPLE]
    cond, z_T = student.encode_prompt(prompts), student.starting_noise(range(3))
    uncond = student.encode_prompt([""]).expand_as(cond)

    def end(rows: slice) -> torch.Tensor:
        model = student.denoiser(cond[rows], uncond[rows], 5.0, lora_enabled)
        return list(ddim_sample(model, student.schedule, z_T[rows], 3))[-1]

    alone = torch.cat([end(slice(i, i + 1)) for i in range(3)])
    assert error(end(slice(None)), alone) < 1e-4
    one, three = (pixels(student.sample(prompts, steps=3, lora_enabled=lora_enabled, batch=b)) for b in (1, 3))
    assert np.abs(one - three).max() <= 1


def test_prompt_guidance_and_negative_prompt_matter(sd: StableDiffusion):
    options = [dict(), dict(guidance=2.0), dict(guidance=1.0), dict(negative_prompt=ROCKET), dict(prompts=[ROCKET])]
    pictures = [pixels(sd.sample(**(dict(prompts=[APPLE], steps=2) | changes))).tobytes() for changes in options]
    assert len(set(pictures)) == len(options)


def test_a_string_is_one_prompt(sd: StableDiffusion):
    assert np.array_equal(pixels(sd.sample(APPLE, steps=1)), pixels(sd.sample([APPLE], steps=1)))


@pytest.mark.parametrize(
    "options, calls", [(dict(guidance=5.0), 6), (dict(guidance=1.0), 3), (dict(guidance=5.0, lora_enabled=True), 3)]
)
def test_calls_of_the_unet(options: dict, calls: int, student: StableDiffusion):
    seen = []
    student.unet.get_submodule("conv_in").register_forward_hook(lambda *_: seen.append(student.unet.switch.enabled))
    student.sample([APPLE], steps=3, **options)
    assert seen == [options.get("lora_enabled", False)] * calls


def test_merged_draws_what_the_student_draws(student: StableDiffusion):
    expected = pixels(student.sample([APPLE], steps=3, lora_enabled=True))
    merge_lora(student.unet)
    assert np.abs(pixels(student.sample([APPLE], steps=3, guidance=1.0)) - expected).max() <= 1


def test_size(sd: StableDiffusion):
    assert sd.sample([APPLE], steps=1)[0].size == (16, 16)
    assert sd.sample([APPLE], steps=1, height=24, width=32)[0].size == (32, 24)
    assert sd.sample([APPLE], steps=1, height=18, width=22)[0].size == (22, 18)  # 9 x 11 latents, which halve unevenly


@pytest.mark.parametrize("height, width", [(15, 16), (16, 17), (-16, 16)])
def test_a_size_that_cannot_be_is_refused(height: int, width: int, sd: StableDiffusion):
    with pytest.raises(ValueError, match="multiples of 2"):
        sd.sample([APPLE], steps=1, height=height, width=width)


def test_sizes_cost_nothing_when_refused(sd: StableDiffusion):
    sd.unet.register_forward_pre_hook(lambda *_: pytest.fail("the UNet was called"))
    with pytest.raises(ValueError):
        sd.sample([APPLE], height=15)


@pytest.mark.parametrize("steps", [0, 1001])
def test_steps_that_cannot_be_are_refused(steps: int, sd: StableDiffusion):
    with pytest.raises(ValueError, match=f"1 to 1000 steps, not {steps}"):
        sd.sample([APPLE], steps=steps)


def test_a_long_prompt_warns_of_what_is_cut(sd: StableDiffusion):
    read = " ".join(["apple"] * 14)
    with pytest.warns(UserWarning, match='16 tokens.*Cut off: "rocket cat"') as caught:
        found = sd.encode_prompt([f"{read} rocket cat"])
    assert len(caught) == 1
    assert torch.equal(found, sd.encode_prompt([read]))


def test_a_prompt_that_just_fits_does_not_warn(sd: StableDiffusion, recwarn: pytest.WarningsRecorder):
    sd.encode_prompt([" ".join(["apple"] * 14), ""])
    assert not [w for w in recwarn if "Cut off" in str(w.message)]


def test_prompts_are_encoded_one_by_one(sd: StableDiffusion):
    together = sd.encode_prompt([APPLE, ""])
    assert together.shape == (2, 16, 32)
    assert error(together, torch.cat([sd.encode_prompt([APPLE]), sd.encode_prompt([""])])) < 1e-5


def test_tokens_may_come_from_elsewhere(sd: StableDiffusion):
    ids = sd.tokenizer([APPLE], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(sd.encode_tokens(ids), sd.encode_prompt([APPLE]))


def test_another_tokenizer(tiny_model: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tokenizer = shutil.move(folder / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load(folder).encode_prompt([APPLE])
    found = load(folder, tokenizer=tokenizer).encode_prompt([APPLE])
    assert torch.equal(found, load(tiny_model).encode_prompt([APPLE]))


def test_a_tokenizer_of_bare_vocabulary_pads_to_the_encoders_context(sd: StableDiffusion, tmp_path: Path):
    for name in ("vocab.json", "merges.txt"):  # neither says how many tokens a prompt has
        shutil.copy(sd.tokenizer_folder / name, tmp_path)
    bare = load(sd.path, tokenizer=tmp_path)
    assert torch.equal(bare.encode_prompt([APPLE, ""]), sd.encode_prompt([APPLE, ""]))
    with pytest.warns(UserWarning, match="16 tokens"):
        bare.encode_prompt([" ".join(["apple"] * 15)])


def test_noise_depends_on_the_seed_alone(sd: StableDiffusion):
    torch.manual_seed(1)
    first = sd.starting_noise([5, 6])
    torch.manual_seed(2)
    assert torch.equal(sd.starting_noise([6]), first[1:])


def test_fresh_noise_belongs_to_a_picture(sd: StableDiffusion):
    """With eta the i-th picture is that of its own seed, whatever else is in its batch."""
    together = sd.sample([APPLE, APPLE, APPLE], steps=3, eta=1.0, seed=4)
    for i, picture in enumerate(together):
        alone = sd.sample([APPLE], steps=3, eta=1.0, seed=4 + i)[0]
        assert np.abs(np.asarray(picture, dtype=int) - np.asarray(alone, dtype=int)).max() <= 1
    plain = sd.sample([APPLE], steps=3, seed=4)[0]
    assert np.abs(np.asarray(together[0], dtype=int) - np.asarray(plain, dtype=int)).max() > 1


def test_sampling_leaves_the_global_generator_alone(sd: StableDiffusion):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sd.sample([APPLE], steps=2, eta=1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_bfloat16(tiny_model: Path, sd: StableDiffusion):
    narrow = load(tiny_model, dtype=torch.bfloat16)
    assert {p.dtype for part in (narrow.unet, narrow.vae, narrow.text_encoder) for p in part.parameters()} == {
        torch.bfloat16
    }
    assert np.abs(pixels(narrow.sample([APPLE], steps=2)) - pixels(sd.sample([APPLE], steps=2))).mean() < 8


def test_prediction_can_be_overridden(tiny_model: Path, sd: StableDiffusion):
    v = load(tiny_model, prediction="v")
    assert sd.schedule.prediction == "eps" and v.schedule.prediction == "v"
    assert not np.array_equal(pixels(v.sample([APPLE], steps=1)), pixels(sd.sample([APPLE], steps=1)))


def test_an_unknown_prediction_is_refused(tiny_model: Path):
    with pytest.raises(ValueError, match="sample"):
        load(tiny_model, prediction="sample")


def test_everything_is_frozen(sd: StableDiffusion):
    parameters = [p for part in (sd.unet, sd.vae, sd.text_encoder) for p in part.parameters()]
    assert parameters and not any(p.requires_grad for p in parameters)


def test_decoding_does_what_sample_does(sd: StableDiffusion):
    model = sd.denoiser(sd.encode_prompt([APPLE]), sd.encode_prompt([""]), 7.5)
    z_0 = list(ddim_sample(model, sd.schedule, sd.starting_noise([0]), 2))[-1]
    with torch.no_grad():
        expected = to_images(sd.vae.decode(z_0))
    assert np.array_equal(pixels(sd.sample([APPLE], steps=2)), pixels(expected))


def test_a_network_is_where_it_works_and_then_back():
    layer, places = nn.Linear(2, 2), []
    layer.to = lambda device: places.append(device.type)
    with pytest.raises(ValueError), at_work(layer, torch.device("cuda")):
        assert places == ["cuda"]
        raise ValueError
    assert places == ["cuda", "cpu"]


def test_text_encoder_and_vae_come_when_they_are_used(sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch):
    came = []
    monkeypatch.setattr(pipeline, "at_work", lambda network, device: nullcontext(came.append((network, device))))
    sd.sample([APPLE, ROCKET], steps=1)
    assert [network for network, _ in came] == [sd.text_encoder, sd.text_encoder, sd.vae]
    assert {device for _, device in came} == {sd.unet.conv_in.weight.device}


def test_to_images_rounds_and_clips():
    x = torch.tensor([-5.0, -1.0, 0.0, 0.2, 1.0, 5.0]).expand(1, 3, 1, 6)
    assert np.asarray(to_images(x)[0])[0, :, 0].tolist() == [0, 0, 128, 153, 255, 255]


def test_encode_gives_latents_a_factor_smaller(sd: StableDiffusion):
    x = randn(2, 3, 16, 24).clamp(-1, 1)
    with torch.no_grad():
        mean, sampled = sd.vae.encode(x), sd.vae.encode(x, generator=torch.Generator().manual_seed(0))
    assert mean.shape == sampled.shape == (2, 4, 8, 12) and not torch.equal(mean, sampled)
