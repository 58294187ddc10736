"""SDXL end to end on a tiny model with random weights: distil, sample, export, evaluate; and what is its own."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import TINY_XL_UNET, VOCABULARY, edit_json, error, fill_up, losses, randn

from minidistill import CheckpointError, StableDiffusion, inject_lora, load, load_lora, pipeline, save_lora
from minidistill.conditioning import Conditioning, cat
from minidistill.config import SD15_UNET, SDXL_UNET, UNetConfig
from minidistill.data.prompts import prompt_split
from minidistill.evaluate import noise_error_share
from minidistill.evaluate.__main__ import main as evaluate
from minidistill.export.__main__ import main as export
from minidistill.formats.lora_formats import LoRAFile, Pair, kohya_tensors, read_lora
from minidistill.formats.lora_io import fit
from minidistill.formats.tensor_files import read_tensors, write_tensors
from minidistill.lora import lora_layers
from minidistill.text import pad_with_zeros
from minidistill.unet import UNet

APPLE = "a red apple"
EMBEDDING = "embeddings.token_embedding.weight"


@pytest.fixture
def xl(tiny_xl: Path) -> StableDiffusion:
    return load(tiny_xl)


@pytest.fixture(scope="module")
def run(tiny_xl: Path, flags, distil, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    out = tmp_path_factory.mktemp("runs") / "xl"
    distil([*flags(out, model=tiny_xl, guidance=5, rank=4, steps=25, save_every=25), "--no-report"])
    return out


def test_distilled(run: Path, xl: StableDiffusion, prompts_file: Path):
    """The loss falls; on held-out prompts the student is nearer to the teacher than the model without guidance."""
    assert sum(losses(run)[-5:]) < 0.5 * sum(losses(run)[:5])
    xl.unet = load_lora(xl.unet, run / "lora.safetensors")
    held_out = prompt_split(xl.path, prompts_file)[1]
    assert noise_error_share(xl, held_out, steps=3, guidance=5).pooled < 0.9


def test_no_negative_prompt_is_not_the_empty_one(run: Path, xl: StableDiffusion, command, tmp_path: Path):
    """Without one the teacher leads away from zeros, and its student's header says no negative prompt."""
    assert "negative_prompt" not in read_lora(run / "lora.safetensors").metadata
    none, empty = xl.encode_negative(), xl.encode_negative("")
    assert not none.tokens.any() and not none.pooled.any() and none.sizes.tolist() == empty.sizes.tolist()
    assert error(empty.tokens, xl.encode_prompt([""]).tokens) == 0 and empty.pooled.any()
    shutil.copytree(xl.path, tmp_path / "bare").joinpath("model_index.json").unlink()  # which could say otherwise
    assert not load(tmp_path / "bare").encode_negative().tokens.any()
    flags = [APPLE, "--model", xl.path, "--lora", run, "--compare", "--steps", 2, "--out", tmp_path / "a.png"]
    assert command("sample.py", *flags).code == 0
    assert "must have the same" in command("sample.py", *flags, "--negative-prompt", "").complaint


def test_sample_in_another_size(xl: StableDiffusion, command, tmp_path: Path):
    flags = ["--model", xl.path, "--steps", 2, "--guidance", 4, "--height", 20, "--width", 32]
    assert command("sample.py", APPLE, *flags, "--out", tmp_path / "a.png").code == 0
    (expected,) = xl.sample([APPLE], 2, 4.0, height=20, width=32)
    assert np.array_equal(Image.open(tmp_path / "a.png"), expected) and expected.size == (32, 20)
    assert "multiples of 2, not 32x21" in command("sample.py", APPLE, *flags, "--height", 21).complaint


