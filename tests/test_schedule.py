"""schedule.py: the numbers Stable Diffusion was trained with, conversions that agree, DDIM on cases solved on paper."""

import math

import numpy as np
import pytest
import torch
from tiny import error, randn
from torch import Tensor

from minidistill import ddim_invert, ddim_sample
from minidistill.config import ScheduleConfig
from minidistill.samplers import ddim_step
from minidistill.schedule import Schedule, add_noise, clean_and_noise, min_snr_weight, velocity


def schedule(**changes) -> Schedule:
    return Schedule.from_config(ScheduleConfig(**changes))


def exact_alphas() -> np.ndarray:
    """alpha_bar in float64, written out again."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return np.cumprod(1 - betas)


def gaussian_model(s: Schedule, spread: float = 0.5):
    """The perfect prediction for data that is Gaussian: E[eps | z_t] = sigma z_t / (alpha^2 spread^2 + sigma^2)."""

    def model(z_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = s.alpha_sigma(t, z_t)
        return sigma * z_t / (alpha**2 * spread**2 + sigma**2)

    return model


def last(steps) -> Tensor:
    return list(steps)[-1]


# The schedule itself


def test_alphas_are_stable_diffusions():
    found = schedule().alphas_cumprod.double().numpy()
    assert np.abs(found / exact_alphas() - 1).max() < 1e-5
    assert math.isclose(found[0], 0.99915, rel_tol=1e-6) and math.isclose(found[-1], 0.0046601, rel_tol=1e-4)


def test_linear_betas():
    found = schedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02).alphas_cumprod.double().numpy()
    assert np.abs(found / np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)) - 1).max() < 1e-5


def test_final_alpha():
    assert schedule().final_alpha == schedule().alphas_cumprod[0]
    assert schedule(set_alpha_to_one=True).final_alpha == 1


@pytest.mark.parametrize("changes", [dict(prediction="sample"), dict(beta_schedule="squaredcos_cap_v2")])
def test_unknown_kinds_are_named(changes: dict):
    with pytest.raises(ValueError, match=next(iter(changes.values()))):
        schedule(**changes)


@pytest.mark.parametrize(
    "steps, expected",
    [
        (50, [i * 20 + 1 for i in range(50)][::-1]),
        (25, [i * 40 + 1 for i in range(25)][::-1]),
        (30, [i * 33 + 1 for i in range(30)][::-1]),
        (1, [1]),
        (1000, list(range(1000))[::-1]),
        (999, list(range(1, 1000))[::-1]),
    ],
)
def test_timesteps(steps: int, expected: list[int]):
    assert schedule().timesteps(steps) == expected


def test_timesteps_without_offset():
    assert schedule(steps_offset=0).timesteps(4) == [750, 500, 250, 0]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_that_cannot_be(steps: int):
    with pytest.raises(ValueError, match=f"1 to 1000 steps, not {steps}"):
        schedule().timesteps(steps)


# Conversions


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_add_noise(t: int):
    z_0, eps = randn(2, 4, 3, 3, dtype=torch.float64), randn(2, 4, 3, 3, seed=1, dtype=torch.float64)
    alpha_bar = exact_alphas()[t]
    expected = alpha_bar**0.5 * z_0 + (1 - alpha_bar) ** 0.5 * eps
    assert error(add_noise(schedule(), z_0, eps, torch.tensor([t, t])), expected) < 1e-5


def test_each_picture_has_its_own_time():
    s, z_0, eps = schedule(), randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    both = add_noise(s, z_0, eps, torch.tensor([3, 900]))
    alone = [add_noise(s, z_0[i : i + 1], eps[i : i + 1], torch.tensor([t])) for i, t in enumerate((3, 900))]
    assert torch.equal(both, torch.cat(alone))


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_clean_and_noise_undo_add_noise(kind: str):
    s, t = schedule(), torch.tensor([10, 600])
    z_0, eps = randn(2, 4, 3, 3, dtype=torch.float64), randn(2, 4, 3, 3, seed=1, dtype=torch.float64)
    prediction = eps if kind == "eps" else velocity(s, z_0, eps, t)
    found = clean_and_noise(kind, prediction, add_noise(s, z_0, eps, t), *s.alpha_sigma(t, z_0))
    assert error(found[0], z_0) < 1e-12 and error(found[1], eps) < 1e-12


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_min_snr_counts_errors_of_the_picture(kind: str):
    """By its definition: min(SNR, 5) times the squared error of z_0, from two predictions that differ."""
    s, z_t = schedule(prediction=kind), randn(4, 4, 2, 2, seed=1)
    t = torch.tensor([1, 100, 500, 999])
    alpha, sigma = s.alpha_sigma(t, z_t)
    one, other = (randn(4, 4, 2, 2, seed=seed) for seed in (2, 3))
    missed = clean_and_noise(kind, one, z_t, alpha, sigma)[0] - clean_and_noise(kind, other, z_t, alpha, sigma)[0]
    asked = (alpha / sigma).square().clamp(max=5) * missed.square()
    assert error(min_snr_weight(s, t, 5) * (one - other).square(), asked) < 1e-5


def test_half_precision_stays_half():
    z_0 = randn(2, 4, 3, 3).half()
    assert add_noise(schedule(), z_0, z_0, torch.tensor([5, 900])).dtype == torch.float16
    assert ddim_step(schedule(), z_0, z_0, 900, 860).dtype == torch.float16


# One step


def test_a_step_with_the_true_noise_stays_on_the_line():
    """From alpha z_0 + sigma eps at t to the same with the alpha and sigma of t_next (DDIM, eq. 12 with eta 0)."""
    s = schedule()
    z_0, eps = randn(1, 4, 3, 3, dtype=torch.float64), randn(1, 4, 3, 3, seed=1, dtype=torch.float64)
    here, there = (add_noise(s, z_0, eps, torch.tensor([t])) for t in (601, 561))
    assert error(ddim_step(s, eps, here, 601, 561), there) < 1e-6
    assert error(ddim_step(s, eps, there, 561, 601), here) < 1e-6  # and back


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_eps_and_v_take_the_same_step(eta: float):
    z_t, eps, noise = (randn(1, 4, 3, 3, seed=i, dtype=torch.float64) for i in range(3))
    alpha, sigma = schedule().alpha_sigma(torch.tensor([601]), z_t)
    v = (eps - sigma * z_t) / alpha
    by_eps = ddim_step(schedule(), eps, z_t, 601, 561, eta, noise)
    assert error(ddim_step(schedule(prediction="v"), v, z_t, 601, 561, eta, noise), by_eps) < 1e-6


@pytest.mark.parametrize("one, expected", [(True, 1.0), (False, 0.99915)])
def test_the_last_step_ends_at_the_final_alpha(one: bool, expected: float):
    z_0, eps = randn(1, 4, 3, 3, dtype=torch.float64), randn(1, 4, 3, 3, seed=1, dtype=torch.float64)
    s = schedule(set_alpha_to_one=one)
    end = ddim_step(s, eps, add_noise(s, z_0, eps, torch.tensor([1])), 1, -19)
    assert error(end, expected**0.5 * z_0 + (1 - expected) ** 0.5 * eps) < 1e-6
    if not one:  # and inversion starts there; from alpha_bar=1 no noise could be told
        assert error(ddim_step(s, eps, end, -19, 1), add_noise(s, z_0, eps, torch.tensor([1]))) < 1e-6


def test_eta_one_is_ddpm():
    """With neighbouring steps: DDPM's posterior mean and variance (DDPM, eq. 7)."""
    t, bar = 500, exact_alphas()
    beta = 1 - bar[t] / bar[t - 1]
    z_t, eps, noise = (randn(1, 4, 3, 3, seed=i, dtype=torch.float64) for i in range(3))
    z_0 = (z_t - (1 - bar[t]) ** 0.5 * eps) / bar[t] ** 0.5
    mean = (bar[t - 1] ** 0.5 * beta * z_0 + (1 - beta) ** 0.5 * (1 - bar[t - 1]) * z_t) / (1 - bar[t])
    spread = ((1 - bar[t - 1]) / (1 - bar[t]) * beta) ** 0.5
    assert error(ddim_step(schedule(), eps, z_t, t, t - 1, 1.0, noise), mean + spread * noise) < 1e-4


