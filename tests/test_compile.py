"""The UNet under torch.compile: no graph breaks, two graphs, the same numbers; train.py compiles no third graph."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import error, tiny_student, unet_inputs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from minidistill.formats.float8 import to_float8
from minidistill.lora import lora_parameters
from minidistill.training.recompute import LOW_MEMORY, recompute


@pytest.fixture(autouse=True)
def reset_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results(called: nn.Module, trained: list[nn.Parameter]) -> list[Tensor]:
    """The predictions of teacher and student, and the student's gradients."""
    inputs = unet_inputs()
    with torch.no_grad():
        eps_hat = called(*inputs)
    eps = called(*inputs, lora_enabled=True)
    return [eps_hat, eps.detach(), *torch.autograd.grad(eps.square().mean(), trained)]


@pytest.mark.parametrize("below", [0.0, LOW_MEMORY])
@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.slow
def test_one_graph_for_the_teacher_and_one_for_the_student(float8: bool, below: float):
    unet, counter = tiny_student(), CompileCounterWithBackend("aot_eager")
    if float8:
        weights = {name: x for name, x in unet.state_dict().items() if name.endswith("weight")}
        unet.load_state_dict({name: to_float8(name, x) for name, x in weights.items()}, strict=False, assign=True)
    recompute(unet, below)
    compiled = torch.compile(unet, fullgraph=True, dynamic=False, backend=counter)
    for actual, expected in zip(results(compiled, lora_parameters(unet)), results(unet, lora_parameters(unet))):
        assert error(actual, expected) < 1e-5
    results(compiled, lora_parameters(unet))
    assert counter.frame_count == 2 and not unet.switch.enabled


@pytest.mark.parametrize("method, graphs", [pytest.param("noised", 2, marks=pytest.mark.slow), ("trajectories", 1)])
def test_train_compiles_each_call_of_the_loop_once(
    method: str, graphs: int, command, flags, tmp_path: Path, monkeypatch
):
    plain, compiled = (flags(tmp_path / name, method=method, steps=3, trajectories=6) for name in ("plain", "compiled"))
    assert command("train.py", *plain, "--no-report").code == 0
    compile, counter = torch.compile, CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile(*args, **options, backend=counter))
    assert command("train.py", *compiled, "--compile").code == 0  # with its images
    assert counter.frame_count == graphs + 1  # the first one finds out whether there is a compiler
    plain, compiled = (load_file(tmp_path / name / "lora.safetensors") for name in ("plain", "compiled"))
    assert all(error(compiled[name], plain[name]) < 1e-4 for name in plain)
