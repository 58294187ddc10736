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
from transformers import CLIPTextConfig, CLIPTextModel

from minidistill import CheckpointError, inject_lora, load, load_lora, merge_lora, save_lora
from minidistill.config import UNetConfig, VAEConfig
from minidistill.export import __main__ as export
from minidistill.formats import tensor_files
from minidistill.formats.files import read_json, write_json
from minidistill.formats.lora_formats import peft_tensors, read_lora
from minidistill.formats.lora_io import add_student
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


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_run_becomes_a_file_beside_its_lora(run: Path, capsys):
    for to in ("peft", "kohya"):
        export.main([str(run), "--to", to])
        assert f"Wrote {run / f'lora-{to}.safetensors'}" in capsys.readouterr().out
    assert {path.name for path in run.iterdir()} == {f"lora{to}.safetensors" for to in ("", "-peft", "-kohya")}


@pytest.mark.parametrize("to", ["peft", "kohya"])
def test_exported_metadata(to: str, run: Path):
    export.main([str(run), "--to", to])
    found = metadata(run / f"lora-{to}.safetensors")
    assert found.items() >= (METADATA | {"rank": "2", "format": "pt"}).items()
    assert "exactly 1" in found["modelspec.usage_hint"]
    assert "alpha" not in found  # peft readers ignore it, kohya readers use a tensor
    assert read_lora(run / f"lora-{to}.safetensors").is_student


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


@pytest.mark.parametrize("to", ["peft", "kohya"])
def test_equal_students_give_equal_bytes(to: str, run: Path, tmp_path: Path):
    for name in ("one", "two"):
        export.main([str(run), "--to", to, "--out", str(tmp_path / name)])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


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


def test_the_command_line(run: Path):
    """The command in the README prints nothing but the file it wrote."""
    command = [sys.executable, "-m", "minidistill.export", str(run), "--to", "kohya"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"Wrote {run / 'lora-kohya.safetensors'}\n"), result.stderr
    assert not result.stderr
    command[3] = str(run / "nowhere")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0 and result.stderr.startswith("minidistill.export: ")
    assert len(result.stderr.splitlines()) == 1


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
def test_a_merged_student_is_not_guided_again(kind: str, student_of_it: Path, ordinary: Path, command, tmp_path: Path):
    source, out = ordinary, tmp_path / ("merged" if kind == "folder" else "merged.safetensors")
    merge = ["--to", "checkpoint", "--out"]
    if kind == "file":
        source = tmp_path / "source.safetensors"
        write_checkpoint(ordinary, lambda tensors: tensors, source, {})
    assert load(source).learned_guidance is None
    export.main([str(student_of_it), *merge, str(out), "--model", str(source)])
    styled = out.with_stem("styled")  # a style does not hide what the model has learned
    style = tmp_path / "style.safetensors"
    write_tensors(style, load_file(student_of_it), {"rank": "2", "alpha": "3"})
    export.main([str(style), *merge, str(styled), "--model", str(out)])
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
            export.main([str(student_of_it), *merge, str(tmp_path / "twice.safetensors"), "--model", str(merged)])
        run = command("train.py", "--model", str(merged), "--tokenizer", str(ordinary / "tokenizer"), "--out", "run")
        assert "must not be learned twice" in run.complaint


def test_the_rest_of_the_folder_is_copied(run: Path, tiny_model: Path):
    shutil.copytree(tiny_model, run / "model")
    (run / "model/unet/diffusion_pytorch_model.fp16.safetensors").touch()  # not merged, like the next
    (run / "model/v1-5-pruned.ckpt").touch()
    (run / "model/clip").mkdir()
    export.main([str(run), "--to", "checkpoint", "--model", str(run / "model"), "--out", str(run / "out")])
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
    export.main([str(run), "--to", "checkpoint", "--model", str(run / "model")])
    absent = {name: [None, None] for name in ("safety_checker", "feature_extractor")}
    assert read_json(run / "lora-checkpoint/model_index.json") == named | absent | {"requires_safety_checker": False}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_is_kept(dtype: torch.dtype, run: Path):
    model = write_tiny(run / "model")
    weights = {name: tensor.to(dtype) for name, tensor in load_file(model / UNET).items()}
    save_file(weights, model / UNET)
    export.main([str(run), "--to", "checkpoint", "--model", str(model), "--out", str(run / "out")])
    found, layers = load_file(run / "out" / UNET), read_lora(run / "lora.safetensors").layers
    for name, weight in weights.items():
        pair = layers.get(name.removesuffix(".weight"))
        assert found[name].dtype == dtype
        assert torch.equal(found[name], (weight + pair.delta(weight.device)).to(weight.dtype) if pair else weight), name


