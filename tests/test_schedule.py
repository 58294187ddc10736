"""schedule.py: the noise levels Stable Diffusion was trained with, and conversions between z_0, eps and v."""

import math

import numpy as np
import pytest
import torch
from tiny import error, randn

from minidistill.config import ScheduleConfig
from minidistill.schedule import Schedule, add_noise, clean_and_noise, min_snr_weight, velocity


def schedule(**changes) -> Schedule:
    return Schedule.from_config(ScheduleConfig(**changes))


def exact_alphas() -> np.ndarray:
    """alpha_bar in float64, computed independently."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return np.cumprod(1 - betas)


# The schedule itself


def test_alphas_are_those_of_stable_diffusion():
    alphas = schedule().alphas_cumprod.double().numpy()
    assert np.abs(alphas / exact_alphas() - 1).max() < 1e-5
    assert math.isclose(alphas[0], 0.99915, rel_tol=1e-6) and math.isclose(alphas[-1], 0.0046601, rel_tol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_alphas_do_not_depend_on_pytorchs_default_dtype(kind: str, dtype: torch.dtype):
    """In bfloat16 alpha_bar would be off by 0.2."""
    expected = schedule(beta_schedule=kind).alphas_cumprod
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(schedule(beta_schedule=kind).alphas_cumprod, expected) and expected.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_linear_betas():
    alphas = schedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02).alphas_cumprod.double().numpy()
    assert np.abs(alphas / np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)) - 1).max() < 1e-5


def test_final_alpha():
    assert schedule().final_alpha == schedule().alphas_cumprod[0]
    assert schedule(set_alpha_to_one=True).final_alpha == 1


@pytest.mark.parametrize("changes", [dict(prediction="sample"), dict(beta_schedule="squaredcos_cap_v2")])
def test_unknown_kinds_are_named(changes: dict):
    with pytest.raises(ValueError, match=next(iter(changes.values()))):
        schedule(**changes)


LEADING = [(50, range(981, 0, -20)), (25, range(961, 0, -40)), (30, range(958, 0, -33)), (1, [1])]
LEADING += [(1000, range(999, -1, -1)), (999, range(999, 0, -1))]
TRAILING = [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249]), (3, [999, 666, 332])]


@pytest.mark.parametrize("spacing, cases", [("leading", LEADING), ("trailing", TRAILING)])
def test_timesteps(spacing: str, cases: list):
    assert [schedule().timesteps(steps, spacing) for steps, _ in cases] == [list(expected) for _, expected in cases]
    assert schedule(steps_offset=0).timesteps(4) == [750, 500, 250, 0]


def test_an_unknown_spacing_is_refused():
    with pytest.raises(ValueError, match="leading.*trailing.*karras"):
        schedule().timesteps(4, "karras")


def test_below_zero_is_the_end_of_sampling():
    for one in (True, False):
        alpha, sigma = schedule(set_alpha_to_one=one).alpha_sigma(torch.tensor([-1, -40, 0]), torch.empty(0))
        expected = 1.0 if one else 0.99915
        assert alpha.flatten().square()[:2].tolist() == pytest.approx([expected] * 2)
        assert (alpha**2 + sigma**2).flatten().tolist() == pytest.approx([1] * 3)


def test_a_time_step_above_the_last_is_refused():
    with pytest.raises(IndexError):
        schedule().alpha_sigma(torch.tensor([1000]), torch.empty(0))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int):
    with pytest.raises(ValueError, match=f"1 to 1000 steps, not {steps}"):
        schedule().timesteps(steps)


# Conversions


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_add_noise(t: int):
    z_0, eps = randn(2, 4, 3, 3, dtype=torch.float64), randn(2, 4, 3, 3, seed=1, dtype=torch.float64)
    alpha_bar = exact_alphas()[t]
    expected = alpha_bar**0.5 * z_0 + (1 - alpha_bar) ** 0.5 * eps
    assert error(add_noise(schedule(), z_0, eps, torch.tensor([t, t])), expected) < 1e-5


def test_each_image_has_its_own_time_step():
    s, z_0, eps = schedule(), randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    both = add_noise(s, z_0, eps, torch.tensor([3, 900]))
    alone = [add_noise(s, z_0[i : i + 1], eps[i : i + 1], torch.tensor([t])) for i, t in enumerate((3, 900))]
    assert torch.equal(both, torch.cat(alone))


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_clean_and_noise_inverts_add_noise(kind: str):
    s, t = schedule(), torch.tensor([10, 600])
    z_0, eps = randn(2, 4, 3, 3, dtype=torch.float64), randn(2, 4, 3, 3, seed=1, dtype=torch.float64)
    prediction = eps if kind == "eps" else velocity(s, z_0, eps, t)
    clean, noise = clean_and_noise(kind, prediction, add_noise(s, z_0, eps, t), *s.alpha_sigma(t, z_0))
    assert error(clean, z_0) < 1e-12 and error(noise, eps) < 1e-12


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_min_snr_weights_errors_of_the_image(kind: str):
    """By its definition: min(SNR, 5) times the squared error of z_0, from two different predictions."""
    s, z_t = schedule(prediction=kind), randn(4, 4, 2, 2, seed=1)
    t = torch.tensor([1, 100, 500, 999])
    alpha, sigma = s.alpha_sigma(t, z_t)
    one, other = (randn(4, 4, 2, 2, seed=seed) for seed in (2, 3))
    difference = clean_and_noise(kind, one, z_t, alpha, sigma)[0] - clean_and_noise(kind, other, z_t, alpha, sigma)[0]
    expected = (alpha / sigma).square().clamp(max=5) * difference.square()
    assert error(min_snr_weight(s, t, 5) * (one - other).square(), expected) < 1e-5


def test_half_precision_stays_half():
    """And the noise level is computed in float32: in half precision, sigma would be wrong by 4%."""
    z_0, eps, t = randn(2, 4, 3, 3).half(), randn(2, 4, 3, 3, seed=1).half(), torch.tensor([5, 900])
    expected = add_noise(schedule(), z_0.float(), eps.float(), t)
    assert error(add_noise(schedule(), z_0, eps, t), expected.half()) < 1e-3
