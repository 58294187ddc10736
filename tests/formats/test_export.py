"""minidistill.export: the files it writes are the student, in other formats, and are never half-written."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import ROOT, TINY_UNET, edit_json, fill_up, tiny_unet, write_tiny
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from minidistill import CheckpointError, inject_lora, load, load_lora, merge_lora, save_lora
from minidistill.config import UNetConfig, VAEConfig
from minidistill.export import __main__ as export
from minidistill.formats import tensor_files
from minidistill.formats.files import read_json, write_json
from minidistill.formats.lora_formats import peft_tensors, read_lora
from minidistill.formats.lora_io import add_student, fit
from minidistill.formats.merged_checkpoint import replaced_by, write_checkpoint
from minidistill.formats.model_configs import published_unet, published_vae
from minidistill.formats.tensor_files import write_tensors
from minidistill.unet import UNet
from minidistill.vae import VAE

METADATA = dict(base="tiny", guidance="4", method="trajectories", negative_prompt="a cat")
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a training run."""
    return write_lora(tmp_path / "run/lora.safetensors").parent


def write_lora(path: Path, metadata: dict[str, str] = METADATA, seed: int = 7, **how) -> Path:
    save_lora(fill_up(inject_lora(tiny_unet(), **(dict(rank=2, alpha=3.0) | how)), seed), path, metadata)
    return path


def merge(lora: object, model: Path, out: Path, *flags: str) -> Path:
    export.main([str(lora), "--to", "checkpoint", "--model", str(model), "--out", str(out), *flags])
    return out


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("to", ["peft", "kohya"])
def test_a_run_becomes_a_file_beside_its_lora(to: str, run: Path, capsys):
    export.main([str(run), "--to", to])
    out = run / f"lora-{to}.safetensors"
    assert f"Wrote {out}" in capsys.readouterr().out
    assert {path.name for path in run.iterdir()} == {"lora.safetensors", out.name}
    found = metadata(out)
    assert found.items() >= (METADATA | {"rank": "2", "format": "pt"}).items()
    assert "exactly 1" in found["modelspec.usage_hint"]
    assert "alpha" not in found  # peft readers ignore it, kohya readers use a tensor
    assert read_lora(out).is_student


def test_the_dial_is_exported_and_shown(tmp_path: Path, capsys):
    """But not with a LoRA at half strength: it was measured at full strength."""
    lora, out = write_lora(tmp_path / "lora.safetensors", METADATA | dict(dial="2:0.4")), tmp_path / "out.safetensors"
    export.main([str(lora), "--to", "kohya", "--out", str(out)])
    assert metadata(out)["dial"] == "2:0.4" and "0 (1), 0.4 (2), 1 (4)" in capsys.readouterr().out
    export.main([f"{lora}:0.5", "--to", "kohya", "--out", str(out)])
    assert "dial" not in metadata(out)


def test_metadata_for_kohyas_readers(run: Path):
    export.main([str(run), "--to", "kohya"])
    wanted = dict(ss_network_dim="2", ss_network_alpha="3", ss_network_module="networks.lora", ss_sd_model_name="tiny")
    found = metadata(run / "lora-kohya.safetensors")
    assert found.items() >= wanted.items() and "ss_v2" not in found  # width 32 is no version of SD


@pytest.mark.parametrize(
    "width, prediction, version, v2",
    [(768, "eps", "sd_v1", "False"), (1024, "eps", "sd_v2", "True"), (1024, "v", "sd_v2_v", "True")],
)
def test_the_version_is_read_off_the_context(width: int, prediction: str, version: str, v2: str, tmp_path: Path):
    """Without ss_v2, AUTOMATIC1111 treats a LoRA as one for SD 1 and hides it with SD 2."""
    unet = inject_lora(tiny_unet(config=replace(TINY_UNET, context_width=width)), rank=1, targets=["*attn2*"])
    save_lora(unet, tmp_path / "lora.safetensors", METADATA | dict(prediction=prediction))
    export.main([str(tmp_path), "--to", "kohya"])
    found = metadata(tmp_path / "lora-kohya.safetensors")
    assert (found["ss_base_model_version"], found["ss_v2"]) == (version, v2)


