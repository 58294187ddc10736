"""samplers.py: single DDIM steps, sampling and inversion, on cases that have a solution on paper."""

import ast
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_schedule import exact_alphas, schedule
from tiny import ROOT, error, randn
from torch import Tensor

from minidistill import StableDiffusion, ddim_invert, ddim_sample
from minidistill.data import trajectories
from minidistill.samplers import ddim_loop, ddim_step
from minidistill.schedule import Schedule, add_noise


def gaussian_model(s: Schedule, spread: float = 0.5):
    """The perfect prediction for Gaussian data: E[eps | z_t] = sigma z_t / (alpha^2 spread^2 + sigma^2), or v."""

    def model(z_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = s.alpha_sigma(t, z_t)
        eps = sigma * z_t / (alpha**2 * spread**2 + sigma**2)
        return eps if s.prediction == "eps" else (eps - sigma * z_t) / alpha

    return model


def last(steps) -> Tensor:
    return list(steps)[-1]


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
    if not one:  # inversion starts there; at alpha_bar = 1 the noise would be lost
        assert error(ddim_step(s, eps, end, -19, 1), add_noise(s, z_0, eps, torch.tensor([1]))) < 1e-6


def test_eta_one_is_finite_from_pure_noise():
    """With zero terminal SNR all of z_next's noise is fresh; the radicand of the rest is 0, or rounds to just below."""
    s, z = schedule(prediction="v", zero_terminal_snr=True), randn(1, 4, 3, 3)
    assert all(ddim_step(s, z, z, 999, t, 1.0, z).isfinite().all() for t in range(999))


def test_eta_one_is_ddpm():
    """Between neighbouring time steps: DDPM's posterior mean and variance (DDPM, eq. 7)."""
    t, bar = 500, exact_alphas()
    beta = 1 - bar[t] / bar[t - 1]
    z_t, eps, noise = (randn(1, 4, 3, 3, seed=i, dtype=torch.float64) for i in range(3))
    z_0 = (z_t - (1 - bar[t]) ** 0.5 * eps) / bar[t] ** 0.5
    mean = (bar[t - 1] ** 0.5 * beta * z_0 + (1 - beta) ** 0.5 * (1 - bar[t - 1]) * z_t) / (1 - bar[t])
    spread = ((1 - bar[t - 1]) / (1 - bar[t]) * beta) ** 0.5
    assert error(ddim_step(schedule(), eps, z_t, t, t - 1, 1.0, noise), mean + spread * noise) < 1e-4


def test_a_step_in_half_precision_stays_half():
    z_t = randn(2, 4, 3, 3).half()
    assert ddim_step(schedule(), z_t, z_t, 900, 860).dtype == torch.float16


# The one loop


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_the_loop_yields_the_new_latents_the_prediction_and_its_time_step(eta: float):
    """Compared with single steps taken by hand, downwards and upwards, from and to the end of sampling."""
    s, z, calls = schedule(), randn(2, 4, 3, 3, dtype=torch.float64), []
    steps = [(900, 500), (500, 40), (40, -1)] if eta else [(900, 500), (500, -1), (-1, 300)]
    generator = torch.Generator().manual_seed(3)

    def model(z_t: Tensor, t: Tensor) -> Tensor:
        calls.append((z_t, t))
        return torch.sin(z_t * (1 + t[:, None, None, None]))

    path = list(ddim_loop(model, s, z, steps, eta, generator))
    assert [t for _, _, t in path] == [t for t, _ in steps]
    noise = torch.Generator().manual_seed(3)
    for (z_next, prediction, _), (seen, t_seen), (t, t_next) in zip(path, calls, steps, strict=True):
        assert torch.equal(seen, z)
        assert t_seen.tolist() == [max(t, 0)] * 2 and t_seen.dtype == torch.int64
        assert torch.equal(prediction, torch.sin(z * (1 + max(t, 0))))
        fresh = torch.randn(z.shape, generator=noise, dtype=z.dtype) if eta else None
        z = ddim_step(s, prediction, z, t, t_next, eta, fresh)
        assert torch.equal(z_next, z)


def test_sampling_and_inversion_and_trajectories_go_through_the_loop(sd: StableDiffusion, monkeypatch):
    """What the loop yields is what each of them returns, for the steps that each of them should take."""
    taken = []

    def recorded(model, schedule, z_t, steps, *args):
        taken.append(list(steps))
        for i, (t, _) in enumerate(steps):
            yield z_t + i, z_t - i, t

    for module in ("minidistill.samplers", "minidistill.data.trajectories"):
        monkeypatch.setattr(f"{module}.ddim_loop", recorded)
    z = randn(1, 4, 8, 8)
    for sampler in (ddim_sample, ddim_invert):
        assert torch.equal(torch.cat(list(sampler(None, schedule(), z, 4))), torch.cat([z, z + 1, z + 2, z + 3]))
    cond = sd.encode_prompt(["a red apple"])
    z_t, target, z_0 = trajectories.teacher_trajectory(sd, cond, cond, 2.0, z, [751, 501, 1])
    assert taken[0] == [(751, 501), (501, 251), (251, 1), (1, -249)]
    assert taken[1] == [(-249, 1), (1, 251), (251, 501), (501, 751)]
    assert taken[2] == list(pairwise([751, 501, 1, -1]))
    assert torch.equal(z_t, torch.stack([z, z, z + 1], 1)) and torch.equal(z_0, z + 2)
    assert torch.equal(target, torch.stack([z, z - 1, z - 2], 1))


def test_there_is_one_ddim_loop_in_the_repository():
    files = [ROOT / "train.py", ROOT / "sample.py", *(ROOT / "minidistill").rglob("*.py")]
    places = [place for file in files for place in calls_of("ddim_step", file)]
    assert places == [("samplers.py", "ddim_loop")]


def calls_of(name: str, file: Path) -> list[tuple[str, str]]:
    """(file, function) for each place that calls a function of this name."""
    functions = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)]
    calls = [(f, node) for f in functions for node in ast.walk(f) if isinstance(node, ast.Call)]
    return [(file.name, f.name) for f, node in calls if ast.unparse(node.func).split(".")[-1] == name]


# Sampling


def test_one_call_and_one_yield_per_step():
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


def test_noise_for_eta_comes_from_the_generator():
    s, z_T = schedule(), randn(1, 4, 8, 8)
    first, again, other = (
        last(ddim_sample(gaussian_model(s), s, z_T, 5, 1.0, torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_outside_0_to_1_is_refused(eta: float):
    with pytest.raises(ValueError, match="eta runs from 0"):
        last(ddim_sample(gaussian_model(schedule()), schedule(), randn(1, 4, 3, 3), 5, eta))


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_inversion_and_sampling_lead_back(prediction: str, one: bool):
    s = schedule(prediction=prediction, set_alpha_to_one=one)
    z_0 = 0.5 * randn(2, 4, 8, 8, dtype=torch.float64)

    def distance(steps: int) -> float:
        z_T = last(ddim_invert(gaussian_model(s), s, z_0, steps))
        assert error(z_T, 2 * z_0) < 0.1  # noise of unit variance
        return error(last(ddim_sample(gaussian_model(s), s, z_T, steps)), z_0)

    assert distance(500) < 0.02 and distance(500) < 0.5 * distance(50) < 0.05


def test_sampling_keeps_no_graph():
    weight = torch.ones((), requires_grad=True)
    z_0 = last(ddim_sample(lambda z_t, t: weight * z_t, schedule(), randn(1, 4, 3, 3), 2))
    assert not z_0.requires_grad
