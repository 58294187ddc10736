"""Stable Diffusion as one object: prompts in, images out."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from minidistill import text
from minidistill.conditioning import Conditioning
from minidistill.config import UNetConfig
from minidistill.guidance import Interval, away_from, guided, plain, selective_interval, student
from minidistill.lora import lora_layers, lora_strength
from minidistill.samplers import ddim_sample
from minidistill.schedule import Schedule
from minidistill.vae import VAE

# Added to an image's seed for the noise of eta > 0, since the seed itself gave z_T. A CPU's generator knows only the
# lowest 32 bits of a seed.
FRESH_NOISE = 1 << 31


@contextmanager
def on_device(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Move the network to ``device`` for the block, and back afterwards."""
    before = next(network.parameters()).device
    network.to(device)
    try:
        yield
    finally:
        network.to(before)


@dataclass
class StableDiffusion:
    """The parts of a model, and sampling with them. ``minidistill.load`` makes one.

    Attributes:
        unet: ``(z_t, t, cond) -> eps`` or v, as ``schedule.prediction`` says. It may carry LoRA (lora.py).
        vae, text_encoder: images to latents and back; tokens to embeddings. They may stay on the CPU, as after
            ``sd.vae.to("cpu")``: they move to ``device`` while they are used. SDXL has two text encoders in one module.
        schedule: how much noise there is at each time step.
        read_tokenizer: returns the tokenizer.
        path: the folder or single file the model was loaded from.
        height, width: size of its images in pixels; by default the size that it was trained on.
        force_zeros: whether guidance without a negative prompt leads away from zeros, as SDXL was trained, or from the
            empty prompt.
        learned_guidance: the guidance scale that a student merged into the model has learned, if it has one.
        few_steps: the DDIM steps of that student, and those of its teacher, if it was taught how many to take.
    """

    unet: nn.Module
    vae: VAE
    text_encoder: CLIPTextModel | text.TwoTextEncoders
    schedule: Schedule
    read_tokenizer: Callable[[], CLIPTokenizer]
    path: Path
    height: int | None = None
    width: int | None = None
    force_zeros: bool = False
    learned_guidance: str | None = None
    few_steps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.height, self.width = self.height or self.trained_side, self.width or self.trained_side
        self.latent_size()  # raises if images of this size cannot be made

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """Read when a prompt is first encoded. Raises CheckpointError if the model has none."""
        return self.read_tokenizer()

    @property
    def unet_config(self) -> UNetConfig:
        """The shapes of the UNet, with or without LoRA."""
        return getattr(self.unet, "base", self.unet).config

    @property
    def is_merged(self) -> bool:
        """True if the UNet's LoRA is merged into W: then it is the student, whatever ``lora_enabled``."""
        return any(layer.merged for layer in lora_layers(self.unet).values())

    @property
    def trained_side(self) -> int:
        """Height and width of the images that the model was trained on, in pixels."""
        return self.unet_config.sample_size * self.vae.config.factor

    @property
    def device(self) -> torch.device:
        """Where the UNet is, and where everything is computed."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the VAE, which the other networks share (except for SDXL in float16, see ``load``)."""
        return self.vae.post_quant_conv.weight.dtype

    def encode_prompt(self, prompts: list[str], height: int | None = None, width: int | None = None) -> Conditioning:
        """N ``prompts`` -> their embeddings, tokens [N, L, D]; warns about prompts longer than L tokens.

        For SDXL also a pooled vector and sizes: ``height`` and ``width`` in pixels, both for the image to make and for
        the original image. ``dataclasses.replace(cond, sizes=...)`` sets others.
        Raises CheckpointError if the model has no tokenizer.
        """
        return self.encode_tokens(text.tokenize(self.tokenizer, prompts), height, width)

    def encode_tokens(self, ids: Tensor, height: int | None = None, width: int | None = None) -> Conditioning:
        """Token ``ids`` [N, L] -> embeddings [N, L, D]; for SDXL also pooled [N, P] and sizes [N, 6].

        The sizes are those of an uncropped image of ``height`` and ``width`` pixels.
        """
        with on_device(self.text_encoder, self.device):
            cond = text.encode_tokens(self.text_encoder, ids)
        if cond.pooled is None:
            return cond
        height, width = height or self.height, width or self.width
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=cond.tokens.device)
        return replace(cond, sizes=sizes.repeat(len(cond), 1))

    def encode_negative(
        self, negative_prompt: str | None = None, height: int | None = None, width: int | None = None
    ) -> Conditioning:
        """What guidance leads away from: ``negative_prompt``, or if it is None the empty prompt; for SDXL zeros.

        ``height`` and ``width`` as in ``encode_prompt``.
        """
        cond = self.encode_prompt([negative_prompt or ""], height, width)
        if self.stated_negative(negative_prompt) is None:
            return replace(cond, tokens=torch.zeros_like(cond.tokens), pooled=torch.zeros_like(cond.pooled))
        return cond

    def stated_negative(self, negative_prompt: str | None) -> str | None:
        """``negative_prompt`` as a LoRA's header records it: None becomes "" unless it means zeros (SDXL)."""
        return negative_prompt if self.force_zeros else negative_prompt or ""

    def latent_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Sides of the latents of an image of ``height`` and ``width`` pixels.

        Raises ValueError if they are not whole numbers.
        """
        factor = self.vae.config.factor
        height, width = self.height if height is None else height, self.width if width is None else width
        if height % factor or width % factor or min(height, width) < factor:
            raise ValueError(f"Images of this model have sides that are multiples of {factor}, not {width}x{height}.")
        return height // factor, width // factor

    def starting_noise(self, seeds: Sequence[int], height: int | None = None, width: int | None = None) -> Tensor:
        """z_T [N, 4, h, w] for N ``seeds``, each drawn separately on the CPU: the same on every device and batch size.

        At least float32, whatever the networks' dtype, because rounding would add up over the steps. ``height`` and
        ``width`` of the image are in pixels; the default is ``self.height`` and ``self.width``.
        Raises ValueError for a size that is not a whole number of latents.
        """
        shape = (self.unet_config.in_channels, *self.latent_size(height, width))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.stack([torch.randn(shape, generator=g, dtype=torch.float32, device="cpu") for g in generators])
        return noise.to(self.device, torch.promote_types(self.dtype, torch.float32))

    def run_vae(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Call ``function``, which is ``vae.encode`` or ``vae.decode``, on x.

        If the GPU's memory runs out, try again with the UNet on the CPU.
        """
        try:
            return function(x)
        except torch.OutOfMemoryError:
            pass  # from here on, nothing refers to what the first attempt left in memory
        with on_device(self.unet, torch.device("cpu")):
            return function(x)

    def _refuse_second_guidance(self, guidance: float | None, lora_enabled: bool) -> None:
        """Raise ValueError if W contains a student's guidance, and more would be added to it."""
        loaded = getattr(self.unet, "learned_guidance", None)  # by a student's LoRA beside W
        learned = self.learned_guidance or (self.is_merged and loaded)
        if learned and not lora_enabled and guidance != 1:
            raise ValueError(f"{self.path} has learned guidance {learned}: sample it with guidance 1 (--guidance 1).")
        if self.learned_guidance and lora_enabled and loaded:
            raise ValueError(
                f"{self.path} has learned guidance {learned} already: load the student beside its teacher."
            )

    def strength(self, guidance: float | None) -> float:
        """The strength of the student's LoRA for ``guidance``; None is the scale it has learned."""
        if guidance is None:
            return 1.0
        if (dial := getattr(self.unet, "dial", None)) is None:
            raise ValueError(
                f"This student cannot sample at guidance {guidance:g}, only at the scale it has learned: leave "
                "guidance out. Other scales need a student that was loaded from a file at strength 1, not of few steps."
            )
        return dial.strength(guidance)

    def decode(self, z: Tensor) -> Tensor:
        """Latents z -> images, by ``vae.decode``. A VAE that overflows in float16 is converted to float32 for good.

        Raises ValueError if the images still are not finite.
        """
        x = self.run_vae(self.vae.decode, z.to(self.dtype))
        if self.dtype == torch.float16 and not x.isfinite().all():
            warnings.warn("The VAE overflows in float16: decoding in float32.", stacklevel=3)
            self.vae.float()
            x = self.run_vae(self.vae.decode, z.float())
        require_finite(x, self.vae)
        return x

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        steps: int = 50,
        guidance: float | None = None,
        seed: int = 0,
        lora_enabled: bool = False,
        negative_prompt: str | None = None,
        selective: float = 0.0,
        interval: Interval | tuple[float, float] | None = None,
        height: int | None = None,
        width: int | None = None,
        batch: int = 8,
        eta: float = 0.0,
        spacing: str | None = None,
        progress: bool = False,
        clock: AbstractContextManager | None = None,
    ) -> list[Image.Image]:
        """Sample an image for each prompt; image i starts from the noise of ``seed + i``.

        Args:
            prompts: a list of prompts, or one string.
            steps: DDIM steps. Each costs one call of the UNet, two with guidance.
            guidance: the scale s; 1 is no guidance. The default is 7.5 for the teacher, and for the student the scale
                it has learned. A student from a file samples at other scales by the strength of its LoRA.
            lora_enabled: sample with the student, one call a step.
            negative_prompt: what guidance leads away from, if there is any; None as in ``encode_negative``. Give a
                student only one that it has not learned: cross-attention is led away from it ("Normalized Attention
                Guidance").
            selective: the share of the steps, counted from the last, that the teacher takes without guidance: there it
                changes little ("Selective Guidance", arXiv 2305.09847).
            interval: (low, high): the teacher is guided only at time steps from low to high ("Limited Interval", arXiv
                2404.07724).
            height, width: in pixels; by default ``self.height`` and ``self.width``.
            batch: images sampled at once.
            eta: 0 is deterministic DDIM; 1 adds as much fresh noise in each step as DDPM.
            spacing: of the time steps: "leading", the default of almost every model, or "trailing", which is better
                for few steps, and the default of a student that was taught how many to take.
            progress: show a progress bar.
            clock: entered for the DDIM steps and for the decoding, not while networks move to the device.

        Returns:
            PIL images, one for each prompt.

        Raises:
            ValueError: no student, a guidance that it cannot sample at, an image that is not finite, more steps than
                DDIM can take, a size that is not a whole number of latents, ``selective`` or ``eta`` outside 0 to 1, an
                empty ``interval``, or ``selective`` beside it; or more guidance for a model that has learned it.
        """
        self._refuse_second_guidance(guidance, lora_enabled)
        if lora_enabled and not hasattr(self.unet, "base"):  # it is the UNet alone
            raise ValueError("lora_enabled is for a UNet with a LoRA: sd.unet = load_lora(sd.unet, FILE) gives it one.")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or batch < 1:
            raise ValueError(f"{len(prompts)} prompts in batches of {batch}: both must be 1 or more.")
        seeds = range(seed, seed + len(prompts))
        noise = self.starting_noise(seeds, height, width)
        uncond = self.encode_negative(negative_prompt, height, width)
        if selective and interval:
            raise ValueError("selective is an interval of its own: give one of selective and interval.")
        if interval and interval[0] > interval[1]:
            raise ValueError(f"interval {interval[0]:g} to {interval[1]:g} is empty: give the lower time step first.")
        loaded = getattr(self.unet, "few_steps", None) if lora_enabled or self.is_merged else None
        if few_steps := loaded or self.few_steps:
            spacing = spacing or "trailing"
            few, many = few_steps
            if few < many and steps != few:
                warnings.warn(f"This student has learned {few} steps, not {steps}.", stacklevel=3)
        interval = Interval(*interval) if interval else selective_interval(self.schedule, steps, selective, spacing)
        strength = self.strength(guidance) if lora_enabled else 1.0
        clock = clock or nullcontext()
        guidance = 7.5 if guidance is None else guidance
        images = []
        bar = tqdm(total=-(-len(prompts) // batch) * steps, desc="sampling", unit="step", disable=not progress)
        for first in range(0, len(prompts), batch):
            rows = slice(first, first + batch)
            cond = self.encode_prompt(prompts[rows], height, width)
            if lora_enabled:
                model = student(self.unet, cond)
            elif guidance == 1:
                model = plain(self.unet, cond)
            else:
                model = guided(self.unet, cond, uncond.expand(len(cond)), guidance, interval)
            generators = [torch.Generator().manual_seed(FRESH_NOISE + own) for own in seeds[rows]]
            with (
                clock,
                lora_strength(self.unet, strength) if strength != 1 else nullcontext(),
                away_from(self.unet, uncond) if lora_enabled and negative_prompt else nullcontext(),
            ):
                for z_t in ddim_sample(model, self.schedule, noise[rows], steps, eta, generators, spacing):
                    bar.update()
            require_finite(z_t, self.unet)
            with on_device(self.vae, self.device), clock:
                for one in z_t.split(1):  # one by one: the decoder takes far more memory than the UNet
                    images += to_images(self.decode(one))
        bar.close()
        return images


def require_finite(x: Tensor, network: nn.Module) -> None:
    """Raise ValueError for latents or images of ``network`` with NaN or infinities, which would be black."""
    if not x.isfinite().all():
        dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
        advice = "the guidance or a LoRA's strength is too large, or the model is damaged"
        if dtype == "float16":
            advice = "use --dtype bfloat16 or float32"
        raise ValueError(f"The image is not finite (NaN or infinite), computed in {dtype}: {advice}.")


def to_images(x: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [-1, 1] -> PIL images."""
    return pil_images(((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))


def pil_images(levels: Tensor) -> list[Image.Image]:
    """uint8 [B, 3, H, W] -> PIL images."""
    return [Image.fromarray(image) for image in levels.permute(0, 2, 3, 1).cpu().numpy()]
