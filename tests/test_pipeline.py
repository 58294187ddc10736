"""pipeline.py: the same seed gives the same image in any batch, at the stated number of UNet calls."""

import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TOKENS, error, fill_up, levels, tiny_student
from torch import nn

from minidistill import (
    CheckpointError,
    StableDiffusion,
    inject_lora,
    load,
    load_lora,
    merge_lora,
    pipeline,
    save_lora,
    unmerge_lora,
)
from minidistill.conditioning import Conditioning
from minidistill.guidance import Interval, away_from, guided
from minidistill.guidance import student as student_model
from minidistill.pipeline import on_device, to_images
from minidistill.samplers import ddim_sample, ddim_step, fresh_noise

APPLE, ROCKET = "a red apple", "a rocket on a purple background"


@pytest.fixture
def student(sd: StableDiffusion) -> StableDiffusion:
    sd.unet = fill_up(inject_lora(sd.unet, rank=2))
    return sd


def test_image_i_has_seed_plus_i(sd: StableDiffusion):
    together = levels(sd.sample([APPLE, APPLE], steps=2, seed=3))
    apart = levels(sd.sample([APPLE], steps=2, seed=3) + sd.sample([APPLE], steps=2, seed=4))
    assert np.abs(together - apart).max() <= 1 < np.abs(together[0] - together[1]).max()


@pytest.mark.parametrize("lora_enabled", [False, True])
def test_an_image_does_not_depend_on_the_batch(lora_enabled: bool, student: StableDiffusion):
    prompts = [APPLE, ROCKET, APPLE]
    cond, z_T = student.encode_prompt(prompts), student.starting_noise(range(3))
    uncond = student.encode_prompt([""]).expand(3)

    def end(rows: slice) -> torch.Tensor:
        if lora_enabled:
            model = student_model(student.unet, cond[rows])
        else:
            model = guided(student.unet, cond[rows], uncond[rows], 5.0)
        return list(ddim_sample(model, student.schedule, z_T[rows], 3))[-1]

    alone = torch.cat([end(slice(i, i + 1)) for i in range(3)])
    assert error(end(slice(None)), alone) < 1e-4
    one, three = (levels(student.sample(prompts, steps=3, lora_enabled=lora_enabled, batch=b)) for b in (1, 3))
    assert np.abs(one - three).max() <= 1


def test_prompt_guidance_and_negative_prompt_matter(sd: StableDiffusion):
    options = [dict(), dict(guidance=2.0), dict(guidance=1.0), dict(negative_prompt=ROCKET), dict(prompts=[ROCKET])]
    images = [levels(sd.sample(**(dict(prompts=[APPLE], steps=2) | changes))).tobytes() for changes in options]
    assert len(set(images)) == len(options)


def test_a_string_is_one_prompt(sd: StableDiffusion):
    assert np.array_equal(levels(sd.sample(APPLE, steps=1)), levels(sd.sample([APPLE], steps=1)))


@pytest.mark.parametrize(
    "options, calls", [(dict(guidance=5.0), 6), (dict(guidance=1.0), 3), (dict(lora_enabled=True), 3)]
)
def test_calls_of_the_unet(options: dict, calls: int, student: StableDiffusion):
    seen = []
    student.unet.get_submodule("conv_in").register_forward_hook(lambda *_: seen.append(student.unet.switch.enabled))
    student.sample([APPLE], steps=3, **options)
    assert seen == [options.get("lora_enabled", False)] * calls