def test_from_one_format_to_the_next_and_back(run: Path, tmp_path: Path):
    """peft -> kohya -> peft preserves the tensors exactly."""
    write_tensors(tmp_path / "a", peft_tensors(read_lora(run / "lora.safetensors")), {})
    export.main([str(tmp_path / "a"), "--to", "kohya", "--out", str(tmp_path / "b")])
    export.main([str(tmp_path / "b"), "--to", "peft", "--out", str(tmp_path / "c")])
    before, after = load_file(tmp_path / "a"), load_file(tmp_path / "c")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_half_strength(run: Path):
    export.main([f"{run}:0.5", "--to", "peft"])
    whole, half = (read_lora(run / name).layers for name in ("lora.safetensors", "lora-peft.safetensors"))
    assert all(torch.equal(half[name].up, 0.5 * pair.scale * pair.up) for name, pair in whole.items())
    assert read_lora(run / "lora-peft.safetensors").guidance == read_lora(run / "lora.safetensors", 0.5).guidance


def test_the_command_line(run: Path, command):
    """The command in the README prints nothing but the file it wrote."""
    words = [sys.executable, "-m", "minidistill.export", str(run), "--to", "kohya"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"Wrote {run / 'lora-kohya.safetensors'}\n"), result.stderr
    assert not result.stderr
    result = command("minidistill/export/__main__.py", run / "nowhere", "--to", "kohya")
    assert result.complaint.startswith("minidistill.export: ") and len(result.lines) == 1


# A checkpoint


def test_the_checkpoint_is_the_merged_student(run: Path, tiny_model: Path):
    export.main([str(run), "--to", "checkpoint", "--model", str(tiny_model)])
    found = load(run / "lora-checkpoint")
    student = load(tiny_model)
    student.unet = load_lora(student.unet, run / "lora.safetensors")
    merge_lora(student.unet)
    for name, weight in found.unet.state_dict().items():
        assert torch.equal(weight, student.unet.state_dict()[name]), name
    options = dict(prompts=["a red apple"], steps=3, height=16, width=16)
    (one,), (other,) = found.sample(guidance=1, **options), student.sample(lora_enabled=True, **options)
    assert np.array_equal(one, other)


@pytest.mark.parametrize("kind", ["folder", "file of a folder", "file"])
def test_a_merged_student_is_not_guided_again(
    kind: str, student_of_it: Path, ordinary: Path, single: Path, command, tmp_path: Path
):
    source, out = single if kind == "file" else ordinary, tmp_path / f"merged{'.safetensors' * (kind != 'folder')}"
    assert load(source).learned_guidance is None
    merge(student_of_it, source, out)
    style = tmp_path / "style.safetensors"
    write_tensors(style, load_file(student_of_it), {"rank": "2", "alpha": "3"})
    styled = merge(style, out, out.with_stem("styled"))  # a style does not hide what the model has learned
    for merged in (out, styled):
        sd = load(merged, tokenizer=ordinary / "tokenizer")
        assert sd.learned_guidance == "4"
        assert sd.sample(["an apple"], steps=1, guidance=1)
        for guidance in (None, 3):
            with pytest.raises(ValueError, match="has learned guidance 4: sample it with guidance 1"):
                sd.sample(["an apple"], steps=1, guidance=guidance)
        with pytest.raises(CheckpointError, match="must not be learned twice"):
            add_student(sd, read_lora(student_of_it))
        with pytest.raises(CheckpointError, match="must not be learned twice"):
            merge(student_of_it, merged, tmp_path / "twice.safetensors")
        run = command("train.py", "--model", str(merged), "--tokenizer", str(ordinary / "tokenizer"), "--out", "run")
        assert "must not be learned twice" in run.complaint