def test_a_style_is_merged_with_the_student(run: Path, tiny_model: Path):
    style = write_lora(run / "style.safetensors", {}, seed=70, targets=["*attn*"])
    flags = ["--to", "checkpoint", "--model", str(tiny_model), "--out"]
    export.main([str(run), f"{style}:0.5", *flags, str(run / "both")])
    export.main([str(style) + ":0.5", *flags, str(run / "styled")])
    export.main([str(run), "--to", "checkpoint", "--model", str(run / "styled"), "--out", str(run / "then")])
    both, then = load_file(run / "both" / UNET), load_file(run / "then" / UNET)
    assert all(torch.equal(both[name], then[name]) for name in both)
    assert metadata(run / "styled" / UNET) == {"format": "pt"}


def test_a_student_of_a_styled_teacher_misses_the_style(run: Path, tiny_model: Path):
    write_lora(run / "lora.safetensors", METADATA | dict(teacher_lora="style.safetensors:0.5"))
    with pytest.warns(UserWarning, match="style.safetensors:0.5"):
        export.main([str(run), "--to", "checkpoint", "--model", str(tiny_model)])


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
    save_file(UNet(unet).half().state_dict(), folder / UNET)
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


def test_a_single_file_of_a_folder(student_of_it: Path, ordinary: Path, tmp_path: Path):
    for name in ("folder", "file.safetensors"):
        flags = ["--to", "checkpoint", "--model", str(ordinary), "--out", str(tmp_path / name)]
        export.main([str(student_of_it), *flags])
    folder, file = (load(tmp_path / n, tokenizer=ordinary / "tokenizer") for n in ("folder", "file.safetensors"))
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(folder, part).state_dict()
        found = getattr(file, part).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert load_file(tmp_path / "file.safetensors")["model.diffusion_model.out.2.weight"].dtype == torch.float16
    assert metadata(tmp_path / "file.safetensors").items() >= METADATA.items()


@pytest.mark.parametrize("published, ours", [("epsilon", "eps"), ("v_prediction", "v")])
def test_a_single_file_says_what_it_predicts(
    published: str, ours: str, student_of_it: Path, ordinary: Path, tmp_path: Path
):
    """A folder's scheduler states it; for a file it would be guessed from the version."""
    model, out = shutil.copytree(ordinary, tmp_path / "model"), tmp_path / "x.safetensors"
    edit_json(model / "scheduler/scheduler_config.json", {"prediction_type": published})
    export.main([str(student_of_it), "--to", "checkpoint", "--model", str(model), "--out", str(out)])
    assert load(model).schedule.prediction == load(out).schedule.prediction == ours
    assert metadata(out)["modelspec.prediction_type"] == {"eps": "epsilon", "v": "v"}[ours]


def test_a_single_file_of_a_single_file(student_of_it: Path, ordinary: Path, tmp_path: Path):
    """Everything but the UNet is unchanged. EMA copies are left out, since nothing was merged into them."""
    plain, found, expected = (tmp_path / f"{name}.safetensors" for name in ("plain", "found", "expected"))
    flags = ["--to", "checkpoint", "--model"]
    export.main([f"{student_of_it}:0", *flags, str(ordinary), "--out", str(plain)])
    extra = {"betas": torch.ones(3), "model_ema.diffusion_modelout2weight": torch.ones(1)}
    save_file(load_file(plain) | extra, plain, {"modelspec.prediction_type": "epsilon"})
    export.main([str(student_of_it), *flags, str(plain), "--out", str(found)])
    export.main([str(student_of_it), *flags, str(ordinary), "--out", str(expected)])
    tensors = load_file(expected) | {"betas": torch.ones(3)}
    assert load_file(found).keys() == tensors.keys()
    assert all(torch.equal(load_file(found)[name], tensor) for name, tensor in tensors.items())
    assert metadata(found)["modelspec.prediction_type"] == "epsilon"
    export.main([str(student_of_it), *flags, str(plain)])
    assert (tmp_path / "lora-checkpoint.safetensors").read_bytes() == found.read_bytes()


