"""Make the embedded model from scratch.

  python -m minidistill.pocket --out pocket-emoji

Draws the pictures, then trains a CLIP, a VAE and a UNet, as Stable Diffusion was made, makes the UNet's empty prompt
weak (denoiser.py says why), and writes the official folder layout. A stage that is whole in the folder is done; VAE and
UNet go on from where they were stopped; the CLIP, a matter of minutes, starts again.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from minidistill.config import POCKET_UNET, POCKET_VAE, ScheduleConfig
from minidistill.formats.files import written_whole
from minidistill.formats.model_configs import MODEL_INDEX, published_schedule, published_unet, published_vae, write_json
from minidistill.pocket.autoencoder import encode_all, normalise_latents, psnr, train_vae
from minidistill.pocket.clip import held_out_accuracy, save_clip, train_clip, tune_pictures
from minidistill.pocket.compositions import all_compositions, write_compositions
from minidistill.pocket.denoiser import ROUNDS, WEAK, WEAKENING, Captioned, train_unet, weaken
from minidistill.pocket.pictures import render
from minidistill.pocket.tokenizer import CONTEXT, write_tokenizer
from minidistill.training.settings import count, one_sentence, parse, setting
from minidistill.unet import UNet
from minidistill.vae import VAE


@dataclass
class Settings:
    out: Path = setting(Path("weights/pocket-emoji"), "folder of the model", "run")
    work: Path = setting(Path("runs/pocket"), "folder in which unfinished stages are kept", "run")
    font: str = setting(None, "path of NotoColorEmoji.ttf (found by itself on Debian)", "how", type=str)
    renders: int = setting(16, "pictures of each composition", "how", type=count)
    vae_steps: int = setting(9000, "updates of the VAE", "how", type=count)


def write_part(folder: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    """A network in the official layout, in half precision; the configuration comes last, and says that all is there."""
    halves = {name: x.half().contiguous() for name, x in tensors.items()}
    with written_whole(folder / "diffusion_pytorch_model.safetensors") as beside:
        save_file(halves, beside, {"format": "pt"})
    write_json(folder / "config.json", config)


def main() -> None:
    args = parse(Settings, __doc__)
    compositions = all_compositions()
    pictures, index = render(compositions, args.renders, seed=0, font=args.font)
    write_compositions(args.out / "compositions.json")
    write_json(args.out / "scheduler/scheduler_config.json", published_schedule(ScheduleConfig()))
    write_tokenizer([c.caption for c in compositions], args.out / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    held_out = torch.tensor([c.held_out for c in compositions])[index]
    trained, unseen = pictures[~held_out], pictures[held_out]

    if not (args.out / "text_encoder/model.safetensors").exists():
        clip = train_clip(compositions, pictures, index, tokenizer)
        tune_pictures(clip, compositions, pictures, index, tokenizer)
        save_clip(clip, args.out)
    clip = CLIPModel.from_pretrained(args.out / "clip", dtype=torch.float32)
    accuracy = held_out_accuracy(clip, compositions, pictures, index, tokenizer)
    print(f"CLIP: nearest of {len(compositions)} captions right for {accuracy:.1%} of the held-out pictures")

    if not (args.out / "vae/config.json").exists():
        torch.manual_seed(0)
        vae = train_vae(POCKET_VAE, trained, args.work / "vae.pt", args.vae_steps)
        normalise_latents(vae, encode_all(vae, trained[::8]))
        write_part(args.out / "vae", published_vae(POCKET_VAE, pictures.shape[-1]), vae.state_dict())
    vae = VAE(POCKET_VAE).to(memory_format=torch.channels_last)
    vae.load_state_dict(load_file(args.out / "vae/diffusion_pytorch_model.safetensors"))
    print(f"VAE: {psnr(vae, unseen[::4]):.2f} dB on held-out pictures")

    text_encoder = CLIPTextModel.from_pretrained(args.out / "text_encoder", dtype=torch.float32)
    with torch.no_grad():
        prompts = [c.caption for c in compositions] + [""]
        ids = tokenizer(prompts, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
        contexts = text_encoder(ids).last_hidden_state  # [M + 1, L, D]
    if not (args.out / "unet/config.json").exists():
        data = Captioned(encode_all(vae, trained), index[~held_out], contexts[:-1], contexts[-1])
        torch.manual_seed(0)
        weak = train_unet(UNet(POCKET_UNET), data, args.work / "unet-weak.pt", *WEAK, dropout=1.0)
        unet = UNet(POCKET_UNET)
        for number, (steps, lr) in enumerate(ROUNDS, start=1):
            unet = train_unet(unet, data, args.work / f"unet-{number}.pt", steps, lr)
        unet = weaken(unet, weak, data, args.work / "unet-weakened.pt", *WEAKENING)
        write_part(args.out / "unet", published_unet(POCKET_UNET), unet.state_dict())
    write_json(args.out / "model_index.json", MODEL_INDEX)


if __name__ == "__main__":
    with one_sentence("minidistill.pocket", "stopped. The same command goes on."):
        main()
