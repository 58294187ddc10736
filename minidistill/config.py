"""Shapes of the networks, and the noise schedule. Defaults are Stable Diffusion 1.5; a preset states its changes."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser. Per-level tuples run from the finest resolution to the coarsest."""

    in_channels: int = 4
    out_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2  # residual blocks per level (one more on the way up)
    depth: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks in each attention of a level; 0: no attention
    mid_depth: int = 1
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context_width: int = 768
    linear_projection: bool = False  # attention's proj_in and proj_out: linear layers instead of 1x1 convolutions
    upcast_attention: bool = False  # compute attention in at least float32
    groups: int = 32
    sample_size: int = 64  # height and width of the latents it was trained on
    pooled_width: int = 0  # SDXL: width of a vector for the whole prompt, which comes with six sizes; 0: neither
    size_width: int = 256  # width of the sinusoidal embedding of each size


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder between images and latents. Every level but the last halves height and width."""

    image_channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    groups: int = 32
    scaling_factor: float = 0.18215  # scales the latents to unit variance

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule. SD 1.x, 2.x and XL were all trained with these betas."""

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # linear in sqrt(beta); or "linear"
    prediction: str = "eps"  # what the UNet returns: "eps" or "v"
    steps_offset: int = 1
    spacing: str = "leading"  # of a sampler's time steps; or "trailing"
    zero_terminal_snr: bool = False  # rescaled, so that nothing of z_0 is left at the last t
    set_alpha_to_one: bool = False  # sampling ends at alpha_bar 1, not at that of t=0


SD15_UNET = UNetConfig()
SD15_VAE = VAEConfig()
SD21_BASE_UNET = replace(SD15_UNET, heads=(5, 10, 20, 20), context_width=1024, linear_projection=True)
SD21_UNET = replace(SD21_BASE_UNET, upcast_attention=True, sample_size=96)
SDXL_UNET = UNetConfig(
    widths=(320, 640, 1280),
    depth=(0, 2, 10),
    mid_depth=10,
    heads=(5, 10, 20),
    context_width=2048,
    linear_projection=True,
    sample_size=128,
    pooled_width=1280,
)
SDXL_VAE = replace(SD15_VAE, scaling_factor=0.13025)

# The emoji model: 64x64 images, 16x16 latents.
POCKET_UNET = UNetConfig(
    widths=(64, 128, 160),
    layers=1,
    depth=(1, 1, 0),
    heads=(2, 2, 2),
    context_width=128,
    groups=16,
    sample_size=16,
)
POCKET_VAE = VAEConfig(widths=(16, 48, 64), layers=1, groups=4, scaling_factor=1.0)