def test_distil_in_another_size(tiny_xl: Path, flags, command, tmp_path: Path):
    options = dict(model=tiny_xl, steps=1, trajectories=4, height=12, width=20, memory="low")
    assert command("train.py", *flags(tmp_path / "run", **options), "--no-report").code == 0
    shard = load_file(tmp_path / "run/states/trajectories-000000.safetensors")
    assert shard["z_0"].shape == (4, 4, 6, 10)
    other = flags(tmp_path / "run", **options | dict(height=16))
    assert "--height 12" in command("train.py", *other, "--resume").complaint
    other = flags(tmp_path / "new", **options | dict(height=16, states=tmp_path / "run/states"))
    assert "other settings" in command("train.py", *other).complaint


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("to", ["peft", "kohya"])
def test_exported_pairs_read_back_bit_exact(to: str, layers: int, tmp_path: Path):
    """kohya's names count the residual blocks of a level, of which SDXL has two."""
    unet = UNet(replace(TINY_XL_UNET, layers=layers))
    save_lora(fill_up(inject_lora(unet, rank=4)), tmp_path / "ours.safetensors", dict(guidance="5"))
    export([str(tmp_path / "ours.safetensors"), "--to", to, "--out", str(tmp_path / "lora.safetensors")])
    weights, back = dict(unet.named_parameters()), read_lora(tmp_path / "lora.safetensors")
    ours, theirs = fit(read_lora(tmp_path / "ours.safetensors"), weights), fit(back, weights)
    assert ours.keys() == theirs.keys() and back.is_student
    for name, pair in ours.items():
        assert torch.equal(pair.down, theirs[name].down) and torch.equal(pair.up, theirs[name].up)
        assert pair.alpha == theirs[name].alpha


def test_kohyas_header_and_names(run: Path, tmp_path: Path):
    """kohya's scripts train SDXL under the names of the original code, and AUTOMATIC1111 asks for the version."""
    export([str(run), "--to", "kohya", "--out", str(tmp_path / "lora.safetensors")])
    names = {name.split(".")[0] for name in load_file(tmp_path / "lora.safetensors")}
    assert "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_k" in names
    assert "lora_unet_input_blocks_1_0_in_layers_2" in names and not any("down_blocks" in name for name in names)
    assert read_lora(tmp_path / "lora.safetensors").metadata["ss_base_model_version"] == "sdxl_base_v1-0"


@pytest.mark.parametrize(
    "config, targets, block",
    [
        (SDXL_UNET, "*.resnets.*.conv?", "output_blocks_0_0_"),
        (SD15_UNET, "*.resnets.*.conv?", "up_blocks_0_resnets_0_"),
        (SDXL_UNET, "*.transformer_blocks.0.attn2.to_[kv]", "output_blocks_5_1_"),
        (SD15_UNET, "*.transformer_blocks.0.attn2.to_[kv]", "up_blocks_1_attentions_0_"),
    ],
)
def test_some_layers_alone_get_kohyas_names(config: UNetConfig, targets: str, block: str):
    with torch.device("meta"):
        layers = lora_layers(inject_lora(UNet(config), rank=1, targets=[targets]))
    pairs = {name: Pair(layer.lora_down, layer.lora_up, 1.0) for name, layer in layers.items()}
    names = kohya_tensors(LoRAFile(Path("x"), pairs, {}))
    assert sum(name.startswith(f"lora_unet_{block}") for name in names) == 2 * 3


def test_merged_folder_and_single_file(run: Path, xl: StableDiffusion, tmp_path: Path):
    xl.unet = load_lora(xl.unet, run / "lora.safetensors")
    (expected,) = xl.sample([APPLE], steps=2, lora_enabled=True)
    for out in (tmp_path / "folder", tmp_path / "file.safetensors"):
        export([str(run), "--to", "checkpoint", "--model", str(xl.path), "--out", str(out)])
        merged = load(out, tokenizer=xl.path / "tokenizer", height=16, width=16)
        assert np.abs(np.asarray(merged.sample([APPLE], 2, 1.0)[0], int) - np.asarray(expected, int)).max() <= 1
        texts, expected_texts = merged.text_encoder.state_dict(), xl.text_encoder.state_dict()
        assert texts.keys() == expected_texts.keys() and all(torch.equal(texts[n], expected_texts[n]) for n in texts)
        # Where the layout in memory differs, sums are rounded differently.
        assert error(merged.encode_prompt([APPLE]).pooled, xl.encode_prompt([APPLE]).pooled) < 1e-6
    assert (tmp_path / "folder/tokenizer_2").is_dir()


def test_what_a_single_file_cannot_say_is_said(run: Path, tiny_xl: Path, tmp_path: Path):
    """It is read back with zeros for the empty prompt, and with the size of SDXL's images."""
    folder = shutil.copytree(tiny_xl, tmp_path / "folder")
    edit_json(folder / "model_index.json", {"force_zeros_for_empty_prompt": False})
    flags = ["--to", "checkpoint", "--model", str(folder), "--out", str(tmp_path / "file.safetensors")]
    with pytest.warns(UserWarning, match="image size.*--height") as warned:
        export([str(run), *flags])
    assert any('--negative-prompt ""' in str(warning.message) for warning in warned)


