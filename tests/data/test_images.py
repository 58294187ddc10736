"""data/images.py: your own images are encoded once, by the VAE, and those left out are named with the reason."""

import json
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tiny import error, write_tiny
from torch import Tensor

from minidistill import StableDiffusion
from minidistill.data.images import ImageLatents, encode, read_folder, read_image
from minidistill.formats.lora_formats import read_lora
from minidistill.training.sources import FromImages

SIDE = 16  # of the tiny model's images


def pixels(seed: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """A smooth image that depends on the seed: [H, W, 3]."""
    coarse = torch.rand(1, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    return (255 * smooth).byte().permute(1, 2, 0).numpy()


def write(file: Path, seed: int, caption: str | None = None, **size: int) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, **size)).save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images with captions, in both layouts."""
    for i in range(6):
        write(tmp_path / f"images/{i}.png", i, f"image {i}\n")
    for i in range(6, 12):
        write(tmp_path / f"images/more/{i}.JPG", i)
    lines = [json.dumps({"file_name": f"{i}.JPG", "text": f"image {i}", "other": 1}) for i in range(6, 12)]
    (tmp_path / "images/more/metadata.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "images"


def encoded(sd: StableDiffusion, folder: Path, cache: Path) -> tuple[ImageLatents, dict[Path, str]]:
    images, _ = read_folder(folder)
    return encode(sd, images, [image.caption for image in images], cache)


@pytest.fixture
def calls(sd: StableDiffusion) -> list[int]:
    """The batch size of every call of the VAE's encoder."""
    sizes: list[int] = []
    sd.vae.encoder.register_forward_hook(lambda module, args, result: sizes.append(len(result)))
    return sizes


# Finding images and captions


def test_captions_in_text_files_and_in_metadata(folder: Path):
    (folder / "more/7.txt").write_text("from its\nown file")
    images, left_out = read_folder(folder)
    assert [image.file.stem for image in images] == ["0", "1", "2", "3", "4", "5", "10", "11", "6", "7", "8", "9"]
    assert not left_out
    captions = {image.file.stem: image.caption for image in images}
    assert captions == {stem: f"image {stem}" for stem in captions} | {"7": "from its own file"}


def test_metadata_of_several_folders(folder: Path):
    """All of it is read, and a path may lead into another folder."""
    write(folder / "near.png", 40)
    write(folder / "far.png", 41)
    (folder / "metadata.jsonl").write_text('{"file_name": "near.png", "text": "near"}\n')
    with (folder / "more/metadata.jsonl").open("a") as file:
        file.write('{"file_name": "../far.png", "text": "far"}\n')
    captions = {image.file.name: image.caption for image in read_folder(folder)[0]}
    assert captions.items() >= {"near.png": "near", "far.png": "far", "6.JPG": "image 6"}.items()


def test_images_without_a_caption_are_named(folder: Path):
    write(folder / "silent.png", 20)
    write(folder / "blank.png", 21, " \n")
    write(folder / "binary.png", 22).with_suffix(".txt").write_bytes(b"\xff\xfe\x00")
    write(folder / "wide.png", 23).with_suffix(".txt").write_bytes("a wide letter".encode("utf-16-le"))
    with (folder / "more/metadata.jsonl").open("a") as file:
        file.write('{"file_name": "gone.jpg", "text": "a ghost"}\n')
    images, left_out = read_folder(folder)
    assert len(images) == 12
    reasons = {file.name: reason for file, reason in left_out.items()}
    assert set(reasons) == {"silent.png", "blank.png", "binary.png", "wide.png", "gone.jpg"}
    assert "no caption" in reasons["silent.png"] and "no caption" in reasons["blank.png"]
    assert "not UTF-8 text" in reasons["wide.png"]  # its bytes are valid, with a NUL beside each letter
    assert "utf-8" in reasons["binary.png"] and "metadata.jsonl" in reasons["gone.jpg"]


