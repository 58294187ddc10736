"""sample.py as a user runs it."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from tiny import ROOT, TINY_UNET, TOKENS, fill_up, tiny_student, tiny_tensors, tiny_unet, write_tiny

from minidistill import StableDiffusion, inject_lora, load, load_lora, merge_lora, save_lora
from minidistill.guidance import Interval
from minidistill.lora import lora_layers

APPLE, ROCKET = "a red apple", "a rocket on a purple background"
METADATA = dict(base="tiny", guidance="4", method="trajectories", negative_prompt="a cat")


def write_student(file: Path, **header: str) -> Path:
    """The LoRA of a student of the tiny model."""
    save_lora(tiny_student(), file, METADATA | header)
    return file


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("lora") / "lora.safetensors")


@pytest.fixture
def sample(command, tiny_model: Path, tmp_path: Path):
    """``sample("a red apple", "--seed", 3)`` with the tiny model, into tmp_path."""

    def run(*args: object):
        defaults = {"--model": tiny_model, "--steps": 3, "--out": tmp_path / "out", "--device": "cpu"}
        missing = [x for flag, value in defaults.items() if flag not in args for x in (flag, value)]
        return command("sample.py", *missing, *args)

    return run


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The options of every call of StableDiffusion.sample."""
    seen, original = [], StableDiffusion.sample
    monkeypatch.setattr(
        StableDiffusion, "sample", lambda sd, prompts, **how: seen.append(how) or original(sd, prompts, **how)
    )
    return seen


def images_in(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(file), dtype=int) for file in sorted(folder.iterdir())]


def test_an_image_for_each_prompt(sample, tmp_path: Path):
    result = sample(APPLE, ROCKET)
    assert result.code == 0
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == ["0-a-red-apple.png", "1-a-rocket-on-a-purple-background.png"]
    assert all(str(file) in result.out and Image.open(file).size == (16, 16) for file in files)


def test_the_images_are_those_of_the_pipeline(sample, unet_calls: list[int], tiny_model: Path, tmp_path: Path):
    sample(APPLE, ROCKET, "--seed", 3, "--guidance", 6, "--negative-prompt", "a cat")
    assert unet_calls == [2] * 6  # two a step
    expected = load(tiny_model).sample([APPLE, ROCKET], steps=3, guidance=6, seed=3, negative_prompt="a cat")
    assert all(np.array_equal(a, b) for a, b in zip(images_in(tmp_path / "out"), expected, strict=True))


def test_same_seed_same_bytes(sample, tmp_path: Path):
    for name, seed in [("one", 5), ("again", 5), ("other", 6)]:
        sample(APPLE, "--seed", seed, "--out", tmp_path / f"{name}.png")
    one, again, other = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "again", "other"))
    assert one == again != other


def test_the_student_is_that_of_the_pipeline(sample, unet_calls: list[int], tiny_model: Path, lora: Path, tmp_path):
    assert sample(APPLE, "--lora", lora).code == 0
    assert unet_calls == [1] * 3  # one a step
    sd = load(tiny_model)
    sd.unet = load_lora(sd.unet, lora)
    expected = np.asarray(sd.sample([APPLE], steps=3, lora_enabled=True)[0], dtype=int)
    assert np.abs(images_in(tmp_path / "out")[0] - expected).max() <= 1


def test_a_run_is_named_by_its_folder(sample, lora: Path, tmp_path: Path):
    for name in (lora, lora.parent):
        sample(APPLE, "--lora", name, "--out", tmp_path / f"{name.name}.png")
    assert (tmp_path / f"{lora.name}.png").read_bytes() == (tmp_path / f"{lora.parent.name}.png").read_bytes()


def test_the_batch_size_does_not_change_the_images(sample, unet_calls: list[int], tmp_path: Path):
    for batch in (1, 3):
        sample(APPLE, ROCKET, APPLE, "--batch", batch, "--out", tmp_path / str(batch))
    assert set(unet_calls) == {1, 3}
    one, three = (images_in(tmp_path / name) for name in "13")
    assert max(np.abs(a - b).max() for a, b in zip(one, three, strict=True)) <= 1


def test_compare_shows_teacher_and_student(sample, unet_calls: list[int], lora: Path, tmp_path: Path):
    assert sample(APPLE, ROCKET, "--compare", "--lora", lora).code == 0
    assert len(unet_calls) == 2 + 6 + 3  # one untimed step, the teacher, the student
    (file,) = (tmp_path / "out").iterdir()
    assert Image.open(file).size[0] > 2 * 100