@pytest.mark.parametrize(
    "options, is_guided",
    [
        (dict(interval=Interval(200, 700)), [False, True, True, False]),  # t = 751, 501, 251, 1
        (dict(interval=(251, 501)), [False, True, True, False]),
        (dict(interval=Interval(252, 500)), [False] * 4),
        (dict(selective=0.5), [True, True, False, False]),
        (dict(selective=1.0), [False] * 4),
        (dict(), [True] * 4),
    ],
    ids=str,
)
def test_where_the_teacher_is_guided(options: dict, is_guided: list[bool], sd: StableDiffusion):
    """Two calls where it is guided, one elsewhere; the image is that of a loop written out with the formula."""
    cond, uncond, calls = sd.encode_prompt([APPLE]), sd.encode_prompt([ROCKET]), []
    z_t = sd.starting_noise([5])
    with torch.no_grad():
        for t, with_guidance in zip(sd.schedule.timesteps(4), is_guided, strict=True):
            eps, eps_uncond = (sd.unet(z_t, torch.tensor([t]), c) for c in (cond, uncond))
            z_t = ddim_step(sd.schedule, 6 * eps - 5 * eps_uncond if with_guidance else eps, z_t, t, t - 250)
        expected = to_images(sd.vae.decode(z_t))
    sd.unet.register_forward_hook(lambda *_: calls.append(1))
    images = sd.sample([APPLE], steps=4, guidance=6.0, seed=5, negative_prompt=ROCKET, **options)
    assert len(calls) == 4 + sum(is_guided)
    assert np.abs(levels(images) - levels(expected)).max() <= 1


def test_an_interval_beside_selective_guidance_is_refused(sd: StableDiffusion):
    with pytest.raises(ValueError, match="selective.*interval"):
        sd.sample([APPLE], steps=2, selective=0.5, interval=Interval(0, 500))


def test_an_interval_whose_ends_are_swapped_is_refused(sd: StableDiffusion):
    with pytest.raises(ValueError, match="500 to 200 is empty: give the lower"):
        sd.sample([APPLE], steps=2, interval=(500, 200))


def test_a_student_is_led_away_from_a_negative_prompt(student: StableDiffusion):
    """The image is that of a loop written out, and without the prompt it is the student's again."""

    def drawn(negative: str | None) -> np.ndarray:
        return levels(student.sample([APPLE], steps=3, seed=5, lora_enabled=True, negative_prompt=negative))

    before, led = drawn(None), drawn(ROCKET)
    with torch.no_grad(), away_from(student.unet, student.encode_prompt([ROCKET])):
        predict = partial(student.unet, cond=student.encode_prompt([APPLE]), lora_enabled=True)
        *_, z_0 = ddim_sample(predict, student.schedule, student.starting_noise([5]), 3)
        assert np.abs(led - levels(to_images(student.vae.decode(z_0)))).max() <= 1
    assert np.abs(led - before).max() > 1 and np.array_equal(before, drawn("")) and np.array_equal(before, drawn(None))


def test_a_merged_model_samples_as_the_student(student: StableDiffusion):
    expected = levels(student.sample([APPLE], steps=3, lora_enabled=True))
    merge_lora(student.unet)
    assert np.abs(levels(student.sample([APPLE], steps=3, guidance=1.0)) - expected).max() <= 1


def test_a_student_samples_at_the_strength_that_stands_for_a_guidance(sd: StableDiffusion, tmp_path: Path):
    lora = tmp_path / "lora.safetensors"
    save_lora(tiny_student(), lora, dict(guidance="4", dial="2:0.7"))
    at = {}
    for strength in (0.7, 1.0):
        again = load(sd.path)
        again.unet = load_lora(again.unet, lora, strength)
        at[strength] = levels(again.sample([APPLE], steps=3, lora_enabled=True))
    found = [levels(again.sample([APPLE], steps=3, guidance=w, lora_enabled=True)) for w in (2, None, 4)]
    assert all(np.array_equal(ours, at[x]) for ours, x in zip(found, (0.7, 1.0, 1.0)))
    assert not np.array_equal(at[0.7], at[1.0])

    merge_lora(again.unet)
    with pytest.raises(ValueError, match="merged"):
        again.sample([APPLE], steps=3, guidance=2, lora_enabled=True)


def test_a_student_without_a_dial_has_one_guidance(student: StableDiffusion, tmp_path: Path):
    """Not from a file, or at another strength than the dial is for."""
    save_lora(student.unet, tmp_path / "lora.safetensors", dict(guidance="4"))
    weaker = load(student.path)
    weaker.unet = load_lora(weaker.unet, tmp_path / "lora.safetensors", 0.5)
    for sd in (student, weaker):
        with pytest.raises(ValueError, match="only at the scale it has learned"):
            sd.sample([APPLE], steps=3, guidance=2, lora_enabled=True)