def test_a_student_knows_what_its_single_file_predicts(student_of_it: Path, ordinary: Path, tmp_path: Path):
    silent, out = tmp_path / "silent.safetensors", tmp_path / "out.safetensors"
    export.main([f"{student_of_it}:0", "--to", "checkpoint", "--model", str(ordinary), "--out", str(silent)])
    save_file(load_file(silent), silent)  # without its header
    save_file(load_file(student_of_it), student_of_it, metadata(student_of_it) | {"prediction": "v"})
    export.main([str(student_of_it), "--to", "checkpoint", "--model", str(silent), "--out", str(out)])
    assert load(out).schedule.prediction == "v"


@pytest.mark.parametrize("kind, out", [("folder", "out"), ("folder", "out.safetensors"), ("file", "out.safetensors")])
def test_a_student_of_another_prediction_is_refused(
    kind: str, out: str, student_of_it: Path, ordinary: Path, tmp_path: Path
):
    """The layers are the same, so the images would be wrong without an error."""
    model, flags = ordinary, ["--to", "checkpoint", "--model"]
    if kind == "file":
        model = tmp_path / "file.safetensors"
        export.main([f"{student_of_it}:0", *flags, str(ordinary), "--out", str(model)])
    save_file(load_file(student_of_it), student_of_it, metadata(student_of_it) | {"prediction": "v"})
    with pytest.raises(CheckpointError, match="predicts v, and .* says that it predicts eps: give --model"):
        export.main([str(student_of_it), *flags, str(model), "--out", str(tmp_path / out)])
    assert not (tmp_path / out).exists()
    export.main([str(student_of_it), *flags, str(model), "--out", str(tmp_path / out), "--prediction", "v"])
    assert load(tmp_path / out).schedule.prediction == "v"  # what is written is corrected


def test_the_averaged_copy_of_a_single_file(student_of_it: Path, ordinary: Path, tmp_path: Path):
    plain, flags = tmp_path / "plain.safetensors", ["--to", "checkpoint", "--model"]
    export.main([f"{student_of_it}:0", *flags, str(ordinary), "--out", str(plain)])
    unet = {name: tensor for name, tensor in load_file(plain).items() if name.startswith("model.")}
    copies = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": 2 * tensor for name, tensor in unet.items()}
    save_file(load_file(plain) | copies, plain)
    export.main([str(student_of_it), *flags, str(plain), "--ema", "--out", str(tmp_path / "found.safetensors")])
    found = load(
        tmp_path / "found.safetensors", dtype=torch.float16, tokenizer=ordinary / "tokenizer"
    ).unet.state_dict()
    averaged = load(plain, dtype=torch.float16, ema=True, tokenizer=ordinary / "tokenizer").unet.state_dict()
    layers = read_lora(student_of_it).layers
    for name, weight in averaged.items():
        pair = layers.get(name.removesuffix(".weight"))
        assert torch.equal(found[name], (weight + pair.delta(weight.device)).to(weight.dtype) if pair else weight), name
    with pytest.raises(ValueError, match="leave --ema out"):
        export.main([str(student_of_it), *flags, str(ordinary), "--ema"])


def damage_vae(model: Path) -> None:
    file = model / "vae/diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"decoder.conv_in.bias": torch.full((64,), torch.nan)}, file)


def lose_a_tensor(model: Path) -> None:
    save_file({name: x for name, x in load_file(model / UNET).items() if name != "conv_norm_out.bias"}, model / UNET)


def lose_the_text_encoder(model: Path) -> None:
    shutil.rmtree(model / "text_encoder")


def make_turbo(model: Path) -> None:
    file = model / "scheduler/scheduler_config.json"
    write_json(file, read_json(file) | {"timestep_spacing": "trailing"})


def let_noise_hide_eps(model: Path) -> None:
    file = model / "scheduler/scheduler_config.json"
    write_json(file, read_json(file) | {"rescale_betas_zero_snr": True})


@pytest.mark.parametrize("out", ["folder", "file.safetensors"])
@pytest.mark.parametrize("change", [damage_vae, lose_a_tensor, lose_the_text_encoder, make_turbo, let_noise_hide_eps])
def test_a_model_that_load_refuses_is_not_merged_into(change, out: str, student_of_it: Path, ordinary: Path, tmp_path):
    """Otherwise the result would be written, and fail only in somebody's hands."""
    model = shutil.copytree(ordinary, tmp_path / "model")
    change(model)
    with pytest.raises(CheckpointError) as refused:
        load(model)
    flags = ["--to", "checkpoint", "--model", str(model), "--out", str(tmp_path / out)]
    with pytest.raises(CheckpointError, match=re.escape(str(refused.value))):
        export.main([str(student_of_it), *flags])
    assert not list(tmp_path.glob(f"*{out}*"))