def test_the_rest_of_the_folder_is_copied(run: Path, tiny_model: Path):
    shutil.copytree(tiny_model, run / "model")
    (run / "model/unet/diffusion_pytorch_model.fp16.safetensors").touch()  # not merged, like the next
    (run / "model/v1-5-pruned.ckpt").touch()
    shutil.copytree(run / "model/vae", run / "model/clip")
    merge(run, run / "model", run / "out")
    files = {str(path.relative_to(tiny_model)) for path in tiny_model.rglob("*") if path.is_file()}
    found = {str(path.relative_to(run / "out")) for path in (run / "out").rglob("*") if path.is_file()}
    assert found == files | {"model_index.json"}  # the tiny model has no index, so one is written
    assert all((run / "out" / name).read_bytes() == (tiny_model / name).read_bytes() for name in files - {UNET})
    assert read_json(run / "out/model_index.json")["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert metadata(run / "out" / UNET).items() >= METADATA.items()


def test_the_index_names_only_what_is_there(run: Path, tiny_model: Path):
    """We do not download the safety checker, and diffusers rejects a folder that lacks a part its index names."""
    named = {name: ["diffusers", "Something"] for name in ("unet", "vae", "safety_checker", "feature_extractor")}
    shutil.copytree(tiny_model, run / "model")
    write_json(run / "model/model_index.json", named | {"requires_safety_checker": True})
    merge(run, run / "model", run / "out")
    absent = {name: [None, None] for name in ("safety_checker", "feature_extractor")}
    assert read_json(run / "out/model_index.json") == named | absent | {"requires_safety_checker": False}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_is_kept(dtype: torch.dtype, run: Path):
    model = half(write_tiny(run / "model"), dtype)
    merge(run, model, run / "out")
    assert_merged(load_file(run / "out" / UNET), load_file(model / UNET), run / "lora.safetensors")


def assert_merged(found: dict[str, Tensor], weights: dict[str, Tensor], lora: Path) -> None:
    layers = read_lora(lora).layers
    for name, weight in weights.items():
        pair = layers.get(name.removesuffix(".weight"))
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], (weight + pair.delta(weight.device)).to(weight.dtype) if pair else weight), name


def test_a_style_is_merged_with_the_student(run: Path, tiny_model: Path):
    style = f"{write_lora(run / 'style.safetensors', {}, seed=70, targets=['*attn*'])}:0.5"
    export.main([str(run), style, *f"--to checkpoint --model {tiny_model} --out {run}/both".split()])
    styled = merge(style, tiny_model, run / "styled")
    both, then = load_file(run / "both" / UNET), load_file(merge(run, styled, run / "then") / UNET)
    assert all(torch.equal(both[name], then[name]) for name in both)
    assert metadata(styled / UNET) == {"format": "pt"}


def test_a_student_of_a_styled_teacher_misses_the_style(run: Path, tiny_model: Path):
    write_lora(run / "lora.safetensors", METADATA | dict(teacher_lora="style.safetensors:0.5"))
    with pytest.warns(UserWarning, match="style.safetensors:0.5"):
        merge(run, tiny_model, run / "out")