def test_compare_takes_as_many_steps_with_both(sample, unet_calls: list[int], tmp_path: Path):
    """Unless the student was taught to take fewer steps than its teacher."""
    lora = write_student(tmp_path / "lora.safetensors", student_steps="4", teacher_steps="4")
    assert sample(APPLE, "--compare", "--lora", lora, "--steps", 3).code == 0
    assert len(unet_calls) == 2 + 6 + 3


def test_compare_uses_the_lora_beside_the_model(sample, lora: Path, tmp_path: Path):
    model = write_tiny(tmp_path / "model")
    (model / "guidance-lora.safetensors").write_bytes(lora.read_bytes())
    assert sample(APPLE, "--compare", "--model", model).code == 0
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_compare_uses_the_guidance_that_the_lora_learned(sample, sampled: list[dict], lora: Path):
    sample(APPLE, "--compare", "--lora", lora)
    assert [how["lora_enabled"] for how in sampled[1:]] == [False, True]  # after one untimed step
    assert (sampled[1]["guidance"], sampled[1]["negative_prompt"]) == (4.0, "a cat")


@pytest.fixture
def no_negative_lora(tmp_path: Path) -> Path:
    return write_student(tmp_path / "no-negative.safetensors", negative_prompt="")


def test_a_student_is_led_away_from_a_prompt_that_it_has_not_learned(sample, tiny_model, no_negative_lora, tmp_path):
    """The one that it has learned changes nothing."""
    for name, flags in {"none": [], "new": ["--negative-prompt", "a dog"], "known": ["--negative-prompt", ""]}.items():
        assert sample(APPLE, "--lora", no_negative_lora, "--out", tmp_path / name, *flags).code == 0
    none, new, known = (images_in(tmp_path / name)[0] for name in ("none", "new", "known"))
    sd = load(tiny_model)
    sd.unet = load_lora(sd.unet, no_negative_lora)
    expected = sd.sample([APPLE], steps=3, lora_enabled=True, negative_prompt="a dog")[0]
    assert np.abs(new - np.asarray(expected, dtype=int)).max() <= 1
    assert np.abs(new - none).max() > 1 and np.array_equal(known, none)


def test_compare_leads_teacher_and_student_away_from_the_same_prompt(sample, sampled, no_negative_lora, lora):
    assert sample(APPLE, "--compare", "--lora", no_negative_lora, "--negative-prompt", "a dog").code == 0
    assert sample(APPLE, "--compare", "--lora", lora, "--negative-prompt", "a cat").code == 0  # as it has learned
    prompts = [(how["lora_enabled"], how["negative_prompt"]) for how in sampled if "negative_prompt" in how]
    assert prompts == [(False, "a dog"), (True, "a dog"), (False, "a cat"), (True, None)]


def test_the_loras_strength_is_a_dial(sample, unet_calls: list[int], lora: Path, tmp_path: Path):
    sample(APPLE, "--lora", lora, "--lora-scale", 0.5, "--out", tmp_path / "flag.png")
    sample(APPLE, "--lora", f"{lora}:0.5", "--out", tmp_path / "colon.png")
    sample(APPLE, "--lora", lora, "--out", tmp_path / "whole.png")
    assert unet_calls == [1] * 9
    flag, colon, whole = ((tmp_path / f"{name}.png").read_bytes() for name in ("flag", "colon", "whole"))
    assert flag == colon != whole


def test_compare_scales_the_teachers_guidance_with_the_dial(sample, sampled: list[dict], lora: Path):
    assert sample(APPLE, "--compare", "--lora", lora, "--lora-scale", 0.5).code == 0
    assert sample(APPLE, "--compare", "--lora", f"{lora}:0.5").code == 0
    assert sampled[1]["guidance"] == sampled[4]["guidance"] == 1 + 0.5 * (4 - 1)


def test_a_student_samples_at_another_guidance(sample, sampled, unet_calls: list[int], tmp_path: Path):
    """At the strength that its header gives for it, 0.7 for guidance 2; the teacher beside it has that guidance."""
    lora = write_student(tmp_path / "dial.safetensors", dial="2:0.7")
    sample(APPLE, "--lora", lora, "--lora-scale", 0.7, "--out", tmp_path / "strength.png")
    sample(APPLE, "--lora", lora, "--guidance", 2, "--out", tmp_path / "guidance.png")
    assert unet_calls == [1] * 6
    assert (tmp_path / "strength.png").read_bytes() == (tmp_path / "guidance.png").read_bytes()
    assert sample(APPLE, "--compare", "--lora", lora, "--guidance", 2).code == 0
    assert sampled[-2]["guidance"] == 2 and not sampled[-2]["lora_enabled"]