def test_a_damaged_single_file_is_not_merged_into(student_of_it: Path, ordinary: Path, tmp_path: Path):
    source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    write_checkpoint(ordinary, lambda tensors: tensors, source, {"modelspec.hash_sha256": "0xabc"})
    export.main([str(student_of_it), "--to", "checkpoint", "--model", str(source), "--out", str(out)])
    assert "modelspec.hash_sha256" not in metadata(out)  # it was that of the tensors before
    out.unlink()
    save_file(load_file(source) | {"model.diffusion_model.out.0.bias": torch.full((32,), torch.inf)}, source)
    with pytest.raises(CheckpointError, match="not finite"):
        export.main([str(student_of_it), "--to", "checkpoint", "--model", str(source), "--out", str(out)])
    assert not out.exists()


def test_frozen_weights_have_no_averaged_copy(student_of_it: Path, ordinary: Path, tmp_path: Path):
    """The average of a fine-tune has only what was trained; the rest is as it was."""
    plain, flags = tmp_path / "plain.safetensors", ["--to", "checkpoint", "--model"]
    export.main([f"{student_of_it}:0", *flags, str(ordinary), "--out", str(plain)])
    tensors = load_file(plain)
    trained = "model.diffusion_model.out.2.weight"
    save_file(tensors | {f"model_ema.{trained.removeprefix('model.').replace('.', '')}": 2 * tensors[trained]}, plain)
    with pytest.warns(UserWarning, match="no EMA copy of"):
        averaged = load(plain, dtype=torch.float16, ema=True, tokenizer=ordinary / "tokenizer").unet
    assert torch.equal(averaged.conv_out.weight, 2 * tensors[trained])
    assert torch.equal(averaged.conv_in.weight, tensors["model.diffusion_model.input_blocks.0.0.weight"])


def test_a_folder_needs_a_folder(student_of_it: Path, ordinary: Path, tmp_path: Path):
    flags = ["--to", "checkpoint", "--model"]
    export.main([str(student_of_it), *flags, str(ordinary), "--out", str(tmp_path / "x.safetensors")])
    with pytest.raises(ValueError, match="tokenizer"):
        export.main([str(student_of_it), *flags, str(tmp_path / "x.safetensors"), "--out", str(tmp_path / "folder")])
    assert not (tmp_path / "folder").exists()


def test_heads_that_no_single_file_can_hold(student_of_it: Path, ordinary: Path, tmp_path: Path):
    """A file holds no configuration: this model would be read back with eight heads."""
    edit_json(shutil.copytree(ordinary, tmp_path / "model") / "unet/config.json", dict(attention_head_dim=4))
    flags = ["--to", "checkpoint", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "x.safetensors")]
    with pytest.raises(ValueError, match="Write a folder"):
        export.main([str(student_of_it), *flags])
    assert not (tmp_path / "x.safetensors").exists()


def test_noise_levels_that_no_single_file_can_state(student_of_it: Path, ordinary: Path, tmp_path: Path):
    model = shutil.copytree(ordinary, tmp_path / "model")
    edit_json(model / "scheduler/scheduler_config.json", dict(beta_end=0.02))
    flags = [str(student_of_it), "--to", "checkpoint", "--model", str(model), "--out"]
    with pytest.raises(ValueError, match="noise levels that a single file cannot state"):
        export.main([*flags, str(tmp_path / "one.safetensors")])
    export.main([*flags, str(tmp_path / "folder")])
    assert (tmp_path / "folder/unet").is_dir() and not (tmp_path / "one.safetensors").exists()


def test_a_text_encoder_that_other_programs_would_misread(student_of_it: Path, ordinary: Path, tmp_path: Path):
    model = Path(shutil.copytree(ordinary, tmp_path / "model"))
    config = CLIPTextConfig.from_pretrained(model / "text_encoder")
    config.hidden_size, config.intermediate_size, config.num_attention_heads = 768, 32, 12
    CLIPTextModel(config).save_pretrained(model / "text_encoder")
    flags = ["--to", "checkpoint", "--model", str(model), "--out", str(tmp_path / "x.safetensors")]
    with pytest.raises(ValueError, match="expect 12 layers.*Write a folder"):
        export.main([str(student_of_it), *flags])