def test_size(sd: StableDiffusion):
    assert sd.sample([APPLE], steps=1)[0].size == (16, 16)
    assert sd.sample([APPLE], steps=1, height=24, width=32)[0].size == (32, 24)
    assert sd.sample([APPLE], steps=1, height=18, width=22)[0].size == (22, 18)  # 9 x 11 latents: odd sides


@pytest.mark.parametrize("height, width", [(15, 16), (16, 17), (-16, 16)])
def test_impossible_sizes_are_refused_before_any_work(height: int, width: int, sd: StableDiffusion):
    sd.unet.register_forward_pre_hook(lambda *_: pytest.fail("the UNet was called"))
    with pytest.raises(ValueError, match="multiples of 2"):
        sd.sample([APPLE], steps=1, height=height, width=width)


@pytest.mark.parametrize("more", ["cat", "rocket cat"])
def test_a_long_prompt_warns_about_what_is_cut_off(more: str, sd: StableDiffusion):
    read = " ".join(["apple"] * (TOKENS - 2))
    with pytest.warns(UserWarning, match=f'{TOKENS} tokens.*Cut off: "{more}"') as warned:
        cond = sd.encode_prompt([f"{read} {more}"])
    assert len(warned) == 1 and warned[0].filename == __file__  # the caller's line
    assert torch.equal(cond.tokens, sd.encode_prompt([read]).tokens)


def test_a_prompt_that_just_fits_does_not_warn(sd: StableDiffusion, recwarn: pytest.WarningsRecorder):
    sd.encode_prompt([" ".join(["apple"] * (TOKENS - 2)), ""])
    assert not [w for w in recwarn if "Cut off" in str(w.message)]


def test_prompts_are_encoded_one_by_one(sd: StableDiffusion):
    together = sd.encode_prompt([APPLE, ""])
    assert isinstance(together, Conditioning) and together.pooled is None and together.tokens.shape == (2, TOKENS, 32)
    alone = [sd.encode_prompt([APPLE]).tokens, sd.encode_prompt([""]).tokens]
    assert error(together.tokens, torch.cat(alone)) < 1e-5


def test_another_tokenizer(tiny_model: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tokenizer = shutil.move(folder / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match="holds no tokenizer.*--tokenizer FOLDER"):
        load(folder).encode_prompt([APPLE])
    cond = load(folder, tokenizer=tokenizer).encode_prompt([APPLE])
    assert torch.equal(cond.tokens, load(tiny_model).encode_prompt([APPLE]).tokens)


def test_a_tokenizer_without_configuration_pads_to_the_encoders_context(sd: StableDiffusion, tmp_path: Path):
    for name in ("vocab.json", "merges.txt"):  # neither states the number of tokens of a prompt
        shutil.copy(sd.path / "tokenizer" / name, tmp_path)
    bare = load(sd.path, tokenizer=tmp_path)
    assert torch.equal(bare.encode_prompt([APPLE, ""]).tokens, sd.encode_prompt([APPLE, ""]).tokens)
    with pytest.warns(UserWarning, match=f"{TOKENS} tokens"):
        bare.encode_prompt([" ".join(["apple"] * (TOKENS - 1))])


def test_noise_depends_on_the_seed_alone(sd: StableDiffusion):
    torch.manual_seed(1)
    first = sd.starting_noise([5, 6])
    torch.manual_seed(2)
    assert torch.equal(sd.starting_noise([6]), first[1:])
    assert torch.equal(load(sd.path, dtype=torch.bfloat16).starting_noise([6]), first[1:])  # in float32, as the steps
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(sd.starting_noise([6]), first[1:])
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):  # stands for torch.set_default_device("cuda")
        assert torch.equal(sd.starting_noise([6]), first[1:])


def test_fresh_noise_depends_on_the_images_seed_alone(sd: StableDiffusion):
    """With eta > 0, too, image i is that of its own seed, whatever else is in its batch."""
    together = sd.sample([APPLE, APPLE, APPLE], steps=3, eta=1.0, seed=4)
    for i, image in enumerate(together):
        alone = sd.sample([APPLE], steps=3, eta=1.0, seed=4 + i)[0]
        assert np.abs(levels([image]) - levels([alone])).max() <= 1
    plain = sd.sample([APPLE], steps=3, seed=4)
    assert np.abs(levels(together[:1]) - levels(plain)).max() > 1