# Sampling


def test_one_call_and_one_yield_a_step():
    calls = []

    def model(z_t: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return z_t

    latents = list(ddim_sample(model, schedule(), randn(2, 4, 3, 3), 5))
    assert len(latents) == 5 and all(z.shape == (2, 4, 3, 3) for z in latents)
    assert [t.tolist() for t in calls] == [[t, t] for t in (801, 601, 401, 201, 1)]
    assert all(t.dtype == torch.int64 for t in calls)


@pytest.mark.parametrize("eta, tolerance", [(0.0, 0.02), (1.0, 0.05)])
def test_gaussian_data_comes_out_with_its_spread(eta: float, tolerance: float):
    s = schedule()
    z_0 = last(ddim_sample(gaussian_model(s), s, randn(4, 4, 32, 32), 200, eta, torch.Generator().manual_seed(0)))
    assert abs(z_0.std() / 0.5 - 1) < tolerance


def test_more_steps_come_nearer_to_the_solution():
    """Noise flows to data along straight rays here: z_0 = spread z_T / sqrt(alpha_T^2 spread^2 + sigma_T^2)."""
    s, z_T = schedule(set_alpha_to_one=True), randn(1, 4, 8, 8, dtype=torch.float64)

    def distance(steps: int) -> float:
        alpha_bar = s.alphas_cumprod[s.timesteps(steps)[0]].item()
        expected = 0.5 * z_T / (alpha_bar * 0.25 + 1 - alpha_bar) ** 0.5
        return error(last(ddim_sample(gaussian_model(s), s, z_T, steps)), expected)

    assert distance(500) < 0.01 and distance(500) < 0.5 * distance(100) < 0.25 * distance(20)


def test_eta_draws_from_the_generator():
    s, z_T = schedule(), randn(1, 4, 8, 8)
    first, again, other = (
        last(ddim_sample(gaussian_model(s), s, z_T, 5, 1.0, torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_an_eta_that_is_none(eta: float):
    with pytest.raises(ValueError, match="eta runs from 0"):
        last(ddim_sample(gaussian_model(schedule()), schedule(), randn(1, 4, 3, 3), 5, eta))


def test_inversion_comes_back():
    s, z_0 = schedule(), 0.5 * randn(1, 4, 8, 8, dtype=torch.float64)

    def distance(steps: int) -> float:
        z_T = last(ddim_invert(gaussian_model(s), s, z_0, steps))
        return error(last(ddim_sample(gaussian_model(s), s, z_T, steps)), z_0)

    assert distance(500) < 0.02 and distance(500) < 0.5 * distance(50)


def test_sampling_keeps_no_graph():
    weight = torch.ones((), requires_grad=True)
    z_0 = last(ddim_sample(lambda z_t, t: weight * z_t, schedule(), randn(1, 4, 3, 3), 2))
    assert not z_0.requires_grad