# A single file


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that can become a single file, because it has the heads and groups of SD 1.x."""
    folder = write_tiny(tmp_path_factory.mktemp("models") / "ordinary")
    unet = UNetConfig(widths=(32, 64), layers=1, depth=(1, 0), heads=(8, 8), context_width=64, sample_size=8)
    vae = VAEConfig(widths=(32, 64), layers=1)
    text = CLIPTextConfig.from_dict(read_json(folder / "text_encoder/config.json"))
    text.hidden_size, text.num_attention_heads = 64, 1
    torch.manual_seed(0)
    save_file(UNet(unet).half().state_dict(), folder / UNET, {"base": "its own", "author": "somebody"})
    save_file(VAE(vae).state_dict(), folder / "vae/diffusion_pytorch_model.safetensors")
    save_file(CLIPTextModel(text).state_dict(), folder / "text_encoder/model.safetensors")
    write_json(folder / "unet/config.json", published_unet(unet))
    write_json(folder / "vae/config.json", published_vae(vae, side=16))
    write_json(folder / "text_encoder/config.json", text.to_dict())
    return folder


@pytest.fixture
def student_of_it(ordinary: Path, tmp_path: Path) -> Path:
    student = fill_up(inject_lora(load(ordinary).unet, rank=2))
    save_lora(student, tmp_path / "lora.safetensors", METADATA)
    return tmp_path / "lora.safetensors"


@pytest.fixture
def copied(ordinary: Path, tmp_path: Path) -> Path:
    """A private copy, to change."""
    return Path(shutil.copytree(ordinary, tmp_path / "model"))


@pytest.fixture
def single(ordinary: Path, tmp_path: Path) -> Path:
    """The same model as a single file."""
    write_checkpoint(ordinary, lambda tensors: tensors, tmp_path / "single.safetensors", {})
    return tmp_path / "single.safetensors"


def test_a_single_file_of_a_folder(student_of_it: Path, ordinary: Path, tmp_path: Path):
    folder, file = (
        load(merge(student_of_it, ordinary, tmp_path / name), tokenizer=ordinary / "tokenizer")
        for name in ("folder", "file.safetensors")
    )
    assert merge(student_of_it, ordinary, tmp_path / "IN.SAFETENSORS").is_file()
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(folder, part).state_dict()
        found = getattr(file, part).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert load_file(tmp_path / "file.safetensors")["model.diffusion_model.out.2.weight"].dtype == torch.float16
    for file in (tmp_path / "folder" / UNET, tmp_path / "file.safetensors"):  # the student's base, and all else
        assert metadata(file).items() >= (METADATA | {"author": "somebody"}).items()


@pytest.mark.parametrize(
    "published, ours, zero_snr", [("epsilon", "eps", False), ("v_prediction", "v", False), ("v_prediction", "v", True)]
)
def test_a_single_file_says_what_it_predicts(
    published: str, ours: str, zero_snr: bool, student_of_it: Path, copied: Path, tmp_path: Path
):
    """A folder's scheduler states it; for a file it would be guessed from the version."""
    edit_json(copied / SCHEDULE, {"prediction_type": published, "rescale_betas_zero_snr": zero_snr})
    out = merge(student_of_it, copied, tmp_path / "x.safetensors")
    before, after = load(copied).schedule, load(out).schedule
    assert before.prediction == after.prediction == ours
    assert torch.equal(before.alphas_cumprod, after.alphas_cumprod) and (after.alphas_cumprod[-1] < 1e-6) == zero_snr
    assert metadata(out)["modelspec.prediction_type"] == {"eps": "epsilon", "v": "v"}[ours]


def test_a_single_file_of_a_single_file(student_of_it: Path, ordinary: Path, single: Path, tmp_path: Path):
    """Everything but the UNet is unchanged. EMA copies are left out, since nothing was merged into them."""
    extra = {"betas": torch.ones(3), "model_ema.diffusion_modelout2weight": torch.ones(1)}
    save_file(load_file(single) | extra, single, {"modelspec.prediction_type": "epsilon", "base": "its own"})
    found = merge(student_of_it, single, tmp_path / "found.safetensors")
    expected = merge(student_of_it, ordinary, tmp_path / "expected.safetensors")
    tensors = load_file(expected) | {"betas": torch.ones(3)}
    assert load_file(found).keys() == tensors.keys()
    assert all(torch.equal(load_file(found)[name], tensor) for name, tensor in tensors.items())
    assert metadata(found).items() >= (METADATA | {"modelspec.prediction_type": "epsilon"}).items()
    export.main([str(student_of_it), "--to", "checkpoint", "--model", str(single)])
    assert (tmp_path / "lora-checkpoint.safetensors").read_bytes() == found.read_bytes()


def test_a_student_knows_what_its_single_file_predicts(student_of_it: Path, single: Path, tmp_path: Path):
    save_file(load_file(single), single)  # without its header
    save_file(load_file(student_of_it), student_of_it, metadata(student_of_it) | {"prediction": "v"})
    assert load(merge(student_of_it, single, tmp_path / "out.safetensors")).schedule.prediction == "v"


@pytest.mark.parametrize("kind, out", [("folder", "out"), ("folder", "out.safetensors"), ("file", "out.safetensors")])
def test_a_student_of_another_prediction_is_refused(
    kind: str, out: str, student_of_it: Path, ordinary: Path, single: Path, tmp_path: Path
):
    """The layers are the same, so the images would be wrong without an error."""
    model, out = single if kind == "file" else ordinary, tmp_path / out
    save_file(load_file(student_of_it), student_of_it, metadata(student_of_it) | {"prediction": "v"})
    with pytest.raises(CheckpointError, match="predicts v, and .* says that it predicts eps: give --model"):
        merge(student_of_it, model, out)
    assert not out.exists()
    merge(student_of_it, model, out, "--prediction", "v")
    assert load(out).schedule.prediction == "v"  # what is written is corrected