def test_fresh_noise_is_the_same_in_every_dtype(sd: StableDiffusion):
    z_T = sd.starting_noise([4])
    wide, narrow = (fresh_noise(z_T.to(d), [torch.Generator().manual_seed(4)]) for d in (torch.float64, torch.bfloat16))
    assert wide.dtype == torch.float64 and torch.equal(narrow, wide.bfloat16())


def test_fresh_noise_is_not_the_noise_it_starts_from(sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch):
    seen = []

    def record(model, schedule, z_T, steps, eta, generators, spacing):
        seen.append(z_T)
        yield fresh_noise(z_T, generators)

    monkeypatch.setattr(pipeline, "ddim_sample", record)
    monkeypatch.setattr(sd, "decode", lambda z: seen.append(z) or torch.zeros(1, 3, 16, 16))
    sd.sample([APPLE], steps=1, eta=1.0, seed=3)
    z_T, noise = (x.flatten() for x in seen)
    assert torch.corrcoef(torch.stack([z_T, noise]))[0, 1].abs() < 0.2


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
    assert np.abs(levels(narrow.sample([APPLE], steps=2)) - levels(sd.sample([APPLE], steps=2))).mean() < 8


def test_prediction_can_be_overridden(tiny_model: Path, sd: StableDiffusion):
    v = load(tiny_model, prediction="v")
    assert sd.schedule.prediction == "eps" and v.schedule.prediction == "v"
    assert not np.array_equal(levels(v.sample([APPLE], steps=1)), levels(sd.sample([APPLE], steps=1)))


def test_everything_is_frozen(sd: StableDiffusion):
    parameters = [p for part in (sd.unet, sd.vae, sd.text_encoder) for p in part.parameters()]
    assert parameters and not any(p.requires_grad for p in parameters)


def test_sample_is_ddim_and_the_decoder(sd: StableDiffusion):
    model = guided(sd.unet, sd.encode_prompt([APPLE]), sd.encode_prompt([""]), 7.5)
    z_0 = list(ddim_sample(model, sd.schedule, sd.starting_noise([0]), 2))[-1]
    with torch.no_grad():
        expected = to_images(sd.vae.decode(z_0))
    assert np.array_equal(levels(sd.sample([APPLE], steps=2)), levels(expected))


def test_a_network_moves_to_the_device_and_back():
    layer, places = nn.Linear(2, 2), []
    layer.to = lambda device: places.append(device.type)
    with pytest.raises(ValueError), on_device(layer, torch.device("cuda")):
        assert places == ["cuda"]
        raise ValueError
    assert places == ["cuda", "cpu"]


def test_text_encoder_and_vae_move_while_they_are_used(sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch):
    moves = []
    monkeypatch.setattr(pipeline, "on_device", lambda network, device: nullcontext(moves.append((network, device))))
    sd.sample([APPLE, ROCKET], steps=1)
    assert [network for network, _ in moves] == [sd.text_encoder, sd.text_encoder, sd.vae]
    assert {device for _, device in moves} == {sd.unet.conv_in.weight.device}


def test_a_vae_that_overflows_decodes_in_float32_aloud(sd: StableDiffusion):
    with torch.no_grad():
        sd.vae.post_quant_conv.weight.mul_(1e4)
    expected = levels(sd.sample(["a cat", "a dog"], steps=1))
    sd.vae.half()
    with pytest.warns(UserWarning, match="VAE overflows in float16"):
        found = levels(sd.sample(["a cat", "a dog"], steps=1))  # two, as the first changes the VAE
    assert found.max() > 0 and np.abs(found - expected).mean() < 2


def test_images_that_are_not_finite_are_not_handed_out(sd: StableDiffusion):
    with torch.no_grad():
        sd.vae.decoder.conv_in.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite.*float32"):
        sd.sample(["a cat"], steps=1)
    with torch.no_grad():
        sd.unet.conv_out.bias.fill_(float("nan"))
    sd.vae.half()
    with pytest.raises(ValueError, match="not finite.*float32"):
        sd.sample(["a cat"], steps=1)
    assert sd.dtype == torch.float16  # the VAE is not blamed, which would be converted


