"""What is measured: networks with random weights, a UNet call, an image, a training step; ours and the peers'."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig

from minidistill import config, kernels
from minidistill.bench.peers import peer_call, peer_guided_image, peer_lora, peer_unet
from minidistill.conditioning import Conditioning
from minidistill.formats.float8 import to_float8
from minidistill.guidance import batched_guided_noise, guided, guided_noise
from minidistill.guidance import student as student_predictor
from minidistill.lora import LoRAModel, inject_lora, lora_layers, merge_lora
from minidistill.samplers import ddim_sample
from minidistill.schedule import Schedule
from minidistill.training.cuda_graph import adamw
from minidistill.training.recompute import low_memory, recompute
from minidistill.unet import UNet
from minidistill.vae import VAE

GUIDANCE = 7.5
PEERS = ("diffusers", "peft")
SD15_TEXT = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
XL_TEXT_2 = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
)
SD21_TEXT = CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)


@dataclass(frozen=True)
class Size:
    """Networks of one size, and how much of their work is measured."""

    unet: config.UNetConfig
    vae: config.VAEConfig
    tokens: int  # L, the length of a prompt
    steps: int  # DDIM steps of an image
    batch: int  # of a training step; images are sampled one by one
    cpu_steps: int  # how many of an image's steps are timed on a CPU
    cpu_repeats: int
    text: CLIPTextConfig | None = field(default=None, compare=False)
    text_2: CLIPTextConfig | None = field(default=None, compare=False)  # SDXL's second text encoder


_LARGE = partial(Size, vae=config.SD15_VAE, tokens=77, steps=50, batch=1, cpu_steps=1, cpu_repeats=2)
SIZES = {
    "pocket": Size(config.POCKET_UNET, config.POCKET_VAE, 20, steps=25, batch=16, cpu_steps=25, cpu_repeats=9),
    "sd15": _LARGE(config.SD15_UNET, text=SD15_TEXT),
    "sd21": _LARGE(config.SD21_BASE_UNET, text=SD21_TEXT),
    "sdxl": _LARGE(config.SDXL_UNET, vae=config.SDXL_VAE, text=SD15_TEXT, text_2=XL_TEXT_2),
}
# As small as can be, with every kind of layer. Run it before a peak is measured: it makes the packages import and
# allocate what they need only once.
_SMALLEST_UNET = config.UNetConfig(widths=(8, 16), layers=1, depth=(1, 0), heads=(1, 1), groups=8, sample_size=4)
SMALLEST = replace(SIZES["pocket"], unet=_SMALLEST_UNET, batch=1)


@dataclass
class Setup:
    """Weights and inputs of one size. They depend on seeds alone: each side and each process gets the same numbers."""

    size: Size
    device: torch.device
    dtype: torch.dtype
    rank: int
    timed_steps: int = 1
    kernel: str = "auto"  # which kernel computes the LoRA layers
    float8: bool = False  # the UNet's W in 8 bits (`--weights float8`)

    def randn(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)

    def latents(self, batch: int, seed: int = 1) -> Tensor:
        side = self.size.unet.sample_size
        return self.randn(batch, self.size.unet.in_channels, side, side, seed=seed)

    def contexts(self, batch: int) -> tuple[Tensor, Tensor] | tuple[Conditioning, Conditioning]:
        """Stand-ins for the embeddings of prompts and of the empty prompt, each [B, L, D]; SDXL is told more."""
        shape = (batch, self.size.tokens, self.size.unet.context_width)
        cond, uncond = self.randn(*shape, seed=2), self.randn(*shape, seed=3)
        if not (width := self.size.unet.pooled_width):
            return cond, uncond
        side = self.size.unet.sample_size * self.size.vae.factor
        sizes = torch.tensor([[side, side, 0, 0, side, side]] * batch, device=self.device)
        pooled = self.randn(batch, width, seed=6), self.randn(batch, width, seed=7)
        return Conditioning(cond, pooled[0], sizes), Conditioning(uncond, pooled[1], sizes)

    def inputs(self) -> tuple:
        """z_t [B, 4, h, w], t [B], cond and uncond (B prompts each), and the target of the prediction [B, 4, h, w].

        As in train.py, latents are in float32 or wider, embeddings in the dtype of the weights.
        """
        batch, wide = self.size.batch, torch.promote_types(self.dtype, torch.float32)
        t = torch.linspace(999, 1, batch, device=self.device).long()
        return self.latents(batch).to(wide), t, *self.contexts(batch), self.latents(batch, seed=5).to(wide)

    def random_weights(
        self, make: Callable[[], nn.Module], layout: torch.memory_format, float8: bool = False
    ) -> dict[str, Tensor]:
        """Matrices that keep the variance of their input; norms close to 1 and biases close to 0, but not equal."""
        with torch.device("meta"):
            shapes = {name: x.shape for name, x in make().state_dict().items()}
        weights = {}
        for seed, (name, shape) in enumerate(shapes.items()):
            x = self.randn(*shape, seed=seed).mul_(shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.1)
            x.add_(1 if len(shape) == 1 and name.endswith("weight") else 0)
            x = x.contiguous(memory_format=layout) if len(shape) == 4 else x
            weights[name] = to_float8(name, x) if float8 else x
        return weights

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The UNet's weights in the memory layout that load() gives them."""
        return self.random_weights(lambda: UNet(self.size.unet), torch.channels_last, self.float8)

    @cached_property
    def peer_weights(self) -> dict[str, Tensor]:
        """The same in the memory layout that diffusers' from_pretrained() gives them."""
        return self.random_weights(lambda: UNet(self.size.unet), torch.contiguous_format)

    def unet(self, copy: bool = False) -> UNet:
        """A frozen UNet that shares ``weights``, or has a copy of them."""
        weights = {name: x.clone() for name, x in self.weights.items()} if copy else self.weights
        return frozen(lambda: UNet(self.size.unet), weights)

    def lora_unet(self, zero: bool = False) -> LoRAModel:
        """The UNet with a random LoRA, or with one whose lora_up is zero."""
        unet = inject_lora(self.unet(), self.rank)
        if not zero:
            fill_pairs({name: (layer.lora_down, layer.lora_up) for name, layer in lora_layers(unet).items()})
        kernels.install(unet, self.kernel)
        return unet

    def peer_unet(self, channels_last: bool = False) -> nn.Module:
        weights = self.weights if channels_last else self.peer_weights
        return frozen(lambda: peer_unet(self.size.unet), weights)

    def peer_lora_unet(self) -> nn.Module:
        with torch.device("meta"):
            names = list(lora_layers(inject_lora(UNet(self.size.unet), self.rank)))
        unet = self.peer_unet()
        fill_pairs(peer_lora(unet, self.rank, names))
        return unet