def test_a_mark_that_the_flag_corrects_is_left_out(student_of_it: Path, single: Path, tmp_path: Path):
    save_file(load_file(single) | {"v_pred": torch.zeros(0)}, single)
    out = merge(student_of_it, single, tmp_path / "out.safetensors", "--prediction", "eps")
    assert (load(single).schedule.prediction, load(out).schedule.prediction) == ("v", "eps")


def test_the_averaged_copy_of_a_single_file(student_of_it: Path, ordinary: Path, single: Path, tmp_path: Path):
    unet = {name: tensor for name, tensor in load_file(single).items() if name.startswith("model.")}
    copies = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": 2 * tensor for name, tensor in unet.items()}
    save_file(load_file(single) | copies, single)
    found = load(merge(student_of_it, single, tmp_path / "found.safetensors", "--ema"), dtype=torch.float16).unet
    averaged = load(single, dtype=torch.float16, ema=True).unet
    assert_merged(found.state_dict(), averaged.state_dict(), student_of_it)
    with pytest.raises(ValueError, match="leave --ema out"):
        merge(student_of_it, ordinary, tmp_path / "no", "--ema")


def damage_vae(model: Path) -> None:
    file = model / "vae/diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"decoder.conv_in.bias": torch.full((64,), torch.nan)}, file)


def lose_a_tensor(model: Path) -> None:
    save_file({name: x for name, x in load_file(model / UNET).items() if name != "conv_norm_out.bias"}, model / UNET)


SCHEDULE = "scheduler/scheduler_config.json"
REFUSED = [
    damage_vae,
    lose_a_tensor,
    lambda model: shutil.rmtree(model / "text_encoder"),
    lambda model: edit_json(model / SCHEDULE, {"timestep_spacing": "trailing"}),  # as of a Turbo
    lambda model: edit_json(model / SCHEDULE, {"rescale_betas_zero_snr": True}),  # noise that hides eps
]


@pytest.mark.parametrize("out", ["folder", "file.safetensors"])
@pytest.mark.parametrize("change", REFUSED)
def test_a_model_that_load_refuses_is_not_merged_into(change, out: str, student_of_it: Path, copied: Path, tmp_path):
    """Otherwise the result would be written, and fail only in somebody's hands."""
    change(copied)
    with pytest.raises(CheckpointError) as refused:
        load(copied)
    with pytest.raises(CheckpointError, match=re.escape(str(refused.value))):
        merge(student_of_it, copied, tmp_path / out)
    assert not list(tmp_path.glob(f"*{out}*"))


def test_a_damaged_single_file_is_not_merged_into(student_of_it: Path, single: Path, tmp_path: Path):
    save_file(load_file(single), single, {"modelspec.hash_sha256": "0xabc"})
    out = merge(student_of_it, single, tmp_path / "out.safetensors")
    assert "modelspec.hash_sha256" not in metadata(out)  # it was that of the tensors before
    out.unlink()
    save_file(load_file(single) | {"model.diffusion_model.out.0.bias": torch.full((32,), torch.inf)}, single)
    with pytest.raises(CheckpointError, match="not finite"):
        merge(student_of_it, single, out)
    assert not out.exists()


def test_frozen_weights_have_no_averaged_copy(single: Path):
    """The average of a fine-tune has only what was trained; the rest is as it was."""
    tensors, trained = load_file(single), "model.diffusion_model.out.2.weight"
    save_file(tensors | {f"model_ema.{trained.removeprefix('model.').replace('.', '')}": 2 * tensors[trained]}, single)
    with pytest.warns(UserWarning, match="no EMA copy of"):
        averaged = load(single, dtype=torch.float16, ema=True).unet
    assert torch.equal(averaged.conv_out.weight, 2 * tensors[trained])
    assert torch.equal(averaged.conv_in.weight, tensors["model.diffusion_model.input_blocks.0.0.weight"])