def test_to_images_rounds_and_clips():
    x = torch.tensor([-5.0, -1.0, 0.0, 0.2, 1.0, 5.0]).expand(1, 3, 1, 6)
    assert np.asarray(to_images(x)[0])[0, :, 0].tolist() == [0, 0, 128, 153, 255, 255]


def test_a_student_is_not_guided_again(sd: StableDiffusion, tmp_path: Path):
    """Neither where it is merged into W, nor by a second one beside W."""
    save_lora(tiny_student(), tmp_path / "lora.safetensors", {"guidance": "4"})
    sd.unet = load_lora(sd.unet, tmp_path / "lora.safetensors")
    merge_lora(sd.unet)
    assert sd.sample([APPLE], steps=1, guidance=1) and sd.sample([APPLE], steps=1, lora_enabled=True)
    with pytest.raises(ValueError, match="has learned guidance 4: sample it with guidance 1"):
        sd.sample([APPLE], steps=1)
    unmerge_lora(sd.unet)
    assert sd.sample([APPLE], steps=1)
    sd.learned_guidance = "4"
    with pytest.raises(ValueError, match="has learned guidance 4 already"):
        sd.sample([APPLE], steps=1, lora_enabled=True)
    again = load(sd.path)
    again.unet = load_lora(again.unet, tmp_path / "lora.safetensors", 0)  # merged, it is the teacher
    merge_lora(again.unet)
    assert again.sample([APPLE], steps=1)


def test_a_student_of_few_steps_has_their_spacing(sd: StableDiffusion, tmp_path: Path):
    header = dict(guidance="4", student_steps="2", teacher_steps="4")
    save_lora(tiny_student(), tmp_path / "lora.safetensors", header)
    sd.unet = load_lora(sd.unet, tmp_path / "lora.safetensors")
    default, trailing, leading = (
        sd.sample([APPLE], steps=2, lora_enabled=True, spacing=s)[0] for s in (None, "trailing", "leading")
    )
    assert default.tobytes() == trailing.tobytes() != leading.tobytes()
    with pytest.warns(UserWarning, match="has learned 2 steps, not 3"):
        sd.sample([APPLE], steps=3, lora_enabled=True)
    teacher = sd.sample([APPLE], steps=2, guidance=1)[0]
    assert teacher.tobytes() == sd.sample([APPLE], steps=2, guidance=1, spacing="leading")[0].tobytes()
    merge_lora(sd.unet)  # now the switch has no effect
    on, off = (sd.sample([APPLE], steps=2, guidance=g, lora_enabled=g is None)[0] for g in (None, 1))
    assert off.tobytes() == on.tobytes()
    with pytest.warns(UserWarning, match="has learned 2 steps, not 3"):
        sd.sample([APPLE], steps=3, guidance=1)


def test_prompts_are_a_list_of_strings(sd: StableDiffusion):
    with pytest.raises(ValueError, match="0 prompts in batches of 8"):
        sd.sample([])
    with pytest.raises(ValueError, match="1 prompts in batches of -1"):
        sd.sample([APPLE], batch=-1)
    for wrong in (APPLE, [], [[APPLE, ROCKET]]):
        with pytest.raises(ValueError, match="list of one or more strings"):
            sd.encode_prompt(wrong)


@pytest.mark.parametrize("dtype", ["float16", torch.int8, torch.float8_e4m3fn])
def test_another_dtype_is_refused(dtype: object, tiny_model: Path):
    with pytest.raises(ValueError, match="dtype="):
        load(tiny_model, dtype=dtype)


def test_away_from_within_away_from(sd: StableDiffusion):
    z_t, t, cond = sd.starting_noise([0]), torch.tensor([500]), sd.encode_prompt([APPLE])
    plain = sd.unet(z_t, t, cond)
    with away_from(sd.unet, sd.encode_prompt([ROCKET])):
        away = sd.unet(z_t, t, cond)
        with away_from(sd.unet, sd.encode_prompt([APPLE])):
            pass
        assert torch.equal(sd.unet(z_t, t, cond), away) and not torch.equal(away, plain)
    assert torch.equal(sd.unet(z_t, t, cond), plain)
