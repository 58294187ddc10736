"""The schedule and DDIM compared with diffusers' DDIMScheduler, with the settings of Stable Diffusion."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from tiny import error
from torch import Tensor

from minidistill.config import ScheduleConfig
from minidistill.formats.model_configs import read_schedule_config
from minidistill.samplers import ddim_sample
from minidistill.schedule import Schedule, add_noise, velocity

from .helpers import ddim_scheduler, randn

SHAPE = (2, 4, 6, 5)


def schedule(prediction: str = "eps", set_alpha_to_one: bool = False) -> Schedule:
    return Schedule.from_config(ScheduleConfig(prediction=prediction, set_alpha_to_one=set_alpha_to_one))


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 25, 30, 50, 999])
def test_timesteps(steps: int) -> None:
    theirs = ddim_scheduler()
    theirs.set_timesteps(steps)
    assert schedule().timesteps(steps) == theirs.timesteps.tolist()


def test_trailing_timesteps() -> None:
    """For some numbers of steps diffusers has one more, t = -1, by rounding."""
    theirs = ddim_scheduler(spacing="trailing")
    for steps in range(1, 1001):
        theirs.set_timesteps(steps)
        assert schedule().timesteps(steps, "trailing") == theirs.timesteps.tolist()[:steps]


@pytest.mark.parametrize("steps", [1, 2, 4, 25])  # with others, diffusers stops short of the next time step
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_every_trailing_step(prediction: str, steps: int) -> None:
    theirs = ddim_scheduler(prediction, spacing="trailing")
    theirs.set_timesteps(steps)

    def model(z_t: Tensor, t: Tensor) -> Tensor:
        return randn(*SHAPE, seed=int(t[0]))

    z_t = randn(*SHAPE)
    for t, actual in zip(
        theirs.timesteps, ddim_sample(model, schedule(prediction), z_t, steps, spacing="trailing"), strict=True
    ):
        z_t = theirs.step(model(z_t, t[None]), t, z_t).prev_sample
        assert error(actual, z_t) <= 1e-9, f"at t={t}"


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_ddim_step(eta: float, prediction: str, set_alpha_to_one: bool, steps: int) -> None:
    theirs = ddim_scheduler(prediction, set_alpha_to_one)
    theirs.set_timesteps(steps)

    def model(z_t: Tensor, t: Tensor) -> Tensor:
        return randn(*SHAPE, seed=int(t[0]))  # unrelated to z_t, so that no error can hide

    generator = torch.Generator().manual_seed(7)
    ours = ddim_sample(model, schedule(prediction, set_alpha_to_one), randn(*SHAPE), steps, eta, generator)
    z_t, reference_generator = randn(*SHAPE), torch.Generator().manual_seed(7)
    for t, actual in zip(theirs.timesteps, ours, strict=True):
        z_t = theirs.step(model(z_t, t[None]), t, z_t, eta=eta, generator=reference_generator).prev_sample
        assert error(actual, z_t) <= 1e-9, f"at t={t}"


@pytest.mark.parametrize("kind", ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_the_end_of_another_sampler(kind: str, tmp_path: Path) -> None:
    """DDIM made from its configuration ends at the same noise level. (PNDM has a default of its own.)"""
    written = getattr(diffusers, f"{kind}Scheduler")()
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": f"{kind}Scheduler"}))
    ours = Schedule.from_config(read_schedule_config(tmp_path / "config.json", None))
    assert ours.final_alpha == DDIMScheduler.from_config(written.config).final_alpha_cumprod


def test_add_noise_and_velocity() -> None:
    theirs, t = ddim_scheduler(), torch.arange(1000)
    z_0, noise = randn(1000, 4, 3, 2), randn(1000, 4, 3, 2, seed=1)
    assert torch.equal(schedule().alphas_cumprod, theirs.alphas_cumprod)
    assert error(add_noise(schedule(), z_0, noise, t), theirs.add_noise(z_0, noise, t)) <= 1e-9
    assert error(velocity(schedule(), z_0, noise, t), theirs.get_velocity(z_0, noise, t)) <= 1e-9


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_thousand_steps(eta: float) -> None:
    """Here diffusers' offset would run past the end of the schedule."""
    assert schedule().timesteps(1000) == list(range(999, -1, -1))
    *_, z = ddim_sample(lambda z_t, t: 0.1 * z_t, schedule(), randn(*SHAPE), 1000, eta)
    assert z.isfinite().all()


def test_zero_terminal_snr() -> None:
    """Theirs ends at 0, ours at 2**-24, which can be divided by."""
    theirs = DDIMScheduler.from_config(ddim_scheduler("v").config, rescale_betas_zero_snr=True)
    ours = Schedule.from_config(ScheduleConfig(prediction="v", zero_terminal_snr=True)).alphas_cumprod
    assert error(ours[:-1], theirs.alphas_cumprod[:-1]) < 1e-5 and theirs.alphas_cumprod[-1] == 0
    assert ours[-1] == 2**-24