HALF = '{"file_name": "0.png", "text": "\\ud800"}'  # half a character


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"file_name": "0.png"}', '{"file_name": "0.png", "text": 3}', '"\xff"', HALF]
)
def test_a_bad_line_of_metadata_is_named(line: str, folder: Path):
    good = '{"file_name": "0.png", "text": "fine"}'
    (folder / "metadata.jsonl").write_text(f"{good}\n\n{line}\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 3 should look like"):
        read_folder(folder)


def test_a_second_caption_of_an_image_is_named(folder: Path):
    """Datasets with several captions for each image are common; only one of them would be learned."""
    file = folder / "more/metadata.jsonl"
    file.write_text(file.read_text() + '{"file_name": "8.JPG", "text": "image  8"}\n')  # the same once more
    assert len(read_folder(folder)[0]) == 12
    file.write_text(file.read_text() + '{"file_name": "./7.JPG", "text": "another"}\n')
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 8: .*7.JPG has another caption above"):
        read_folder(folder)


def test_nothing_to_learn_from(tmp_path: Path, sd: StableDiffusion):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no image \(.bmp, .* with a caption\.$"):
        read_folder(tmp_path)
    write(tmp_path / "a.png", 0)
    with pytest.raises(ValueError, match="1 left out; the first is .*a.png: no caption"):
        read_folder(tmp_path)
    write(tmp_path / "a.png", 0, "tiny", height=4)
    with pytest.raises(ValueError, match="No image is left .* 1 left out; the first is .*a.png: 16x4 pixels"):
        encoded(sd, tmp_path, tmp_path / "cache")


# From an image to its latent


def resized(file: Path) -> Tensor:
    """Levels, by PyTorch's resampling instead of Pillow's, in the other order: the short side first, then the crop."""
    x = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None].float()
    size = [SIDE * length // min(x.shape[2:]) for length in x.shape[2:]]
    x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 255)
    top, left = ((length - SIDE) // 2 for length in size)
    return x[:, :, top : top + SIDE, left : left + SIDE]


@pytest.mark.parametrize("height, width", [(32, 48), (96, 64), (16, 16), (8, 12)])
def test_a_latent_is_the_vaes_of_the_resized_image(height: int, width: int, sd: StableDiffusion, tmp_path: Path):
    file = write(tmp_path / "images/a.png", 3, "one", height=height, width=width)
    expected = resized(file)
    x = read_image(file, SIDE, SIDE)
    assert ((x + 1) * 127.5 - expected).abs().max() < 1.5  # Pillow rounds to levels, once per direction
    latents, _ = encoded(sd, tmp_path / "images", tmp_path / "cache")
    with torch.no_grad():
        z_0 = sd.vae.encode(expected / 127.5 - 1)
    assert error(latents.ends(torch.tensor([0])), z_0) < 1e-2
    assert error(latents.ends(torch.tensor([0])), z_0.flip(-1)) > 0.1  # the image is not symmetric


def test_images_are_rotated_upright(tmp_path: Path):
    """Orientation 6: the camera lay on its side, so the image must be rotated clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(0)).save(tmp_path / "a.png", exif=exif)
    expected = torch.from_numpy(np.rot90(pixels(0), -1).copy()).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(read_image(tmp_path / "a.png", SIDE, SIDE), expected)


def test_transparent_pixels_become_white(tmp_path: Path):
    black = np.zeros((SIDE, SIDE, 4), np.uint8)
    black[8:, :, 3] = 255
    Image.fromarray(black).save(tmp_path / "a.png")
    palette = Image.fromarray(black[:, :, 3] // 255, "P")
    palette.putpalette([255, 0, 0, 0, 0, 0])  # red, where it shows
    palette.save(tmp_path / "b.png", transparency=0)
    for name in ("a.png", "b.png"):
        x = read_image(tmp_path / name, SIDE, SIDE)
        assert x.shape == (3, SIDE, SIDE) and (x[:, :8] == 1).all() and (x[:, 8:] == -1).all()


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK"])
def test_other_pixel_formats(mode: str, tmp_path: Path):
    image = Image.fromarray(pixels(1)).convert(mode)
    image.save(tmp_path / "a.tiff")
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(read_image(tmp_path / "a.tiff", SIDE, SIDE), expected)


def test_unusable_images_are_left_out_and_named(folder: Path, sd: StableDiffusion, tmp_path: Path):
    good = (folder / "0.png").read_bytes()
    write(folder / "tiny.png", 0, "too small", height=7, width=40)
    write(folder / "narrow.png", 0, "too small", height=40, width=7)
    write(folder / "just.png", 0, "large enough", height=8, width=40)
    write(folder / "cut.png", 0, "half of a file").write_bytes(good[: len(good) // 2])
    write(folder / "empty.jpg", 0, "nothing").write_bytes(b"")
    write(folder / "empty too.jpg", 0, "nothing").write_bytes(b"")  # both are named, though they are equal
    write(folder / "vector.jpg", 0, "PostScript").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n")
    Image.fromarray(pixels(0)).save(write(folder / "other.png", 0, "of a format that is not read"), "PPM")
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint16)).save(write(folder / "deep.png", 0, "16 bits"))
    latents, left_out = encoded(sd, folder, tmp_path / "cache")
    reasons = {file.name: reason for file, reason in left_out.items()}
    bad = {"tiny.png", "narrow.png", "cut.png", "empty.jpg", "empty too.jpg", "vector.jpg", "other.png", "deep.png"}
    assert set(reasons) == bad
    assert "40x7 pixels" in reasons["tiny.png"] and "16" in reasons["tiny.png"]
    assert len(latents) == 13 and len(list((tmp_path / "cache").iterdir())) == 13


def test_latents_that_overflow_are_left_out_and_named(folder: Path, sd: StableDiffusion, tmp_path: Path):
    torch.nn.init.constant_(sd.vae.quant_conv.weight, 1e6)  # finite in float32
    with pytest.raises(ValueError, match="12 left out; the first is .*: its latent overflows half precision"):
        encoded(sd, folder, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_images_with_held_out_captions_are_not_learned(folder: Path, sd: StableDiffusion, tmp_path: Path):
    images, _ = read_folder(folder)
    captions = [image.caption for image in images[3:]]
    latents, _ = encode(sd, images, captions, tmp_path / "cache")
    assert len(latents) == 9 and latents.prompts(torch.tensor([8, 0])).tolist() == [8, 0]


# Encoding once


def test_a_second_run_encodes_nothing(folder: Path, sd: StableDiffusion, calls: list[int], tmp_path: Path):
    first, _ = encoded(sd, folder, tmp_path / "cache")
    assert calls == [1] * 12
    again, _ = encoded(sd, folder, tmp_path / "cache")
    assert len(calls) == 12 and torch.equal(again.ends(torch.arange(12)), first.ends(torch.arange(12)))


def test_only_what_changed_is_encoded_again(folder: Path, sd: StableDiffusion, calls: list[int], tmp_path: Path):
    before, _ = encoded(sd, folder, tmp_path / "cache")
    calls.clear()
    write(folder / "3.png", 30)
    write(folder / "00.png", 31, "a new one, which comes second")
    (folder / "5.txt").write_text("only the caption is new")
    after, _ = encoded(sd, folder, tmp_path / "cache")
    assert calls == [1, 1]
    same = [0, 2, 3, 5]
    assert torch.equal(after.ends(torch.tensor(same)), before.ends(torch.tensor([0, 1, 2, 4])))
    assert not torch.equal(after.ends(torch.tensor([4])), before.ends(torch.tensor([3])))
    with torch.no_grad():
        sd.vae.quant_conv.weight[0, 0, 0, 0] += 1e-3
    encoded(sd, folder, tmp_path / "cache")
    assert len(calls) == 2 + 13
    for height, width, times in ((SIDE // 2, SIDE, 2), (SIDE // 2, 2 * SIDE, 3)):
        sd.height, sd.width = height, width
        encoded(sd, folder, tmp_path / "cache")
        assert len(calls) == 2 + 13 * times
    sd.vae.config = replace(sd.vae.config, scaling_factor=1.0)
    encoded(sd, folder, tmp_path / "cache")
    assert len(calls) == 2 + 13 * 4


def test_one_process_encodes_for_all(folder: Path, sd: StableDiffusion, calls: list[int], tmp_path: Path):
    """The others wait, and read what it has written."""
    images, _ = read_folder(folder)
    captions = [image.caption for image in images]

    def first_process() -> None:
        assert not calls
        encode(sd, images, captions, tmp_path)

    latents, left_out = encode(sd, images, captions, tmp_path, rank=1, wait=first_process)
    assert len(latents) == len(calls) == 12 and not left_out


def test_damaged_latents_are_encoded_again(folder: Path, sd: StableDiffusion, calls: list[int], tmp_path: Path):
    encoded(sd, folder, tmp_path / "cache")
    before = {file: file.read_bytes() for file in (tmp_path / "cache").iterdir()}
    first, second, third, fourth, *_ = before
    first.write_bytes(before[first][:-20])
    second.write_bytes(b"")
    third.unlink()
    fourth.write_bytes(before[fourth][:-1] + bytes([before[fourth][-1] ^ 1]))  # one bit
    calls.clear()
    encoded(sd, folder, tmp_path / "cache")
    assert len(calls) == 4 and {file: file.read_bytes() for file in (tmp_path / "cache").iterdir()} == before


# train.py


def flags(model: Path, folder: Path, out: Path, *more: object) -> list[object]:
    short = dict(steps=4, sample_steps=2, batch=4, rank=2, save_every=2, lr=0.01, device="cpu")
    settings = dict(model=model, images=folder, out=out) | short
    return [x for name, value in settings.items() for x in (f"--{name.replace('_', '-')}", value)] + list(more)


def test_train_learns_from_images(command, tiny_model: Path, folder: Path, tmp_path: Path):
    write(folder / "tiny.png", 0, "too small", height=4)
    write(folder / "silent.png", 0)
    out = tmp_path / "run"
    result = command("train.py", *flags(tiny_model, folder, out))
    assert result.code == 0, result.err
    assert f"Left out: {folder / 'tiny.png'}: 16x4 pixels" in result.out
    assert f"Left out: {folder / 'silent.png'}: no caption" in result.out
    file = read_lora(out / "lora.safetensors")
    assert file.metadata["method"] == "noised" and all(pair.up.abs().max() > 0 for pair in file.layers.values())
    assert "on 1 held-out prompt\n" in (out / "report.md").read_text()
    assert len(list((out / "states").glob("image-*"))) == 12 and not list((out / "states").glob("trajectories-*"))

    for seed, caption in ((50, "image 5"), (5, "another caption")):  # either makes it another run
        write(folder / "5.png", seed, caption)
        assert f"--images {folder} (" in command("train.py", *flags(tiny_model, folder, out, "--resume")).complaint


def test_resuming_with_another_teacher_is_refused(command, tiny_model: Path, folder: Path, tmp_path: Path):
    """Other weights under the same name: here no trajectories exist that would show it."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    run = flags(model, folder, tmp_path / "run", "--no-report")
    assert command("train.py", *run).code == 0
    name = "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(write_tiny(tmp_path / "other", seed=1) / name, model / name)
    assert f"--model {model} (" in command("train.py", *run, "--resume").complaint


def test_other_images_give_another_student(command, tiny_model: Path, folder: Path, tmp_path: Path):
    command("train.py", *flags(tiny_model, folder, tmp_path / "one", "--no-report"))
    for file in sorted(folder.rglob("*.png")):
        write(file, 100 + int(file.stem))
    command("train.py", *flags(tiny_model, folder, tmp_path / "other", "--no-report"))
    one, other = (load_file(tmp_path / name / "lora.safetensors") for name in ("one", "other"))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_of_ten_captions_the_rarest_is_held_out(tmp_path: Path):
    """Not the most frequent, which most of the images may have."""
    for i in range(12):
        write(tmp_path / f"{i:02}.png", i, "a dog" if i < 3 else f"a dog {i}")
    source = FromImages(Namespace(images=tmp_path))
    assert len(source.captions) == 9 and source.captions[0] == "a dog" and source.held_out == ["a dog 11"]
    for i in range(5, 12):
        (tmp_path / f"{i:02}.png").unlink()
    source = FromImages(Namespace(images=tmp_path))
    assert source.captions == ["a dog", "a dog 3"] and source.held_out == ["a dog 4"]
    for i in range(3, 5):
        (tmp_path / f"{i:02}.png").unlink()
    source = FromImages(Namespace(images=tmp_path))
    assert source.captions == source.held_out == ["a dog"]


def test_a_folder_without_captions_leaves_nothing(command, tiny_model: Path, tmp_path: Path):
    write(tmp_path / "images/a.png", 0)
    complaint = command("train.py", *flags(tiny_model, tmp_path / "images", tmp_path / "run")).complaint
    assert "has no image" in complaint and not (tmp_path / "run").exists()


# What people have on disk


def test_jpegs_of_other_names_and_images_that_are_not_read(folder: Path):
    for name in ("a.jfif", "b.JPE", "c.avif", "d.HEIC", "e.odd", "f.odd", "g.odd"):
        Image.fromarray(pixels(0)).save(folder / name, "JPEG")
    for name in ("a", "b", "c", "e"):
        (folder / f"{name}.txt").write_text(f"image {name}")
    (folder / "metadata.jsonl").write_text('{"file_name": "g.odd", "text": "image g"}\n')
    (folder / "0.npz").write_bytes(b"cached by another program")
    images, left_out = read_folder(folder)
    assert [image.file.name for image in images if image.caption[-1] in "ab"] == ["a.jfif", "b.JPE"]
    assert {file.name for file in left_out} == {"c.avif", "d.HEIC", "e.odd", "g.odd"}
    assert all("convert it" in reason for reason in left_out.values())
    assert read_image(folder / "a.jfif", SIDE, SIDE).shape == (3, SIDE, SIDE)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_paths_and_line_ends_in_metadata(end: str, tmp_path: Path):
    names = {"more\\dog.png": "more/dog.png", "./cat.png": "cat.png", "cafe\u0301.png": "caf\u00e9.png"}
    for name in names.values():
        write(tmp_path / name, 0)
    lines = [json.dumps({"file_name": name, "text": f"by {name}"}) for name in names]
    (tmp_path / "metadata.jsonl").write_bytes(end.join(lines).encode())
    images, left_out = read_folder(tmp_path)
    found = {str(image.file.relative_to(tmp_path)): image.caption for image in images}
    assert found == {file: f"by {name}" for name, file in names.items()} and not left_out


def test_an_accent_in_the_name_of_a_text_file(tmp_path: Path):
    write(tmp_path / "caf\u00e9.png", 0)
    (tmp_path / "cafe\u0301.txt").write_text("a coffee")
    assert [image.caption for image in read_folder(tmp_path)[0]] == ["a coffee"]


def test_linked_files_and_folders(folder: Path, tmp_path: Path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/all").symlink_to(folder)
    (tmp_path / "linked/one.png").symlink_to(folder / "1.png")
    (tmp_path / "linked/one.txt").write_text("one")
    (tmp_path / "linked/gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "linked/gone.txt").write_text("gone")
    (folder / "circle").symlink_to(tmp_path / "linked")
    images, left_out = read_folder(tmp_path / "linked")
    assert len(images) == 13 and [file.name for file in left_out] == ["gone.png"]