def test_a_folder_needs_a_folder(student_of_it: Path, single: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="tokenizer"):
        merge(student_of_it, single, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def change_text_encoder(model: Path, **changes: int) -> None:
    config = CLIPTextConfig.from_pretrained(model / "text_encoder", **changes)
    CLIPTextModel(config).save_pretrained(model / "text_encoder")


UNSTATED = {  # a file holds no configuration: other programs would read this model otherwise than it is
    "heads": (lambda model: edit_json(model / "unet/config.json", dict(attention_head_dim=4)), "Write a folder"),
    "noise levels": (
        lambda model: edit_json(model / SCHEDULE, dict(beta_end=0.02)),
        "noise levels that a single file cannot state",
    ),
    "width of the text encoder": (
        lambda model: change_text_encoder(model, hidden_size=768, intermediate_size=32, num_attention_heads=12),
        "expect 12 layers.*Write a folder",
    ),
    "words": (  # SDXL's pooled vector would be read at another token
        lambda model: change_text_encoder(model, vocab_size=49410),
        "expect 49408 tokens.*learned 2 more. Write a folder",
    ),
    "no scheduler": (lambda model: shutil.rmtree(model / "scheduler"), "not a complete.*scheduler"),
}


@pytest.mark.parametrize("change, message", UNSTATED.values(), ids=UNSTATED)
def test_what_no_single_file_can_hold(change, message: str, student_of_it: Path, copied: Path, tmp_path: Path):
    change(copied)
    with pytest.raises(ValueError, match=message):
        merge(student_of_it, copied, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
    if "noise levels" in message:  # which a folder states
        assert (merge(student_of_it, copied, tmp_path / "folder") / "unet").is_dir()


def test_a_read_only_folder(student_of_it: Path, copied: Path, tmp_path: Path):
    for path in copied.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    out = merge(student_of_it, copied, tmp_path / "out")
    assert all(path.stat().st_mode & 0o200 for path in out.rglob("*"))


def test_hashes_of_other_tensors_are_left_out(tmp_path: Path):
    hashes = {"sshs_model_hash": "abc", "sshs_legacy_hash": "ab", "modelspec.hash_sha256": "0xabc"}
    style = write_lora(tmp_path / "style.safetensors", hashes)
    export.main([f"{style}:0.5", "--to", "kohya", "--out", str(tmp_path / "half.safetensors")])
    assert not hashes.keys() & set(metadata(tmp_path / "half.safetensors"))


def test_tensors_that_share_memory(tmp_path: Path):
    x = torch.arange(4.0)
    write_tensors(tmp_path / "x.safetensors", {"a": x, "b": x, "c": x[:2]}, {})
    found = load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["a"], found["b"]) and found["c"].tolist() == [0, 1]


def test_a_last_step_that_no_single_file_can_state(student_of_it: Path, copied: Path, tmp_path: Path):
    edit_json(copied / SCHEDULE, dict(set_alpha_to_one=True))
    with pytest.warns(UserWarning, match="cannot state how .*model spaces its steps or ends them"):
        merge(student_of_it, copied, tmp_path / "one.safetensors")


def test_a_variant_stays_one(student_of_it: Path, copied: Path, tmp_path: Path):
    """The output loads with the same --variant, although a .bin becomes a .safetensors."""
    for weights in list(copied.glob("*/*.safetensors")):
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    unet = copied / "unet/diffusion_pytorch_model.fp16.safetensors"
    torch.save(load_file(unet), unet.with_suffix(".bin"))
    unet.unlink()
    out = merge(student_of_it, copied, tmp_path / "out", "--variant", "fp16")
    assert (out / "unet/diffusion_pytorch_model.fp16.safetensors").exists()
    load(out, variant="fp16")


# Errors


def test_another_model_is_refused_and_nothing_written(run: Path, tiny_model: Path):
    unet = inject_lora(tiny_unet(config=replace(TINY_UNET, context_width=48)), rank=2)
    save_lora(unet, run / "lora.safetensors", dict(base="other"))
    with pytest.raises(CheckpointError, match="another model.*made for other"):
        merge(run, tiny_model, run / "out")
    assert [path.name for path in run.iterdir()] == ["lora.safetensors"]


def test_an_existing_folder_is_left_alone(run: Path, tiny_model: Path):
    (run / "out").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        merge(run, tiny_model, run / "out")
    assert not list((run / "out").iterdir())


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_checkpoint_leaves_nothing(failure: BaseException, run: Path, tiny_model: Path, monkeypatch):
    def save_half(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(tensor_files, "save_file", save_half)
    with pytest.raises(type(failure)):
        merge(run, tiny_model, run / "out")
    assert [path.name for path in run.iterdir()] == ["lora.safetensors"]


FOR_A_MERGE = "give them with --to checkpoint"


@pytest.mark.parametrize(
    "flags, named",
    [
        ("unfinished --to peft", "unfinished"),
        ("nothing.safetensors --to kohya", "nothing.safetensors is missing"),
        (". . --to peft", "one by one"),
        (". . --to checkpoint", "each learned guidance"),
        (". --to checkpoint --model nowhere", "nowhere"),
        (". --to kohya --out x.ckpt", "name a .safetensors file"),
        (". --to checkpoint --out x.ckpt", "name a .safetensors file"),
        (". --to peft --out .", "name a .safetensors file"),
        (". --to kohya --out ../run/lora.safetensors", "written over what it is made from"),
        (". --to kohya --ema", FOR_A_MERGE),
        (". --to kohya --variant fp16", FOR_A_MERGE),
        (". --to kohya --prediction v", FOR_A_MERGE),
        (". --to kohya --stochastic", FOR_A_MERGE),
    ],
)
def test_bad_input_is_named(flags: str, named: str, run: Path, monkeypatch: pytest.MonkeyPatch):
    (run / "unfinished").mkdir()
    monkeypatch.chdir(run)
    before = (run / "lora.safetensors").read_bytes()
    with pytest.raises(ValueError, match=named):
        export.main(flags.split())
    assert {path.name for path in run.iterdir()} == {"lora.safetensors", "unfinished"}
    assert (run / "lora.safetensors").read_bytes() == before


# What a merge loses


def half(model: Path, dtype: torch.dtype) -> Path:
    save_file({name: tensor.to(dtype) for name, tensor in load_file(model / UNET).items()}, model / UNET)
    return model


def test_the_report_of_a_merge(run: Path, tmp_path: Path, capsys):
    model = half(write_tiny(tmp_path / "model"), torch.bfloat16)
    merge(run, model, tmp_path / "large")
    assert re.search(r"(99|100)\.\d% of the change survives .* least in", capsys.readouterr().out)
    with pytest.warns(UserWarning, match="export --stochastic"):
        merge(f"{run}:1e-4", model, tmp_path / "small")


def test_stochastic_rounding_is_seeded(run: Path, tmp_path: Path, capsys):
    model = half(write_tiny(tmp_path / "model"), torch.float16)
    seeds = dict(plain=[], one=["--stochastic", "1"], same=["--stochastic", "1"], zero=["--stochastic"])
    plain, one, same, zero = (
        (merge(f"{run}:1e-3", model, tmp_path / name, *seed) / UNET).read_bytes() for name, seed in seeds.items()
    )
    assert one == same and len({plain, one, zero}) == 3
    before, after = (load_file(folder / UNET) for folder in (model, tmp_path / "zero"))
    deltas = {f"{name}.weight": pair.delta("cpu") for name, pair in fit(read_lora(run, 1e-3), before).items()}
    noise = sum((after[name].float() - before[name].float() - d).square().sum() for name, d in deltas.items())
    wanted = 100 * (noise / sum(d.square().sum() for d in deltas.values())).sqrt().item()
    said = re.findall(r"survives on average, with noise of (\d+)% of its norm", capsys.readouterr().out)
    assert int(said[-1]) == pytest.approx(wanted, rel=0.1)


def test_8_bits_are_refused(run: Path, tmp_path: Path):
    model = half(write_tiny(tmp_path / "model"), torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"weights of 8 bits \(.*16 or 32 bits"):
        merge(run, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_checkpoint(model, replaced_by(tiny_unet()), tmp_path / "out", {})  # a full copy is whole, in float16
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / UNET).values()} == {torch.float16}