def test_words_that_no_single_file_can_hold(student_of_it: Path, ordinary: Path, tmp_path: Path):
    """SDXL's pooled vector would be read at another token."""
    model = Path(shutil.copytree(ordinary, tmp_path / "model"))
    config = CLIPTextConfig.from_pretrained(model / "text_encoder")
    config.vocab_size = 49410
    CLIPTextModel(config).save_pretrained(model / "text_encoder")
    out = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="expect 49408 tokens.*learned 2 more. Write a folder"):
        export.main([str(student_of_it), "--to", "checkpoint", "--model", str(model), "--out", str(out)])
    assert not out.exists()


def test_a_read_only_folder(student_of_it: Path, ordinary: Path, tmp_path: Path):
    model = Path(shutil.copytree(ordinary, tmp_path / "model"))
    for path in model.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    export.main([str(student_of_it), "--to", "checkpoint", "--model", str(model), "--out", str(tmp_path / "out")])
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize(
    "flags", [["kohya", "--out", "x.ckpt"], ["checkpoint", "--out", "x.ckpt"], ["peft", "--out", "."]]
)
def test_out_has_the_right_kind_of_name(flags: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="name a .safetensors file"):
        export.main([str(run), "--to", *flags])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("flags", [["--ema"], ["--variant", "fp16"], ["--prediction", "v"], ["--stochastic"]])
def test_flags_of_a_merge(flags: list[str], run: Path):
    with pytest.raises(ValueError, match="give them with --to checkpoint"):
        export.main([str(run), "--to", "kohya", *flags])


def test_hashes_of_other_tensors_are_left_out(tmp_path: Path):
    style = write_lora(tmp_path / "style.safetensors", {"sshs_model_hash": "abc", "modelspec.hash_sha256": "0xabc"})
    export.main([f"{style}:0.5", "--to", "kohya", "--out", str(tmp_path / "half.safetensors")])
    assert not {"sshs_model_hash", "modelspec.hash_sha256"} & set(metadata(tmp_path / "half.safetensors"))


def test_tensors_that_share_memory(tmp_path: Path):
    x = torch.arange(4.0)
    write_tensors(tmp_path / "x.safetensors", {"a": x, "b": x, "c": x[:2]}, {})
    found = load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["a"], found["b"]) and found["c"].tolist() == [0, 1]


def test_a_last_step_that_no_single_file_can_state(student_of_it: Path, ordinary: Path, tmp_path: Path):
    model = shutil.copytree(ordinary, tmp_path / "model")
    edit_json(model / "scheduler/scheduler_config.json", dict(set_alpha_to_one=True))
    flags = ["--to", "checkpoint", "--model", str(model), "--out", str(tmp_path / "one.safetensors")]
    with pytest.warns(UserWarning, match="cannot state how .*model spaces its steps or ends them"):
        export.main([str(student_of_it), *flags])


def test_a_variant_stays_one(student_of_it: Path, ordinary: Path, tmp_path: Path):
    """The output loads with the same --variant, although a .bin becomes a .safetensors."""
    model = Path(shutil.copytree(ordinary, tmp_path / "model"))
    for weights in list(model.glob("*/*.safetensors")):
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    torch.save(
        load_file(model / "unet/diffusion_pytorch_model.fp16.safetensors"),
        model / UNET.replace("safetensors", "fp16.bin"),
    )
    (model / "unet/diffusion_pytorch_model.fp16.safetensors").unlink()
    flags = ["--to", "checkpoint", "--model", str(model), "--variant", "fp16", "--out", str(tmp_path / "out")]
    export.main([str(student_of_it), *flags])
    assert (tmp_path / "out/unet/diffusion_pytorch_model.fp16.safetensors").exists()
    load(tmp_path / "out", variant="fp16")


# Errors


def test_a_folder_without_a_part_makes_no_single_file(student_of_it: Path, ordinary: Path, tmp_path: Path):
    shutil.rmtree(shutil.copytree(ordinary, tmp_path / "model") / "scheduler")
    flags = ["--to", "checkpoint", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "x.safetensors")]
    with pytest.raises(CheckpointError, match="not a complete.*scheduler"):
        export.main([str(student_of_it), *flags])
    assert not (tmp_path / "x.safetensors").exists()


