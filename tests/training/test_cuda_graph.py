"""training/cuda_graph.py: an update that is recorded once and replayed learns what the eager loop learns, bit by bit.

There is no GPU here. ``CpuGraph`` stands for torch.cuda.graph: below Python and autograd it records each operation with
the tensors that it reads and writes, and replays them. What Python does between the operations is not repeated, as in a
CUDA graph; an operation that would wait for the GPU is an error, as there.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import unet_inputs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidistill.conditioning import Conditioning
from minidistill.distill import Batch
from minidistill.training import cuda_graph
from minidistill.training.cuda_graph import WARM_UP, UpdateGraph, adamw, can_record, set_learning_rate
from minidistill.training.distributed import Ranks
from minidistill.training.run_folder import resume, save_checkpoint

WAITS = ("_local_scalar_dense", "nonzero", "equal")  # operations whose result goes to Python


def tensors(*nested: object) -> list[Tensor]:
    return [x for x in tree_leaves(nested) if isinstance(x, Tensor)]


class CpuGraph(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket.__name__ in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {operation}")
        result = operation(*args, **(kwargs or {}))
        owned = {x.untyped_storage().data_ptr() for x in tensors(args, kwargs)}
        # What is neither a view nor written in place.
        new = [i for i, x in enumerate(tensors(result)) if x.untyped_storage().data_ptr() not in owned]
        self.operations.append((operation, args, kwargs or {}, tensors(result), new))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for operation, args, kwargs, recorded, new in self.operations:
                results = tensors(operation(*args, **kwargs))
                for i in new:
                    recorded[i].copy_(results[i])


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[CpuGraph]:
    """The recordings made in the test. Recording does not change weights or AdamW's state: it does not run anything."""
    made, optimizers = [], []
    initialise = torch.optim.AdamW.__init__

    def remember(optimizer: torch.optim.AdamW, *args, **kwargs) -> None:
        initialise(optimizer, *args, **kwargs)
        optimizers.append(optimizer)

    def record(run: Callable[[], Sequence[Tensor]], advice: str) -> tuple[Callable[[], None], Sequence[Tensor]]:
        own = [x for o in optimizers for x in tensors(list(o.state), [list(s.values()) for s in o.state.values()])]
        before = [x.detach().clone() for x in own]
        made.append(CpuGraph())
        with made[-1]:
            results = run()
        with torch.no_grad():
            for x, value in zip(own, before, strict=True):
                x.copy_(value)
        return made[-1].replay, results

    monkeypatch.setattr(torch.optim.AdamW, "__init__", remember)
    monkeypatch.setattr(cuda_graph, "record", record)
    monkeypatch.setattr(cuda_graph, "side_stream", nullcontext)
    monkeypatch.setattr(cuda_graph, "on_gpu", lambda device: True)
    return made


def batch(i: int) -> Batch:
    z_t, _, context = unet_inputs(batch=3)
    noise = torch.Generator().manual_seed(i)
    z_t, target = (torch.randn(z_t.shape, generator=noise) for _ in range(2))
    return Batch(z_t, torch.tensor([7, 400 + i, 990]), Conditioning(context * i), torch.rand(3, 1, 1, 1), target)


def test_the_batch_is_copied_into_the_recorded_tensors(recordings):
    """And every call returns tensors of its own."""
    recorded = []

    def update(given: Batch) -> tuple[Tensor, ...]:
        recorded.append(given)
        return (given.z_t * given.t.view(-1, 1, 1, 1) + given.cond.tokens.sum() * given.weight - given.target,)

    graph, batches = UpdateGraph(update, True), [batch(i) for i in range(WARM_UP + 4)]
    results = [graph(given)[0] for given in batches]
    assert len(recorded) == WARM_UP + 1 and len(recordings) == 1  # Python ran once more; then it was replayed
    assert all(given is own for given, own in zip(recorded, batches[:WARM_UP]))
    assert recorded[-1] is not batches[WARM_UP]
    for given, result in zip(batches, results):
        assert torch.equal(result, update(given)[0])


def test_a_forgotten_recording_is_made_again(recordings):
    weight = torch.ones(1)
    graph = UpdateGraph(lambda given: (given.z_t * weight,), True)
    for i in range(WARM_UP + 2):
        graph(batch(i))
    graph.forget()
    weight = torch.full((1,), 2.0)  # at another address, which the old recording does not know
    for i in range(WARM_UP + 2):
        assert torch.equal(graph(batch(i))[0], 2 * batch(i).z_t)
    assert len(recordings) == 2