def test_selective_guidance_costs_less(sample, unet_calls: list[int], tmp_path: Path):
    assert sample(APPLE, "--selective", 0.34).code == 0
    assert unet_calls == [1] * 5  # the last of three steps has no unconditional call


# Guidance in an interval


@pytest.fixture(scope="module")
def interval_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose teacher was guided at t = 300 to 600."""
    return write_student(tmp_path_factory.mktemp("interval") / "lora.safetensors", interval="300 600")


def test_the_teacher_is_guided_in_the_interval(sample, unet_calls: list[int], tiny_model: Path, tmp_path: Path):
    assert sample(APPLE, "--interval", 300, 600, "--guidance", 6).code == 0
    assert unet_calls == [1] * 4  # t = 667, 334, 1, of which one is guided
    expected = load(tiny_model).sample([APPLE], steps=3, guidance=6, interval=Interval(300, 600))
    assert np.array_equal(images_in(tmp_path / "out")[0], expected[0])
    always = load(tiny_model).sample([APPLE], steps=3, guidance=6)
    assert not np.array_equal(images_in(tmp_path / "out")[0], always[0])


@pytest.mark.parametrize("flags", [(), ("--interval", 300, 600)])
def test_compare_uses_the_interval_that_the_lora_learned(
    flags: tuple, sample, sampled, unet_calls, interval_lora: Path
):
    """Naming the same interval again is no contradiction."""
    assert sample(APPLE, "--compare", "--lora", interval_lora, *flags).code == 0
    assert sampled[1]["interval"] == Interval(300, 600) and sampled[1]["guidance"] == 4
    assert len(unet_calls) == 2 + 4 + 3  # one untimed step, the teacher, the student


def test_a_damaged_interval_in_a_header_is_named(sample, tmp_path: Path):
    file = write_student(tmp_path / "lora.safetensors", interval="300 to 600")
    assert str(file) in sample(APPLE, "--compare", "--lora", file).complaint


# Styles: LoRAs that have not learned guidance


@pytest.fixture(scope="module")
def style(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("style") / "style.safetensors"
    save_lora(fill_up(inject_lora(load(tiny_model).unet, rank=1, targets=["*attn*"]), seed=70), file)
    return file


def test_a_style_is_sampled_with_guidance(sample, unet_calls: list[int], tiny_model: Path, style: Path, tmp_path: Path):
    assert sample(APPLE, "--lora", style, "--guidance", 4, "--negative-prompt", "a cat").code == 0
    assert unet_calls == [1] * 6
    sd = load(tiny_model)
    sd.unet = load_lora(sd.unet, style)
    merge_lora(sd.unet)
    expected = sd.sample([APPLE], steps=3, guidance=4, negative_prompt="a cat")
    assert np.array_equal(images_in(tmp_path / "out")[0], expected[0])


def test_student_and_style(sample, unet_calls: list[int], lora: Path, style: Path, tiny_model: Path, tmp_path: Path):
    """In either order: the student, on weights with the style merged in."""
    sample(APPLE, "--lora", lora, "--lora", f"{style}:0.5", "--out", tmp_path / "one.png")
    sample(APPLE, "--lora", f"{style}:0.5", "--lora", lora, "--out", tmp_path / "other.png")
    assert unet_calls == [1] * 6
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()
    sd = load(tiny_model)
    for file, scale in [(style, 0.5), (lora, 1)]:
        layers = lora_layers(load_lora(load(tiny_model).unet, file, scale))
        for name, layer in layers.items():
            sd.unet.get_submodule(name).weight.data += layer.delta()
    expected = np.asarray(sd.sample([APPLE], steps=3, guidance=1)[0], dtype=int)
    assert np.abs(np.asarray(Image.open(tmp_path / "one.png"), dtype=int) - expected).max() <= 1


def test_compare_styles_both(sample, unet_calls: list[int], lora: Path, style: Path, tmp_path: Path):
    for name, flags in [("plain", []), ("styled", ["--lora", style])]:
        assert sample(APPLE, "--compare", "--lora", lora, *flags, "--out", tmp_path / f"{name}.png").code == 0
    assert len(unet_calls) == 2 * (2 + 6 + 3)
    plain, styled = (np.asarray(Image.open(tmp_path / f"{name}.png"), dtype=int) for name in ("plain", "styled"))
    rows = np.abs(plain - styled)[52:, 128:].max((1, 2))  # below the prompt, right of the costs
    assert rows[:128].max() > 0 and rows[134:].max() > 0


def test_a_scale_of_zero_is_no_lora(sample, style: Path, tmp_path: Path):
    sample(APPLE, "--out", tmp_path / "without.png")
    sample(APPLE, "--lora", f"{style}:0", "--out", tmp_path / "with.png")
    assert (tmp_path / "with.png").read_bytes() == (tmp_path / "without.png").read_bytes()


def test_the_missing_style_of_a_students_teacher_is_named(sample, tmp_path: Path, style: Path):
    student = write_student(tmp_path / "student.safetensors", teacher_lora="style.safetensors:0.5")
    with pytest.warns(UserWarning, match="style.safetensors:0.5"):
        sample(APPLE, "--lora", student)
    with pytest.warns(UserWarning, match="at the same strength"):
        sample(APPLE, "--lora", student, "--lora", style)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sample(APPLE, "--lora", student, "--lora", f"{style}:0.5")


def test_a_student_of_another_prediction_is_refused(sample, tmp_path: Path):
    flags = (APPLE, "--lora", write_student(tmp_path / "student.safetensors", prediction="eps"))
    assert sample(*flags).code == 0
    complaint = sample(*flags, "--prediction", "v").complaint
    assert "student.safetensors" in complaint and "--prediction eps" in complaint


@pytest.mark.parametrize("prompt", ["../../escape", "a/b", "苹果", "x" * 300, "-", "  "])
def test_any_prompt_names_a_file_in_the_folder(prompt: str, sample, tmp_path: Path):
    assert sample("--", prompt).code == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_long_prompt_shows_what_is_cut_off(sample):
    with pytest.warns(UserWarning, match="Cut off: .*rocket"):
        sample(" ".join(["apple"] * (TOKENS - 2) + ["rocket"]))


# Bad input


def test_one_file_for_two_images_is_refused(sample, tmp_path: Path):
    assert "two.png" in sample(APPLE, ROCKET, "--out", tmp_path / "two.png").complaint
    assert not list(tmp_path.iterdir())


def test_a_lora_of_another_model_is_refused(sample, tmp_path: Path):
    file = tmp_path / "other.safetensors"
    save_lora(inject_lora(tiny_unet(config=replace(TINY_UNET, context_width=48)), rank=2), file, dict(base="other"))
    result = sample(APPLE, "--lora", file)
    assert result.code != 0 and "another model" in result.err and "made for other" in result.err
    assert "attn2.to_k is [" in result.err and not (tmp_path / "out").exists()


LEARNED = "has learned guidance 4"
IN_INTERVAL = 'learned guidance 4 with negative prompt "a cat", interval 300 to 600'
BAD = [
    ("--lora nowhere.safetensors", "nowhere.safetensors"),
    ("--lora nowhere.safetensors:much", "nowhere.safetensors:much"),
    ("--lora nowhere.safetensors:inf", "finite"),
    ("--compare", "guidance-lora.safetensors"),
    ("--model nowhere/model", "nowhere/model"),
    ("--steps 0", "steps"),
    ("--steps 1001", "steps"),
    ("--batch 0", "batch"),
    ("--device abacus", "abacus"),
    ("--gudiance 3", "--gudiance"),
    ("--dtype int8", "int8"),
    ("--lora-scale 2", "name its file with --lora"),
    ("--selective 1.5", "from 0 to 1"),
    ("--guidance 1 --negative-prompt cat", "--guidance 1 is no guidance"),
    ("--selective 0.5 --lora {lora}", "the teacher's"),
    ("--lora {lora} --negative-prompt=", 'has learned to avoid "a cat" for good'),
    ("--lora {lora} --guidance 1", "above 1, not at 1: leave guidance out"),
    ("--lora {lora} --guidance 3 --lora-scale 0.5", "give one of them"),
    ("--lora {lora} --guidance 3 --lora {lora}:0.5", "give one of"),
    ("--lora {lora} --lora {lora}", "each learned guidance"),
    ("--interval 300 600 --selective 0.5", "--selective and --interval"),
    ("--interval 300 600 --lora {lora}", "--interval"),
    ("--interval 600 300", "--interval 600 300"),
    ("--interval 300", "--interval"),
    ("--interval 300 nan", "finite"),
    *((f"--compare --lora {{lora}} {other}", LEARNED) for other in ("--interval 300 600", "--negative-prompt dog")),
    ("--compare --lora {interval_lora} --interval 300 601", IN_INTERVAL),
    ("--compare --lora {interval_lora} --selective 0.5", IN_INTERVAL),
    ("--compare --lora {interval_lora} --negative-prompt dog", IN_INTERVAL),
]


@pytest.mark.parametrize("flags, named", BAD)
def test_bad_input_gets_one_line_and_leaves_nothing(
    flags: str, named: str, sample, lora: Path, interval_lora: Path, tmp_path: Path
):
    result = sample(APPLE, *flags.format(lora=lora, interval_lora=interval_lora).split())
    assert named in result.complaint
    assert len(result.lines) == 1 or "usage: " in result.err
    assert not list(tmp_path.iterdir())


def test_no_prompt(command):
    assert "PROMPT" in command("sample.py").complaint


def test_out_below_a_file(sample, tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert sample(APPLE, "--out", tmp_path / "file/out").complaint.startswith("sample.py: ")


def test_a_single_file(sample, tmp_path: Path):
    save_file(tiny_tensors(version=2), tmp_path / "model.safetensors")
    flags = ["--model", tmp_path / "model.safetensors", "--prediction", "eps"]
    flags += ["--tokenizer", ROOT / "weights/pocket-emoji/tokenizer"]
    result = sample(APPLE, *flags)
    assert result.code == 0 and "Wrote" in result.out
    assert "--ema" in sample(APPLE, *flags, "--ema").complaint
    assert "--variant" in sample(APPLE, *flags, "--variant", "fp16").complaint


@pytest.mark.parametrize("name", ["x.jpg", "x.WEBP"])
def test_other_formats_than_png_are_refused(name: str, sample, tmp_path: Path):
    assert "written as .png only" in sample(APPLE, "--out", tmp_path / name).complaint
    assert not (tmp_path / name).exists()


def test_png_in_capitals_and_a_folder_with_a_dot(sample, tmp_path: Path):
    (tmp_path / "folder.jpg").mkdir()
    for name in ("x.PNG", "v1.5", "folder.jpg"):
        assert sample(APPLE, "--out", tmp_path / name).code == 0
    assert (tmp_path / "x.PNG").is_file() and (tmp_path / "v1.5/0-a-red-apple.png").is_file()
    assert (tmp_path / "folder.jpg/0-a-red-apple.png").is_file()


def test_no_image_is_written_over_that_of_another_prompt(sample, tmp_path: Path):
    prompts = ["a cat", "a cat!", "A cat", "a-cat", "猫", "犬", f"{'a ' * 40}cat", f"{'a ' * 40}dog", " a cat"]
    for prompt in prompts:
        assert sample(prompt, "--steps", 1).code == 0
    assert len(list((tmp_path / "out").iterdir())) == len(prompts) and (tmp_path / "out/0-a-cat.png").exists()


def test_no_image_is_written_over_a_different_one(sample, tmp_path: Path):
    """Of the same prompt and seed. The same image again stays one file."""
    for guidance in (2, 8, 2):
        assert sample(APPLE, "--guidance", guidance).code == 0
    assert [file.name for file in sorted((tmp_path / "out").iterdir())] == ["0-a-red-apple-2.png", "0-a-red-apple.png"]


def test_images_are_saved_as_they_come(sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original, batches = StableDiffusion.sample, []

    def stopped(self, prompts, **options):
        if batches:
            raise KeyboardInterrupt
        batches.append(prompts)
        return original(self, prompts, **options)

    monkeypatch.setattr(StableDiffusion, "sample", stopped)
    assert sample(APPLE, ROCKET, "--batch", 1).code != 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["0-a-red-apple.png"]


def test_no_comparison_is_written_over_another(sample, lora: Path, tmp_path: Path):
    for prompts in (["a cat"], ["a cat", "a dog"], ["a cat", "a pig"]):
        assert sample(*prompts, "--compare", "--lora", lora, "--steps", 1).code == 0
    assert len(list((tmp_path / "out").iterdir())) == 3