def test_another_model_is_refused_and_nothing_written(run: Path, tmp_path: Path):
    unet = inject_lora(tiny_unet(config=replace(TINY_UNET, context_width=48)), rank=2)
    save_lora(unet, run / "lora.safetensors", dict(base="other"))
    model = write_tiny(tmp_path / "model")
    with pytest.raises(CheckpointError, match="another model.*made for other"):
        export.main([str(run), "--to", "checkpoint", "--model", str(model)])
    assert [path.name for path in run.iterdir()] == ["lora.safetensors"]


def test_an_existing_folder_is_left_alone(run: Path, tiny_model: Path):
    (run / "out").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        export.main([str(run), "--to", "checkpoint", "--model", str(tiny_model), "--out", str(run / "out")])
    assert not list((run / "out").iterdir())


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_checkpoint_leaves_nothing(failure: BaseException, run: Path, tiny_model: Path, monkeypatch):
    def save_half(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(tensor_files, "save_file", save_half)
    with pytest.raises(type(failure)):
        export.main([str(run), "--to", "checkpoint", "--model", str(tiny_model)])
    assert [path.name for path in run.iterdir()] == ["lora.safetensors"]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["{run}/unfinished", "--to", "peft"], "unfinished"),
        (["{run}/nothing.safetensors", "--to", "kohya"], "nothing.safetensors"),
        (["{run}", "{run}", "--to", "peft"], "one by one"),
        (["{run}", "{run}", "--to", "checkpoint"], "each learned guidance"),
        (["{run}", "--to", "checkpoint", "--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_named(flags: list[str], named: str, run: Path):
    (run / "unfinished").mkdir()
    with pytest.raises((CheckpointError, ValueError), match=named):
        export.main([flag.format(run=run) for flag in flags])
    assert {path.name for path in run.iterdir()} == {"lora.safetensors", "unfinished"}


# What a merge loses


def half(model: Path, dtype: torch.dtype) -> Path:
    save_file({name: tensor.to(dtype) for name, tensor in load_file(model / UNET).items()}, model / UNET)
    return model


def test_the_report_of_a_merge(run: Path, tmp_path: Path, capsys):
    model = half(write_tiny(tmp_path / "model"), torch.bfloat16)
    export.main([str(run), "--to", "checkpoint", "--model", str(model), "--out", str(tmp_path / "large")])
    assert re.search(r"(99|100)\.\d% of the change survives .* least in", capsys.readouterr().out)
    with pytest.warns(UserWarning, match="export --stochastic"):
        export.main([f"{run}:1e-4", "--to", "checkpoint", "--model", str(model), "--out", str(tmp_path / "small")])


def test_stochastic_rounding_is_seeded(run: Path, tmp_path: Path, capsys):
    model = half(write_tiny(tmp_path / "model"), torch.float16)
    flags = [f"{run}:1e-3", "--to", "checkpoint", "--model", str(model), "--out"]
    for name, seed in dict(
        plain=[], one=["--stochastic", "1"], same=["--stochastic", "1"], zero=["--stochastic"]
    ).items():
        export.main([*flags, str(tmp_path / name), *seed])
    plain, one, same, zero = ((tmp_path / name / UNET).read_bytes() for name in ("plain", "one", "same", "zero"))
    assert one == same and len({plain, one, zero}) == 3
    assert re.search(r"survives on average, with noise of \d+% of its norm", capsys.readouterr().out)
    with pytest.raises(ValueError, match="--to checkpoint"):
        export.main([str(run), "--to", "kohya", "--stochastic"])


def test_8_bits_are_refused(run: Path, tmp_path: Path):
    model = half(write_tiny(tmp_path / "model"), torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"weights of 8 bits \(.*16 or 32 bits"):
        export.main([str(run), "--to", "checkpoint", "--model", str(model), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    write_checkpoint(model, replaced_by(tiny_unet()), tmp_path / "out", {})  # a full copy is whole, in float16
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / UNET).values()} == {torch.float16}


def test_nothing_is_written_over_what_it_is_made_from(run: Path):
    before = (run / "lora.safetensors").read_bytes()
    with pytest.raises(ValueError, match="written over what it is made from"):
        export.main([str(run), "--to", "kohya", "--out", str(run / "../run/lora.safetensors")])
    assert (run / "lora.safetensors").read_bytes() == before
