"""Make the emoji model from scratch.

  python -m minidistill.pocket --out runs/pocket/model

Trains a CLIP, a VAE and a UNet on composed images, as Stable Diffusion was made, and writes the official folder layout.
Stages that are complete in the folder are skipped. The same command continues a VAE or UNet where it was stopped, from
a .pt file in the folder; the CLIP, which takes minutes, starts again.

  python -m minidistill.pocket --more unet

trains the UNet further, from the weights in the folder. `--more vae` trains the VAE further; once there is a UNet, only
the VAE's decoder, because the UNet has learned the latents of the encoder.

On a GPU, add --compile, --bf16 and larger batches. On a CPU with AMX, --bf16 alone is a third faster.
"""

from argparse import Namespace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from minidistill.config import POCKET_UNET, POCKET_VAE, ScheduleConfig
from minidistill.evaluate import ClipScore
from minidistill.formats.files import write_json
from minidistill.formats.load_model import require_device
from minidistill.formats.model_configs import MODEL_INDEX, published_schedule, published_unet, published_vae
from minidistill.formats.tensor_files import write_tensors
from minidistill.pipeline import pil_images
from minidistill.pocket.autoencoder import encode_all, normalise_latents, psnr, train_vae
from minidistill.pocket.clip import save_clip, train_clip
from minidistill.pocket.compositions import Composition, all_compositions, write_compositions
from minidistill.pocket.denoiser import FURTHER_LEARNING_RATE, LEARNING_RATE, Captioned, train_unet
from minidistill.pocket.images import PACKAGE, Renderer, as_tensors, render
from minidistill.pocket.tokenizer import write_tokenizer
from minidistill.schedule import Schedule
from minidistill.training import command_line as cli
from minidistill.unet import UNet
from minidistill.vae import VAE

HELD_OUT_SEED, LATENTS_SEED = 1, 0


def write_part(folder: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    """Write a network in the official layout, in half precision. config.json comes last: it marks a complete stage."""
    halves = {name: x.half() for name, x in tensors.items()}
    write_tensors(folder / "diffusion_pytorch_model.safetensors", halves, {})
    write_json(folder / "config.json", config)


def is_complete(folder: Path) -> bool:
    return (folder / "config.json").exists()


def read_part(folder: Path, network: nn.Module) -> None:
    network.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))


def drop_states(folder: Path, part: str) -> None:
    """Delete what stopped runs would continue from, whatever their settings: they began from other weights."""
    for state in folder.glob(f"{part}*, * updates of *.pt"):
        state.unlink()