def test_v_is_marked_in_a_single_file(run: Path, tiny_xl: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_xl, tmp_path / "v")
    edit_json(folder / "scheduler/scheduler_config.json", {"prediction_type": "v_prediction"})
    file, lora = tmp_path / "file.safetensors", tmp_path / "lora.safetensors"
    tensors, header = read_tensors(run / "lora.safetensors")
    write_tensors(lora, tensors, header | {"prediction": "v"})
    export([str(lora), "--to", "checkpoint", "--model", str(folder), "--out", str(file)])
    assert "v_pred" in load_file(file) and load(file).schedule.prediction == "v"


def test_evaluate(run: Path, tiny_xl: Path, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a red apple\na green rocket")
    flags = f"--model {tiny_xl} --prompts {tmp_path}/prompts.txt --pictures 2 --steps 2 --device cpu --width 24"
    evaluate(["quality", str(run), *flags.split(), "--out", str(tmp_path / "out"), "--work", str(tmp_path)])
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["teacher", "no guidance", run.name]
    assert rows[2]["noise error share"]["value"] < 1


# The pooled vector and the sizes


def test_sizes_are_not_rounded(xl: StableDiffusion):
    cond = xl.encode_prompt([APPLE, ""], 1016, 1144)
    assert cond.to(torch.bfloat16).sizes.tolist() == [[1016, 1144, 0, 0, 1016, 1144]] * 2
    assert cond.to(torch.bfloat16).pooled.dtype == torch.bfloat16
    both = cat([cond[1:], cond[:1].expand(2)])
    assert len(both) == 3 and torch.equal(both.pooled[1], cond.pooled[0]) and both.sizes.shape == (3, 6)


def test_pooled_vector_and_sizes_matter(xl: StableDiffusion):
    z_t, t, cond = randn(1, 4, 8, 8), torch.tensor([500]), xl.encode_prompt([APPLE])
    eps = xl.unet(z_t, t, cond)
    for other in ((cond.tokens, cond.pooled + 1, cond.sizes), (cond.tokens, cond.pooled, cond.sizes + 8)):
        assert error(xl.unet(z_t, t, Conditioning(*other)), eps) > 1e-4
    for without in (cond.tokens, Conditioning(cond.tokens, cond.pooled)):
        with pytest.raises(ValueError, match="SDXL needs a Conditioning"):
            xl.unet(z_t, t, without)


def test_the_second_encoder_is_padded_with_zeros():
    """Also where words were added to the vocabulary, so that the end token is not its last."""
    ids = torch.tensor([[7, 3, 9, 9, 9], [7, 9, 9, 9, 9], [7, 3, 9, 4, 9], [7, 3, 4, 5, 9]])
    expected = [[7, 3, 9, 0, 0], [7, 9, 0, 0, 0], [7, 3, 9, 4, 9], [7, 3, 4, 5, 9]]
    assert pad_with_zeros(ids).tolist() == expected


def test_a_word_that_only_the_first_encoder_has_learned(tiny_xl: Path, tmp_path: Path):
    """diffusers' first script of textual inversion for SDXL wrote such folders."""
    folder = Path(shutil.copytree(tiny_xl, tmp_path / "xl"))
    tokenizer = load(folder).tokenizer
    tokenizer.add_tokens(["<sks>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    file = folder / "text_encoder/model.safetensors"
    tensors = load_file(file)
    tensors[EMBEDDING] = torch.cat([tensors[EMBEDDING], randn(1, 64)])
    save_file(tensors, file)
    edit_json(folder / "text_encoder/config.json", dict(vocab_size=VOCABULARY + 1))
    with pytest.raises(CheckpointError, match=f"has {VOCABULARY + 1} tokens, and the encoder knows {VOCABULARY}"):
        load(folder).encode_prompt(["a <sks> apple"])


def test_the_unet_makes_room_for_the_vae(xl: StableDiffusion, monkeypatch: pytest.MonkeyPatch):
    """The first attempt runs out of memory; in the second, the UNet waits on the CPU."""
    attempts, moved = [], []

    @contextmanager
    def on_device(network, device):
        moved.append((network, str(device)))
        yield
        moved.clear()

    def decode(z):
        attempts.append(list(moved))
        if len(attempts) == 1:
            raise torch.OutOfMemoryError
        return 2 * z

    monkeypatch.setattr(pipeline, "on_device", on_device)
    assert torch.equal(xl.run_vae(decode, torch.ones(1)), torch.full((1,), 2.0))
    assert attempts == [[], [(xl.unet, "cpu")]] and not moved
