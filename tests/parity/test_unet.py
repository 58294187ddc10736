"""The UNet compared with diffusers' UNet2DConditionModel, on weights that diffusers wrote."""

import math
import shutil
from inspect import signature
from pathlib import Path

import pytest
import torch
from tiny import error, shake
from torch import Tensor

from minidistill.conditioning import Conditioning
from minidistill.config import SD15_UNET, SD21_BASE_UNET, SD21_UNET
from minidistill.formats.load_model import build, load
from minidistill.formats.model_configs import SCHEDULE_KEYS, UNET_KEYS, Keys, read_unet_config
from minidistill.formats.model_folder import read_weights
from minidistill.guidance import away_from
from minidistill.training.recompute import recompute
from minidistill.unet import Attention, UNet

from .helpers import SD1, SD2, diffusers, randn, write_small

CASES = {
    "sd1": (SD1, {}),
    "sd1, 2 layers, 32 groups": (SD1, dict(layers_per_block=2, norm_num_groups=32)),
    "sd1, 8 heads, 2 levels": (
        SD1,
        dict(
            attention_head_dim=8,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
    ),
    "sd2": (SD2, {}),
    "sd2, 2 layers, 32 groups": (SD2, dict(layers_per_block=2, norm_num_groups=32)),
    "sd2 base": (SD2, dict(upcast_attention=False)),
    "lists of equal values, swish": (
        SD1,
        dict(layers_per_block=[2, 2, 2], cross_attention_dim=[24, 24, 24], act_fn="swish"),
    ),
    "depth per level": (SD2, dict(transformer_layers_per_block=[1, 2, 3])),
}


@pytest.mark.parametrize("case", CASES)
def test_small(case: str, tmp_path: Path) -> None:
    style, changes = CASES[case]
    theirs = write_small(tmp_path, style=style, **changes).unet
    ours = load(tmp_path, dtype=torch.float64).unet
    for height, width, length in ((8, 8, 16), (8, 12, 7), (20, 4, 1), (9, 10, 3)):
        z_t, t = randn(2, 4, height, width), torch.tensor([1, 981])
        context = randn(2, length, style["cross_attention_dim"], seed=1)
        with torch.no_grad():
            assert error(ours(z_t, t, context), theirs(z_t, t, context).sample) <= 1e-9


@pytest.mark.parametrize("upcast, inside", [(True, torch.float32), (False, torch.float16)])
def test_upcast_attention(upcast: bool, inside: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """SD 2.1's scores overflow in float16. Float64 cannot show this, and diffusers' fused attention does not upcast."""
    seen = set()

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        seen.update(x.dtype for x in (q, k, v))
        return v

    monkeypatch.setattr("minidistill.unet.attention", attention)
    layer = Attention(16, 16, 2, upcast).half()
    assert layer(torch.ones(1, 3, 16, dtype=torch.float16)).dtype == torch.float16 and seen == {inside}


@pytest.mark.parametrize("style", [SD1, SD2, SD2 | dict(transformer_layers_per_block=2)], ids=["sd1", "sd2", "deep"])
def test_gradients_with_activation_checkpointing(style: dict, tmp_path: Path) -> None:
    theirs = write_small(tmp_path, style=style).unet
    ours = load(tmp_path, dtype=torch.float64).unet
    t, out_grad = torch.tensor([500, 3]), randn(2, 4, 8, 12, seed=2)

    def gradients(model) -> tuple[torch.Tensor, torch.Tensor]:
        z_t = randn(2, 4, 8, 12).requires_grad_()
        context = randn(2, 7, style["cross_attention_dim"], seed=1).requires_grad_()
        return torch.autograd.grad(model(z_t, t, context), (z_t, context), out_grad)

    reference = gradients(lambda *args: theirs(*args).sample)
    plain = gradients(ours)
    for below in (math.inf, 50.0):
        recompute(ours, below)
        for actual, ours_plain, expected in zip(gradients(ours), plain, reference):
            assert error(actual, expected) <= 1e-9
            assert torch.equal(actual, ours_plain)


@pytest.mark.parametrize("style", [SD1, SD2], ids=["sd1", "sd2"])
def test_normalized_attention_guidance(style: dict, tmp_path: Path) -> None:
    """An attention processor for diffusers, written after arXiv 2505.21179, against ``away_from``."""
    theirs = write_small(tmp_path, style=style).unet
    ours = load(tmp_path, dtype=torch.float64).unet
    phi, tau, alpha = 5.0, 2.5, 0.25
    context = randn(2, 7, style["cross_attention_dim"], seed=1)
    negative = context[:1] + 0.1  # near the first prompt and far from the second: below and above tau
    plain = theirs.attn_processors

    class Normalized:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
            query = attn.head_to_batch_dim(attn.to_q(hidden_states))

            def read(states):
                key, value = (attn.head_to_batch_dim(layer(states)) for layer in (attn.to_k, attn.to_v))
                scores = (attn.scale * query @ key.mT).softmax(-1)  # get_attention_scores may narrow to float32
                return attn.batch_to_head_dim(scores @ value)

            z = read(encoder_hidden_states)
            led = phi * z - (phi - 1) * read(negative.expand(len(z), -1, -1))
            ratio = led.abs().sum(-1, keepdim=True) / z.abs().sum(-1, keepdim=True)
            assert (ratio > tau).any() and (ratio < tau).any()
            led = torch.where(ratio > tau, led * tau / ratio, led)
            return attn.to_out[0](alpha * led + (1 - alpha) * z)

    theirs.set_attn_processor({n: Normalized() if ".attn2." in n else own for n, own in plain.items()})
    inputs = randn(2, 4, 8, 12), torch.tensor([1, 981]), context
    with torch.no_grad():
        before = ours(*inputs)
        with away_from(ours, Conditioning(negative)):
            assert error(ours(*inputs), theirs(*inputs).sample) <= 1e-9
        assert torch.equal(ours(*inputs), before)


FULL = {
    "sd15": (SD15_UNET, dict(attention_head_dim=8, cross_attention_dim=768, sample_size=64)),
    "sd21": (
        SD21_UNET,
        dict(
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
            upcast_attention=True,
            sample_size=96,
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("version", FULL)
def test_full_size(version: str, tmp_path: Path) -> None:
    preset, settings = FULL[version]
    torch.manual_seed(0)
    theirs = shake(diffusers.UNet2DConditionModel(**settings))
    inputs = randn(1, 4, 32, 32).float(), torch.tensor([621]), randn(1, 77, preset.context_width, seed=1).float()
    with torch.no_grad():
        reference = theirs(*inputs).sample
    theirs.save_pretrained(tmp_path, max_shard_size="20GB")
    del theirs

    config = read_unet_config(tmp_path / "config.json")
    ours = build(lambda: UNet(config), read_weights(tmp_path, "diffusion_pytorch_model"), torch.float32)
    with torch.no_grad():
        difference = error(ours(*inputs), reference)
    del ours
    shutil.rmtree(tmp_path)  # 3.4 GB
    assert config == preset
    assert difference <= 1e-4


def test_presets_differ_as_published() -> None:
    changed = {name for name, value in vars(SD21_UNET).items() if value != getattr(SD21_BASE_UNET, name)}
    assert changed == {"upcast_attention", "sample_size"}


@pytest.mark.parametrize("network, keys", [("UNet2DConditionModel", UNET_KEYS), ("DDIMScheduler", SCHEDULE_KEYS)])
def test_a_setting_that_is_absent_has_diffusers_default(network: str, keys: Keys) -> None:
    defaults = {
        name: parameter.default
        for name, parameter in signature(getattr(diffusers, network).__init__).parameters.items()
    }
    ours = {key: default for key, default in keys.values() if key != "sample_size"}  # diffusers' is None
    assert ours == {key: defaults[key] for key in ours}
