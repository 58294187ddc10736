"""Stable Diffusion as one object: prompts in, pictures out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from minidistill import text
from minidistill.config import UNetConfig
from minidistill.formats.checkpoint import read_checkpoint
from minidistill.formats.hub import fetch_tokenizer
from minidistill.guidance import guided_noise, steps_without
from minidistill.schedule import Denoiser, Schedule, ddim_sample
from minidistill.vae import VAE

FRESH_NOISE = 1 << 32  # added to a picture's seed where eta asks for more noise: the seed itself gave z_T


@contextmanager
def at_work(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Have the network on ``device`` while it is used, and back where it was afterwards."""
    rest = next(network.parameters()).device
    network.to(device)
    try:
        yield
    finally:
        network.to(rest)


@dataclass
class StableDiffusion:
    """The parts of a model, and what is done with them together.

    Attributes:
        unet: ``(z_t, t, context) -> eps`` or v, as ``schedule.prediction`` says. It may carry LoRA (see lora.py).
        vae, text_encoder: pictures to latents and back; tokens to embeddings. They may rest on the host, as after
            ``sd.vae.to("cpu")``, and come to ``device`` when used.
        schedule: how much noise there is at each time step.
        folder: where the model was loaded from.
    """

    unet: nn.Module
    vae: VAE
    text_encoder: CLIPTextModel
    schedule: Schedule
    unet_config: UNetConfig
    folder: Path  # or the single file
    tokenizer_folder: Path | None = None  # None: CLIP's own, from the hub
    pad_token: str | None = None  # None: as the tokenizer's files say

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """Read when a prompt is first encoded. Raises CheckpointError when there is none."""
        context = self.text_encoder.config.max_position_embeddings
        return text.read_tokenizer(self.tokenizer_folder or fetch_tokenizer(), context, self.pad_token)

    @property
    def device(self) -> torch.device:
        """Where the UNet is, and all that is computed."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the networks' weights."""
        return self.vae.post_quant_conv.weight.dtype

    def encode_prompt(self, prompts: list[str]) -> Tensor:
        """N prompts -> embeddings [N, L, D]; warns of prompts longer than the context of L tokens.

        Raises CheckpointError when there is no tokenizer.
        """
        return self.encode_tokens(text.tokenize(self.tokenizer, prompts))

    def encode_tokens(self, ids: Tensor) -> Tensor:
        """Token ids [N, L] -> embeddings [N, L, D]."""
        with at_work(self.text_encoder, self.device):
            return text.encode_tokens(self.text_encoder, ids)

    def starting_noise(self, seeds: Sequence[int], height: int | None = None, width: int | None = None) -> Tensor:
        """z_T [N, 4, h, w] of N ``seeds``, each drawn on the CPU by itself: the same on every device, in every batch.

        In float32 at least, whatever the networks' dtype: rounding would add up over the steps. ``height`` and
        ``width`` are the picture's, in pixels; the size the model was trained on unless given.
        Raises ValueError for a size that is no whole number of latents.
        """
        factor = self.vae.config.factor
        side = self.unet_config.sample_size * factor
        height, width = side if height is None else height, side if width is None else width
        if height % factor or width % factor or min(height, width) < factor:
            raise ValueError(f"Pictures of this model have sides that are multiples of {factor}, not {width}x{height}.")
        shape = (self.unet_config.in_channels, height // factor, width // factor)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(noise).to(self.device, torch.promote_types(self.dtype, torch.float32))

    def denoiser(
        self,
        cond: Tensor,
        uncond: Tensor | None = None,
        guidance: float = 1.0,
        lora_enabled: bool = False,
        guided_until: int = 0,
    ) -> Denoiser:
        """``(z_t, t) -> eps`` (or v) for prompts embedded as ``cond`` [B, L, D]: what the samplers in schedule.py call.

        The teacher, two calls of the UNet, if there is an ``uncond`` and ``guidance`` is not 1; else one call, which
        with ``lora_enabled`` is the student. At time steps below ``guided_until`` the teacher does without guidance.
        """
        if lora_enabled:  # a plain UNet takes no such flag
            return lambda z_t, t: self.unet(z_t, t, cond, lora_enabled=True)
        if uncond is None or guidance == 1:
            return lambda z_t, t: self.unet(z_t, t, cond)

        def teacher(z_t: Tensor, t: Tensor) -> Tensor:
            if guided_until and t[0] < guided_until:
                return self.unet(z_t, t, cond)
            return guided_noise(self.unet, z_t, t, cond, uncond, guidance)

        return teacher

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        steps: int = 50,
        guidance: float = 7.5,
        seed: int = 0,
        lora_enabled: bool = False,
        negative_prompt: str = "",
        selective: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        batch: int = 8,
        eta: float = 0.0,
        progress: bool = False,
    ) -> list[Image.Image]:
        """Draw a picture for each prompt; the i-th starts from the noise of ``seed + i``.

        Args:
            prompts: a list of them; a single string is one prompt.
            steps: DDIM steps; each costs one call of the UNet, two with guidance.
            guidance: the scale s; 1 is none. Without effect on the student, which has learned its own.
            lora_enabled: draw with the student, in one call a step.
            negative_prompt: what guidance leads away from.
            selective: this share of the steps, the last ones, goes without guidance, in one call each ("Selective
                Guidance", arXiv 2305.09847): there it changes little.
            height, width: in pixels; the size the model was trained on unless given.
            batch: pictures drawn at once.
            eta: from 0, deterministic DDIM, to 1, which adds as much fresh noise in each step as DDPM.
            progress: show a bar.

        Returns:
            PIL images, one for each prompt.

        Raises:
            ValueError: a number of steps that DDIM cannot take, a size that is no whole number of latents, a
                ``selective`` or ``eta`` that is not from 0 to 1.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        noise = self.starting_noise(range(seed, seed + len(prompts)), height, width)
        uncond = self.encode_prompt([negative_prompt])
        if not 0 <= selective <= 1:
            raise ValueError(f"selective is a share of the steps, from 0 to 1, not {selective:g}.")
        dropped, timesteps = steps_without(selective, steps), self.schedule.timesteps(steps)
        guided_until = [self.schedule.train_steps, *timesteps][steps - dropped] if dropped else 0
        pictures = []
        bar = tqdm(total=-(-len(prompts) // batch) * steps, desc="sampling", unit="step", disable=not progress)
        for first in range(0, len(prompts), batch):
            cond = self.encode_prompt(prompts[first : first + batch])
            model = self.denoiser(cond, uncond.expand(len(cond), -1, -1), guidance, lora_enabled, guided_until)
            z_T = noise[first : first + batch]
            seeds = range(seed + first, seed + first + len(z_T))
            generators = [torch.Generator().manual_seed(FRESH_NOISE + own) for own in seeds]
            for z_t in ddim_sample(model, self.schedule, z_T, steps, eta, generators):
                bar.update()
            with at_work(self.vae, self.device):
                for one in z_t.to(self.dtype).split(1):  # a decoder takes far more memory for a picture than the UNet
                    pictures += to_images(self.vae.decode(one))
        bar.close()
        return pictures


def to_images(x: Tensor) -> list[Image.Image]:
    """Pictures [B, 3, H, W] in [-1, 1] -> PIL images."""
    levels = ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).cpu().numpy()]


def place(module: nn.Module, device: str | torch.device) -> nn.Module:
    """On the device; on a GPU with convolution weights channels last, which those mapped from a file are not."""
    module = module.to(device)
    return module.to(memory_format=torch.channels_last) if torch.device(device).type == "cuda" else module


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    prediction: str | None = None,
    tokenizer: str | Path | None = None,
    ema: bool = False,
    variant: str | None = None,
) -> StableDiffusion:
    """Load a Stable Diffusion 1.x or 2.x.

    Args:
        path: a folder in the official layout, a single .safetensors or .ckpt file, or a hub id.
        dtype: of all weights; files of another are cast.  device: where they go.
        prediction: "eps" or "v", in place of what the folder's scheduler says, or is taken for a single file's.
        tokenizer: a folder with vocab.json and merges.txt, in place of the model's own.
        ema: take the averaged copy of the UNet that some single files hold beside it.
        variant: of the weights in a folder or on the hub, for example "fp16".

    Raises:
        CheckpointError: names the file, what is wrong with it and what to do.
        ValueError: the device is not available here. (A CheckpointError is a ValueError too.)
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'The device "{device}" is not available here: {str(error).splitlines()[0]}') from error
    parts = read_checkpoint(path, dtype, prediction=prediction, ema=ema, variant=variant)
    return StableDiffusion(
        unet=place(parts.unet, device),
        vae=place(parts.vae, device),
        text_encoder=place(parts.text_encoder, device),
        schedule=Schedule.from_config(parts.schedule),
        unet_config=parts.unet.config,
        folder=parts.path,
        tokenizer_folder=Path(tokenizer) if tokenizer else parts.tokenizer_folder,
        pad_token=parts.pad_token,
    )
