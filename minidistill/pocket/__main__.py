"""Make the embedded model from scratch.

  python -m minidistill.pocket --out pocket-emoji

Renders the images; trains a CLIP, a VAE and a UNet, as Stable Diffusion was made; weakens the UNet's empty prompt
(denoiser.py says why); and writes the official folder layout. Stages that are complete in the folder are skipped. The
VAE and the UNet resume where they were stopped; the CLIP, which takes minutes, starts again.
"""

import sys
from argparse import Namespace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from minidistill.config import POCKET_UNET, POCKET_VAE, ScheduleConfig
from minidistill.formats.files import atomic_write, write_json
from minidistill.formats.model_configs import MODEL_INDEX, published_schedule, published_unet, published_vae
from minidistill.pocket.autoencoder import encode_all, normalise_latents, psnr, train_vae
from minidistill.pocket.clip import held_out_accuracy, save_clip, train_clip, tune_image_encoder
from minidistill.pocket.compositions import all_compositions, write_compositions
from minidistill.pocket.denoiser import ROUNDS, WEAK, WEAKENING, Captioned, train_unet, weaken
from minidistill.pocket.images import render
from minidistill.pocket.tokenizer import CONTEXT, write_tokenizer
from minidistill.training.command_line import DEFAULT_MODEL, new_parser, one_line_errors, positive_int
from minidistill.unet import UNet
from minidistill.vae import VAE

WORK = Path("runs/pocket")


def write_part(folder: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    """Write a network in the official layout, in half precision. config.json comes last: it marks a complete stage."""
    halves = {name: x.half().contiguous() for name, x in tensors.items()}
    with atomic_write(folder / "diffusion_pytorch_model.safetensors") as file:
        save_file(halves, file, {"format": "pt"})
    write_json(folder / "config.json", config)


def read_flags(argv: list[str]) -> Namespace:
    parser = new_parser(__doc__, prog="python -m minidistill.pocket")
    flag = parser.add_argument
    flag("--out", type=Path, default=DEFAULT_MODEL, metavar="FOLDER", help="the model (default: %(default)s)")
    flag("--work", type=Path, default=WORK, metavar="FOLDER", help="for unfinished stages (default: %(default)s)")
    flag("--font", metavar="PATH", help="NotoColorEmoji.ttf (default: where Debian has it)")
    flag("--renders", type=positive_int, default=16, metavar="N", help="images per composition (default: %(default)s)")
    flag("--vae-steps", type=positive_int, default=9000, metavar="N", help="updates of the VAE (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = read_flags(sys.argv[1:] if argv is None else argv)
    compositions = all_compositions()
    images, index = render(compositions, args.renders, seed=0, font=args.font)
    write_compositions(args.out / "compositions.json")
    write_json(args.out / "scheduler/scheduler_config.json", published_schedule(ScheduleConfig()))
    write_tokenizer([c.caption for c in compositions], args.out / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    held_out = torch.tensor([c.held_out for c in compositions])[index]
    trained, unseen = images[~held_out], images[held_out]

    if not (args.out / "text_encoder/model.safetensors").exists():
        clip = train_clip(compositions, images, index, tokenizer)
        tune_image_encoder(clip, compositions, images, index, tokenizer)
        save_clip(clip, args.out)
    clip = CLIPModel.from_pretrained(args.out / "clip", dtype=torch.float32)
    accuracy = held_out_accuracy(clip, compositions, images, index, tokenizer)
    print(f"CLIP: nearest of {len(compositions)} captions right for {accuracy:.1%} of the held-out images")

    if not (args.out / "vae/config.json").exists():
        torch.manual_seed(0)
        vae = train_vae(POCKET_VAE, trained, args.work / "vae.pt", args.vae_steps)
        normalise_latents(vae, encode_all(vae, trained[::8]))
        write_part(args.out / "vae", published_vae(POCKET_VAE, images.shape[-1]), vae.state_dict())
    vae = VAE(POCKET_VAE).to(memory_format=torch.channels_last)
    vae.load_state_dict(load_file(args.out / "vae/diffusion_pytorch_model.safetensors"))
    print(f"VAE: {psnr(vae, unseen[::4]):.2f} dB on held-out images")

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
    with one_line_errors("minidistill.pocket", "stopped. The same command continues."):
        main()