def read_flags(argv: list[str] | None) -> Namespace:
    parser = cli.new_parser(__doc__, prog="python -m minidistill.pocket")
    flag = parser.add_argument
    flag("--out", type=cli.out_folder, default=cli.DEFAULT_MODEL, metavar="FOLDER",
         help="the model (default: %(default)s)")  # fmt: skip
    flag("--more", choices=["vae", "unet"], help="train a part further, from its weights in --out")
    number = dict(type=cli.positive_int, metavar="N")
    flag("--emoji", type=Path, default=PACKAGE, metavar="FOLDER", help="the npm package (default: %(default)s)")
    flag("--device", default=cli.DEFAULT_DEVICE, help="where to train (default: %(default)s)")
    flag("--compile", action="store_true", help="train the VAE and the UNet compiled by torch.compile: faster")
    flag("--bf16", action="store_true", help="train in bfloat16: faster on a GPU, and on CPUs with AMX")
    flag("--clip-steps", **number, default=1500, help="updates of the CLIP (default: %(default)s)")
    flag("--clip-batch", **number, default=128, help="images per update of the CLIP (default: %(default)s)")
    flag("--vae-steps", **number, default=30000, help="updates of the VAE (default: %(default)s)")
    flag("--vae-batch", **number, default=4, help="images per update of the VAE (default: %(default)s)")
    flag("--unet-steps", **number, default=30000, help="updates of the UNet (default: %(default)s)")
    flag("--unet-batch", **number, default=32, help="latents per update of the UNet (default: %(default)s)")
    flag("--unet-lr", type=cli.positive, metavar="RATE",
         help=f"learning rate of the UNet (default: {LEARNING_RATE}, with --more {FURTHER_LEARNING_RATE})")  # fmt: skip
    flag("--renders", **number, default=8,
         help="images per composition whose latents the UNet learns from (default: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.compile and args.bf16 and args.device == "cpu":
        raise ValueError("PyTorch compiles wrong gradients of bfloat16 on a CPU: give one of --compile and --bf16.")
    require_device(args.device)
    return args


def main(argv: list[str] | None = None) -> None:
    args = read_flags(argv)
    if args.more and not is_complete(args.out / args.more):
        raise ValueError(f"{args.out} has no {args.more} to train further: leave out --more.")
    cli.prepare(torch.device(args.device), args.compile)
    renderer = Renderer(args.emoji, device=args.device)
    compositions = all_compositions()
    trained = [c for c in compositions if not c.held_out]
    held_out = [c for c in compositions if c.held_out]
    unseen = render(renderer, held_out, 4, HELD_OUT_SEED)
    write_compositions(args.out / "compositions.json", compositions)
    write_json(args.out / "scheduler/scheduler_config.json", published_schedule(ScheduleConfig()))
    write_tokenizer([c.caption for c in compositions], args.out / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(args.out / "tokenizer")

    if not (args.out / "text_encoder/model.safetensors").exists():
        clip = train_clip(trained, renderer, tokenizer, args.clip_steps, args.clip_batch, args.bf16)
        save_clip(clip, args.out)
    score, captions = ClipScore(args.out / "clip", tokenizer), [c.caption for c in held_out + trained]
    nearest = (score.embed_images(pil_images(unseen)) @ score.embed_prompts(captions).T).argmax(1)
    right = (nearest == torch.arange(len(unseen)) // 4).float().mean()  # the caption of unseen[i] is captions[i // 4]
    print(f"CLIP: the nearest of {len(captions)} captions is the right one for {right:.1%} of the held-out images")

    torch.manual_seed(0)
    vae = make_vae(args, renderer, trained)
    print(f"VAE: {psnr(vae, unseen):.2f} dB on held-out images")
    if args.more == "unet" or not is_complete(args.out / "unet"):
        make_unet(args, renderer, trained, tokenizer, vae)
    write_json(args.out / "model_index.json", MODEL_INDEX)


def make_vae(args: Namespace, renderer: Renderer, trained: list[Composition]) -> VAE:
    """The VAE in --out; trained first if it is not complete, or further with ``--more vae``."""
    folder, has_unet = args.out / "vae", is_complete(args.out / "unet")
    things, rgb = as_tensors(trained, args.device)

    def new_images() -> Tensor:
        some = torch.randint(len(trained), (args.vae_batch,), device=args.device)
        return renderer.draw(things[some], rgb[some])

    vae = VAE(POCKET_VAE).to(args.device, memory_format=torch.channels_last)
    if is_complete(folder):
        read_part(folder, vae)
    if args.more == "vae" or not is_complete(folder):
        part = "vae further" if args.more == "vae" else "vae"
        state = args.out / f"{part}, {args.vae_steps} updates of {args.vae_batch}.pt"
        how = dict(compiled=args.compile, bfloat16=args.bf16)
        vae = train_vae(vae, new_images, state, args.vae_steps, decoder_only=has_unet, **how)
        if not has_unet:
            drop_states(args.out, "unet")  # of a UNet that learned other latents
            normalise_latents(vae, encode_all(vae, render(renderer, trained, 1, LATENTS_SEED)))
        write_part(folder, published_vae(POCKET_VAE, renderer.side), vae.state_dict())
        drop_states(args.out, "vae")
        read_part(folder, vae)  # rounded to fp16
    return vae


def make_unet(
    args: Namespace, renderer: Renderer, trained: list[Composition], tokenizer: CLIPTokenizer, vae: VAE
) -> None:
    """Train the UNet, or the one in --out further, and write it."""
    folder, unet = args.out / "unet", UNet(POCKET_UNET).to(args.device)
    part, lr = "unet", args.unet_lr or LEARNING_RATE
    if args.more == "unet":
        part, lr = "unet further", args.unet_lr or FURTHER_LEARNING_RATE
        read_part(folder, unet)
    text_encoder = CLIPTextModel.from_pretrained(args.out / "text_encoder", dtype=torch.float32).to(args.device)
    prompts = [c.caption for c in trained] + [""]
    ids = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        contexts = text_encoder(ids.to(args.device)).last_hidden_state  # [C + 1, L, D]
    latents = encode_all(vae, render(renderer, trained, args.renders, LATENTS_SEED), batch=256)
    captions = torch.arange(len(trained), device=args.device).repeat_interleave(args.renders)
    schedule = Schedule.from_config(ScheduleConfig()).to(args.device)
    data = Captioned(latents, captions, contexts[:-1], contexts[-1], schedule)
    state = args.out / f"{part}, {args.unet_steps} updates of {args.unet_batch} at {lr:g}.pt"
    how = dict(compiled=args.compile, bfloat16=args.bf16)
    unet = train_unet(unet, data, state, args.unet_steps, args.unet_batch, lr, **how)
    write_part(folder, published_unet(POCKET_UNET), unet.state_dict())
    drop_states(args.out, "unet")


if __name__ == "__main__":
    with cli.one_line_errors("minidistill.pocket", "stopped. The same command continues."):
        main()