def frozen(make: Callable[[], nn.Module], weights: dict[str, Tensor]) -> nn.Module:
    """A frozen module that uses the tensors in ``weights`` without copying them."""
    with torch.device("meta"):
        module = make()
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)


@torch.no_grad()
def fill_pairs(pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Fill (down, up) pairs at random; models whose layers have the same names get the same LoRA."""
    generator = torch.Generator(next(iter(pairs.values()))[0].device).manual_seed(4)
    for _, (down, up) in sorted(pairs.items()):
        for x, std in ((down, down[0].numel() ** -0.5), (up, 0.1)):  # the same numbers whatever the memory layout
            x.copy_(torch.randn(x.shape, generator=generator, device=x.device).mul_(std))


def attention(fused: bool) -> AbstractContextManager:
    """Attention in PyTorch's fused kernels, or in separate operations that keep the matrix of attention weights."""
    return nullcontext() if fused else sdpa_kernel(SDPBackend.MATH)


def error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference relative to the largest value, in the worst of the tensors; NaN if any value is NaN."""
    pairs = zip(outputs, expected, strict=True)
    return torch.stack([(a.double() - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()


# Each function below returns a workload: a function whose time or memory is measured and whose results are compared.
Workload = Callable[[], tuple[Tensor, ...]]


def forward(setup: Setup, who: str, alike: bool = False, compiled: bool = False, batch: int = 1) -> Workload:
    """One call of the UNet. Each side uses its own memory layout; with ``alike`` both use channels_last."""
    unet = setup.unet() if who == "ours" else setup.peer_unet(channels_last=alike)
    unet = torch.compile(unet) if compiled else unet
    model = unet if who == "ours" else partial(peer_call, unet)
    inputs = setup.latents(batch), torch.full((batch,), 621, device=setup.device), setup.contexts(batch)[0]
    return torch.no_grad()(lambda: (model(*inputs),))


def decode(setup: Setup, who: str) -> Workload:
    """The VAE's decoder, on the latents of one image."""
    weights = setup.random_weights(lambda: VAE(setup.size.vae), torch.channels_last)
    vae, z = frozen(lambda: VAE(setup.size.vae), weights), setup.latents(1)
    return torch.no_grad()(lambda: (vae.decode(z),))


def sample(setup: Setup, who: str, how: str) -> Workload:
    """The first ``timed_steps`` DDIM steps of an image. Returns the latents after each step."""
    z_T, steps, timed_steps = setup.latents(1), setup.size.steps, setup.timed_steps
    if who == "peer":
        return peer_guided_image(setup.peer_unet(), z_T, setup.contexts(1), GUIDANCE, steps, timed_steps)
    cond, uncond = setup.contexts(1)
    unet = setup.unet() if how in ("guided", "batched") else setup.lora_unet(zero=how == "merged")
    if how == "guided":
        model = guided(unet, cond, uncond, GUIDANCE)
    elif how == "batched":
        model = partial(batched_guided_noise, unet, cond=cond, uncond=uncond, guidance=GUIDANCE)
    else:
        model = student_predictor(unet, cond)
    if how == "merged":
        merge_lora(unet)  # adds zero: the shared weights stay as they are, and any merged LoRA takes the same time
    schedule = Schedule.from_config(config.ScheduleConfig())
    return lambda: tuple(islice(ddim_sample(model, schedule, z_T, steps), timed_steps))


class Update:
    """One update as in train.py: loss, backward pass, clipping, AdamW. A workload.

    Args:
        networks: all their weights that require gradients are trained. If none does, a call only computes ``loss``.
        loss: computes the loss from the arguments of the call.
        below: the backward pass recomputes numbers that took fewer multiply-adds than this.
    """

    def __init__(self, networks: list[nn.Module], loss: Callable[..., Tensor], below: float = 0):
        self.loss = loss
        self.weights = [p for network in networks for p in network.parameters()]
        self.trained = [p for p in self.weights if p.requires_grad]
        self.optimizer = adamw(self.trained, peak=1e-4) if self.trained else None
        for network in networks:
            recompute(network, below)

    def step(self, loss: Tensor) -> Tensor:
        """Everything after the loss. The gradients stay until ``zero_grad``. Returns their norm."""
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return norm

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        loss = self.loss(*inputs)
        if not self.trained:
            return (loss,)
        norm = self.step(loss)
        self.optimizer.zero_grad()
        return loss.detach(), norm


Networks = tuple[list[nn.Module], Callable[[], Tensor]]  # and the loss, or what else is computed with them


def lora_student(setup: Setup, teacher_in_loop: bool) -> Networks:
    """The loss against the teacher's stored prediction, or against one that it makes in the step."""
    unet, (z_t, t, cond, uncond, stored) = setup.lora_unet(), setup.inputs()

    def loss() -> Tensor:
        with torch.no_grad():  # the teacher: the LoRA is off by default
            eps_hat = guided_noise(unet, z_t, t, cond, uncond, GUIDANCE) if teacher_in_loop else stored
        return F.mse_loss(unet(z_t, t, cond, lora_enabled=True), eps_hat)

    return [unet], loss


def distil(setup: Setup, who: str, teacher_in_loop: bool, low: bool = False) -> Update:
    """One update of the LoRA. With ``low`` as in `--memory low`; the peer then recomputes whole blocks."""
    if who == "ours":
        return Update(*lora_student(setup, teacher_in_loop), below=low_memory(setup.size.unet) if low else 0)
    unet, (z_t, t, cond, uncond, stored) = setup.peer_lora_unet(), setup.inputs()
    model = partial(peer_call, unet)
    if low:
        unet.enable_gradient_checkpointing()

    def ask_teacher() -> Tensor:
        unet.disable_adapters()
        with torch.no_grad():
            eps_hat = guided_noise(model, z_t, t, cond, uncond, GUIDANCE)
        unet.enable_adapters()
        return eps_hat.to(z_t.dtype)

    def loss() -> Tensor:
        eps_hat = ask_teacher() if teacher_in_loop else stored
        return F.mse_loss(model(z_t, t, cond).to(z_t.dtype), eps_hat)

    return Update([unet], loss)


class Row(NamedTuple):
    label: str
    calls: int  # of the UNet; for an image, in each step
    make: Callable[[Setup, str], Workload]
    peer: bool = True  # whether the peers have it too


ROWS = {
    "unet": Row("UNet forward", 1, forward),
    "unet_alike": Row("UNet forward, both channels last", 1, partial(forward, alike=True)),
    "unet_compiled": Row("UNet forward, also compiled", 1, partial(forward, alike=True, compiled=True)),
    "decode": Row("VAE decoder", 0, decode, peer=False),
    "guided": Row("guided image", 2, partial(sample, how="guided")),
    "batched": Row("guided image, one call on a batch of two", 1, partial(sample, how="batched")),
    "merged": Row("one-pass image, LoRA merged", 1, partial(sample, how="merged"), peer=False),
    "unmerged": Row("one-pass image, LoRA not merged", 1, partial(sample, how="unmerged"), peer=False),
    "trajectories": Row("training step, from trajectories", 1, partial(distil, teacher_in_loop=False)),
    "recomputed": Row("training step, activations recomputed", 1, partial(distil, teacher_in_loop=False, low=True)),
    "noised": Row("training step, teacher in the loop", 3, partial(distil, teacher_in_loop=True)),
}
IMAGES = ("guided", "batched", "merged", "unmerged")