def test_waiting_for_the_gpu_cannot_be_recorded(recordings):
    graph = UpdateGraph(lambda given: (given.z_t * given.t.float().mean().item(),), True)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        for i in range(WARM_UP + 1):
            graph(batch(i))


def test_the_learning_rate_is_read_at_each_replay(recordings):
    """A number would be recorded once, for all updates."""
    weights = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizers = [adamw([p], 0.1) for p in weights]

    def update(p: nn.Parameter, optimizer: torch.optim.Optimizer, given: Batch) -> tuple[Tensor, ...]:
        (p * given.z_t.sum()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return (p.detach(),)

    eager, recorded = (partial(update, *pair) for pair in zip(weights, optimizers))
    recorded = UpdateGraph(recorded, True)
    for i in range(WARM_UP + 5):
        for optimizer in optimizers:
            set_learning_rate(optimizer, 0.1 / (i + 1))
        assert torch.equal(eager(batch(i))[0], recorded(batch(i))[0])
    assert len(recordings) == 1


def test_a_checkpoint_of_a_cpu_continues_on_a_gpu(monkeypatch, tmp_path: Path):
    """With its moments. The kernels and the tensor of the learning rate are the GPU's."""
    p = nn.Parameter(torch.ones(3))
    cpu = adamw([p], 0.1)
    p.grad = torch.tensor([1.0, 2.0, 3.0])
    cpu.step()
    save_checkpoint(tmp_path, [p], cpu, [0.5], {})
    monkeypatch.setattr(cuda_graph, "on_gpu", lambda device: True)
    gpu = adamw([nn.Parameter(torch.zeros(3))], 0.2)
    (group,) = gpu.param_groups
    assert resume(tmp_path, group["params"], gpu, {}) == [0.5]
    (group,) = gpu.param_groups
    assert group["fused"] and group["capturable"] and torch.equal(group["lr"], torch.tensor(0.2))
    assert torch.equal(group["params"][0], p)
    for key, value in gpu.state[group["params"][0]].items():
        assert torch.equal(value, cpu.state[p][key])


RUNS = {
    "from trajectories": {},
    "in parts of two and one, with recomputation": dict(batch=3, accumulate=2, memory="low"),
    "teacher in the loop": dict(method="noised"),
    "full copy": dict(method="full"),
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_train_learns_the_same_from_recordings(changes: dict, recordings, command, flags, tmp_path: Path):
    """With a checkpoint, after which it is recorded anew, and a resumed run."""
    changes = changes | dict(steps=10, save_every=5)
    eager = flags(tmp_path / "eager", **changes)
    assert command("train.py", *eager, "--no-report", "--no-graph").code == 0 and not recordings
    run = flags(tmp_path / "recorded", **changes)
    assert command("train.py", *run, "--no-report").code == 0 and len(recordings) == 2
    checkpoints, others = (sorted((tmp_path / name / "checkpoints").iterdir()) for name in ("eager", "recorded"))
    for file, other in zip(checkpoints, others, strict=True):
        state, expected = (torch.load(f, weights_only=True) for f in (other, file))
        assert state["losses"] == expected["losses"]
        assert all(map(torch.equal, state["trained"], expected["trained"]))
        assert all(map(torch.equal, tensors(state["optimizer"]), tensors(expected["optimizer"])))
    others[-1].unlink()
    assert command("train.py", *run, "--no-report", "--resume").code == 0 and len(recordings) == 3
    assert others[-1].read_bytes() == checkpoints[-1].read_bytes()


def test_when_an_update_is_recorded():
    def possible(device: str = "cuda", world: int = 1, teacher: bool = False, interval: object = None, **flags) -> bool:
        args = Namespace(**dict(no_graph=False, compile=False, interval=interval) | flags)
        return can_record(args, Ranks(0, world), SimpleNamespace(asks_teacher=teacher), torch.device(device))

    assert possible() and possible(teacher=True) and possible(interval=(0, 9))
    assert not any([possible("cpu"), possible(world=2), possible(teacher=True, interval=(0, 9))])
    assert not possible(no_graph=True) and not possible(compile=True)
