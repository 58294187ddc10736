"""Runs the source of the CUDA kernel on a CPU (emulation/): it agrees with float64, and planted faults are noticed."""

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random

import pytest
import torch
from tiny import ROOT
from torch import Tensor

CSRC, EMULATION = ROOT / "minidistill/kernels/csrc", ROOT / "tests/kernels/emulation"
EXPERIMENTS = ROOT / "tests/gpu/experiments"
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++, to run the kernel on a CPU")

DELIVERIES = ("at once", "late", "at random")  # when asynchronous copies arrive


class Operands(ctypes.Structure):
    """csrc/launch.h"""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "W", "b", "A", "B", "y", "t")),
        *((name, ctypes.c_int) for name in ("M", "N", "K", "rank", "x_stride")),
        ("scale", ctypes.c_float),
        ("bfloat16", ctypes.c_bool),
        ("transposed", ctypes.c_bool),
    ]


@dataclass(frozen=True)
class Plan:
    """The template arguments of a kernel that csrc/lora_gemm.cu launches."""

    dtype: torch.dtype
    BM: int
    BN: int
    R: int
    transposed: bool
    sm90: bool = False

    def __str__(self) -> str:
        """The C++ name of this plan."""
        name = "PlanSm90" if self.sm90 else "Plan"
        dtype = "BFloat16" if self.dtype == torch.bfloat16 else "Float16"
        sizes = [] if self.sm90 else [self.BM, self.BN]
        return f"{name}<{', '.join(map(str, [dtype, *sizes, self.R, str(self.transposed).lower()]))}>"

    @property
    def source(self) -> str:
        return "lora_gemm_sm90.h" if self.sm90 else "lora_gemm.h"


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    """``emulated(plan)`` compiles the kernel to a C function.

    Before that ``experiment`` applies a patch, and ``fault=(right, wrong)`` edits its source.
    """
    built: dict[tuple, ctypes.CDLL] = {}

    def build(plan: Plan, fault: tuple[str, str] | None = None, experiment: str | None = None) -> ctypes.CDLL:
        if (plan, fault, experiment) not in built:
            folder = tmp_path_factory.mktemp("emulation")
            shutil.copytree(CSRC, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("primitives*"))
            if experiment:
                apply = ["git", "apply", "-p4", "--exclude=*primitives*", EXPERIMENTS / f"{experiment}.patch"]
                subprocess.run(apply, cwd=folder, check=True)
            if fault:
                source = (folder / plan.source).read_text()
                assert source.count(fault[0]) == 1, f"{fault[0]!r} does not occur once in {plan.source}"
                (folder / plan.source).write_text(source.replace(*fault))
            flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-DPLAN=" + str(plan)]
            flags += ["-DSM90"] if plan.sm90 else []
            command = [COMPILER, *flags, f"-I{EMULATION}", f"-I{folder}", str(EMULATION / "lora_gemm.cpp")]
            subprocess.run([*command, "-o", str(folder / "kernel.so")], check=True)
            library = ctypes.CDLL(str(folder / "kernel.so"))
            library.run.restype = ctypes.c_char_p
            built[plan, fault, experiment] = library
        return built[plan, fault, experiment]

    return build


@dataclass
class Outcome:
    error: str
    conflicts: int
    y: Tensor
    t: Tensor
    expected_y: Tensor  # in float64, from t as the kernel rounded it
    expected_t: Tensor

    def mistake(self, dtype: torch.dtype) -> str:
        """The first mistake, or an empty string."""
        if self.error:
            return self.error
        if self.conflicts:
            return f"{self.conflicts} bank conflicts"
        for actual, expected in ((self.t, self.expected_t), (self.y, self.expected_y)):
            # One rounding of the result; the rounding of float32 sums is negligible.
            error = (actual.double() - expected).abs().max() / expected.abs().max() if actual.numel() else 0
            if not error <= torch.finfo(dtype).eps / 2 * 1.01:
                return f"off by {error:.1e} of the largest value"
        return ""


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    rank: int
    seed: int = 1
    delivery: str = "at random"
    bias: bool = True


def random_case(plan: Plan, seed: int) -> Case:
    """One to four blocks, most of them partly outside y, and a K that is seldom a multiple of the slab."""
    dice = Random(f"{plan}{seed}")
    M, N = dice.randrange(1, 2 * plan.BM), 8 * dice.randrange(1, plan.BN // 4)
    K, rank = 8 * dice.randrange(1, 25), dice.randrange(plan.R // 2 + 1 if plan.R > 16 else 1, plan.R + 1)
    return Case(M, N, K, rank, seed, DELIVERIES[seed % 3], bias=dice.random() < 0.7)


def run(library: ctypes.CDLL, plan: Plan, case: Case) -> Outcome:
    """Run one case. The padding between rows of x, and the initial values of the outputs, are NaN."""
    M, N, K, rank, seed = case.M, case.N, case.K, case.rank, case.seed
    generator = torch.Generator().manual_seed(seed)

    def array(*shape: int, dtype: torch.dtype, stride: int | None = None) -> Tensor:
        padded = torch.full((shape[0], stride or shape[-1]), torch.nan, dtype=dtype)
        padded[:, : shape[-1]] = torch.randn(shape, generator=generator)
        return padded[:, : shape[-1]]

    def weights(out: int, into: int, dtype: torch.dtype) -> Tensor:
        return array(into, out, dtype=dtype) if plan.transposed else array(out, into, dtype=dtype)

    stride = K + 8 * (seed % 3)
    x, W, b = array(M, K, dtype=plan.dtype, stride=stride), weights(N, K, plan.dtype), array(1, N, dtype=plan.dtype)
    A, B, scale = weights(rank, K, torch.float32), weights(N, rank, torch.float32), 0.75 / K**0.5
    y, t = (torch.full((M, n), torch.nan, dtype=plan.dtype) for n in (N, rank))
    tensors = [x, W, b if case.bias else torch.empty(1, 0), A, B, y, t]
    pointers = [i.data_ptr() for i in tensors]  # of an empty tensor: null
    sizes = [((len(i) - 1) * i.stride(0) + i.shape[1]) * i.itemsize if i.numel() else 0 for i in tensors]
    operands = Operands(*pointers, M, N, K, rank, stride, scale, plan.dtype == torch.bfloat16, plan.transposed)
    conflicts = ctypes.c_long()
    error = library.run(
        ctypes.byref(operands),
        (ctypes.c_int64 * 7)(*sizes),
        DELIVERIES.index(case.delivery),
        seed,
        ctypes.byref(conflicts),
    )

    W, A, B = (m.T if plan.transposed else m for m in (W, A, B))
    A, B = (m.to(plan.dtype).double() for m in (A, B))  # rounded on load
    expected_t = scale * (x.double() @ A.T)
    expected_y = x.double() @ W.double().T + t.double() @ B.T + (b.double() if case.bias else 0)
    return Outcome(error.decode(), conflicts.value, y, t, expected_y, expected_t)


BF16, FP16 = torch.bfloat16, torch.float16
CHOICES = list(product((BF16, FP16), (16, 32, 64, 128), (False, True)))  # dtype, R, transposed
SM90 = [Plan(dtype, 128, 160, *more, sm90=True) for dtype, *more in CHOICES]
PLANS = [Plan(dtype, *block, *more) for block in ((128, 160), (64, 64)) for dtype, *more in CHOICES] + SM90
USUAL = [
    Plan(BF16, 64, 64, 16, False),
    Plan(BF16, 128, 160, 16, False, sm90=True),
    Plan(FP16, 128, 160, 128, True, sm90=True),
    Plan(FP16, 64, 64, 128, True),
    Plan(FP16, 128, 160, 16, False),
    Plan(BF16, 128, 160, 64, True),
]


def test_plans_are_those_of_the_launcher():
    source = (CSRC / "lora_gemm.cu").read_text()
    assert "Plan<Element, 128, 160, R, TRANSPOSED>" in source and "Plan<Element, 64, 64, R, TRANSPOSED>" in source
    assert "PlanSm90<Element, R, TRANSPOSED>" in source and source.count("Plan") == 3
    assert set(USUAL) < set(PLANS) and len(PLANS) == 32 + 16


def with_slow(every: Iterable, usual: list) -> list:
    """Parameters of a test: ``every``, all but the ``usual`` ones slow."""
    return [pytest.param(x, marks=[] if x in usual else pytest.mark.slow) for x in every]


@pytest.mark.parametrize("plan", with_slow(PLANS, USUAL), ids=str)
def test_agrees_with_float64(plan: Plan, emulated):
    cases = [Case(plan.BM, plan.BN, 64, plan.R), *(random_case(plan, seed) for seed in range(6))]
    cases += [Case(plan.BM - 3, plan.BN, 72, rank=0)] if plan.R == 16 else []
    for case in cases:
        assert not run(emulated(plan), plan, case).mistake(plan.dtype), case


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_agrees_with_float64_on_many_shapes(plan: Plan, emulated):
    for case in (random_case(plan, seed) for seed in range(6, 60)):
        assert not run(emulated(plan), plan, case).mistake(plan.dtype), case


# The emulation has to notice these faults. Each takes seconds to compile: all but two of each kernel are slow tests.
FAULTS = {
    "too short a wait": ("cp_async_wait<STAGES - 2>();", "cp_async_wait<STAGES - 1>();"),
    "no barrier before a slab": ("sync_threads();               // so have", "// so have"),
    "a slab copied over the one in use": ("next = slab + STAGES - 1", "next = slab + STAGES"),
    "no swizzle": ("column / 8 ^ row / (8 / PERIOD) % PERIOD", "column / 8"),
    "x read beyond its rows": ("return row < rows && column < columns;", "return row <= rows && column < columns;"),
    "halves of a fragment exchanged": ("x.at(row + i * 16 + lane % 16, k", "x.at(row + i * 16 + (lane ^ 8) % 16, k"),
    "no commit": ("        cp_async_commit();\n", ""),
    "no barrier after the last slab": ("    sync_threads();  // all threads are done with the slabs\n", ""),
    "no barrier before t is read": ("t_row, 0);\n    sync_threads();\n", "t_row, 0);\n"),
    "no barrier before y takes t's place": ("    sync_threads();\n\n    round_into", "    round_into"),
    "no barrier before y is read": ("y_sum, row, column);\n    sync_threads();\n", "y_sum, row, column);\n"),
    "A of the wrong slab": ("weights(0, next * BK)", "weights(0, slab * BK)"),
    "A stored into the slab in use": ("(i, block.a_tile(next), a_next[i])", "(i, block.a_tile(slab), a_next[i])"),
    "no scale": ("    scale(t_sum, p.scale);\n", ""),
    "a swizzle of half the period": ("row / (8 / PERIOD) % PERIOD", "row / (8 / PERIOD) % (PERIOD / 2)"),
    "x's stride ignored": ("(row * stride + column)", "(row * columns + column)"),
    "y read beyond its columns": ("&& column < columns; }", "&& column <= columns; }"),
    "the neighbour's b": ("thread_index() % 4 * 2 + i % 2;\n", "thread_index() % 4 * 2;\n"),
    "columns of a fragment exchanged": ("sum[i][j], a[i], b[0], b[1]", "sum[i][j], a[i], b[0], b[2]"),
    "t of the first rows only": ("if (n == 0)", "if (m == 0)"),
    "t not stored completely": ("i < ROWS * COLUMNS; i +=", "i < ROWS * COLUMNS - THREADS; i +="),
    "y's lower eight rows stored over the upper": ("tile.at(r + 8, c), pack", "tile.at(r, c), pack"),
}
WAIT = "        fence_proxy_async();\n        wgmma_wait(y_sum[0], t_sum[0]);\n"
SM90_FAULTS = {
    "no wait for the copy engine": ("mbarrier_wait(arrived(slab), slab / STAGES % 2);", ""),
    "no wait for the products": (WAIT, "        fence_proxy_async();\n"),
    "A stored without a proxy fence": (WAIT, WAIT.replace("fence_proxy_async();", "")),
    "panels too close together": ("Panel::SIZE * 2);", "Panel::SIZE);"),
    "a wait for the wrong phase": ("slab / STAGES % 2", "slab % 2"),
    "too few bytes announced": ("2 * (P::X::SIZE + P::W::SIZE)", "2 * P::X::SIZE"),
    "no barrier before a slab": ("sync_threads();  // so has A,", "// so has A,"),
    "a slab copied over the one in use": ("next = slab + STAGES - 1", "next = slab + STAGES"),
    "no swizzle": (".at(row, column % WIDTH)", ".data + row * WIDTH + column % WIDTH"),
    "panels that do not divide the matrix": ("COLUMNS % 32 == 0 ? 32", "COLUMNS % 32 == 0 ? 64"),
    "both warpgroups compute the same rows": ("group_row = warp / 4 * 64", "group_row = 0"),
    "no fence before the slabs": ("    fence_proxy_async();\n\n", "\n"),
    "no wgmma.fence before the slabs": ("        wgmma_fence(y_sum[0], t_sum[0]);\n", ""),
    "no commit": ("        wgmma_commit();\n", ""),
    "t's columns exchanged": ("k * 2 + i / 2]", "k * 2 + i % 2]"),
    "barriers not initialised": ("mbarrier_init(arrived(stage));", ""),
    "one barrier too few": ("stage < STAGES; ++stage", "stage < STAGES - 1; ++stage"),
    "no sync after initialising the barriers": ("(arrived(stage));\n    sync_threads();\n", "(arrived(stage));\n"),
    "y over the last slab": ("    sync_threads();  // all threads are done with the slabs\n", ""),
    "no wgmma.fence before the last product": ("    wgmma_fence(y_sum[0], t);\n", ""),
    "no wait for the last product": ("    wgmma_wait(y_sum[0], t);\n", ""),
    "y over t": ("block.t_tile());\n        sync_threads();\n", "block.t_tile());\n"),
}


def notices(library: ctypes.CDLL, plan: Plan) -> bool:
    """True if any of a few cases goes wrong."""
    # Enough blocks and slabs to reveal mistakes in synchronisation; then edges, to reveal reads beyond them.
    cases = [Case(150, 136, 232, 16, 0, delivery) for delivery in DELIVERIES] + [Case(65, 72, 136, 5)]
    return any(run(library, plan, case).mistake(plan.dtype) for case in cases)


@pytest.mark.parametrize("fault", with_slow(FAULTS, list(FAULTS)[:2]))
def test_notices(fault: str, emulated):
    plan = Plan(BF16, 64, 64, 16, False)
    assert notices(emulated(plan, FAULTS[fault]), plan)


@pytest.mark.parametrize("fault", with_slow(SM90_FAULTS, list(SM90_FAULTS)[:2]))
def test_notices_on_hopper(fault: str, emulated):
    plan = Plan(BF16, 128, 160, 16, True, sm90=True)
    assert notices(emulated(plan, SM90_FAULTS[fault]), plan)


# The experiments of tests/gpu: the plans that each changes, and a fault that would go with it.
EXPERIMENT_PLANS = {
    "earlier-a": [plan for plan in PLANS if plan.dtype == BF16],
    "fewer-branches": [plan for plan in PLANS if plan.dtype == BF16],
    "longer-slabs": [plan for plan in PLANS if plan.BM == 64],
    "two-stages": [plan for plan in SM90 if plan.R == 16],
    "wider-wgmma": [plan for plan in SM90 if plan.R <= 64 and not plan.transposed],
}
EXPERIMENT_FAULTS = {
    "earlier-a": ("load_a(next + 1);", "load_a(next);"),
    "fewer-branches": ("r >= ROWS) break;", "r > ROWS) break;"),
    "longer-slabs": ("cp_async_wait<STAGES - 2>();", "cp_async_wait<STAGES - 1>();"),
    "two-stages": ("slab / STAGES % 2", "slab / 3 % 2"),
    "wider-wgmma": ("(sum[0][BN / 8])", "(sum[0][BN / 8 - 1])"),
}


@pytest.mark.parametrize(
    "experiment, plan",
    [
        pytest.param(experiment, plan, marks=[pytest.mark.slow] if plan != some[0] else [])
        for experiment, some in EXPERIMENT_PLANS.items()
        for plan in some
    ],
    ids=str,
)
def test_experiments_agree_with_float64(experiment: str, plan: Plan, emulated):
    library = emulated(plan, experiment=experiment)
    for case in [Case(plan.BM + 3, plan.BN, 520, plan.R), *(random_case(plan, seed) for seed in range(6))]:
        assert not run(library, plan, case).mistake(plan.dtype), case


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENT_FAULTS)
def test_notices_in_experiments(experiment: str, emulated):
    plan = EXPERIMENT_PLANS[experiment][0]
    assert notices(emulated(plan, EXPERIMENT_FAULTS[experiment], experiment), plan)


def test_every_experiment_is_tested():
    assert sorted(EXPERIMENT_PLANS) == sorted(path.stem for path in EXPERIMENTS.glob("*.patch"))


# The binding and the launcher, which emulation/whole.py builds and runs in a separate process.
NINJA = pytest.mark.skipif(shutil.which("ninja") is None, reason="needs ninja")
FAULTS_AROUND = {
    "x's stride ignored": ("binding.cpp", "<unsigned>(stride)", "<unsigned>(K)"),
    "A and B not exchanged for dx": (
        "binding.cpp",
        "std::nullopt, B, A, scale, true",
        "std::nullopt, A, B, scale, true",
    ),
    "unaligned rows not copied": ("binding.cpp", "|| !aligned(rows)) rows", ") rows"),
    "W's boxes with x's size": (
        "lora_gemm.cu",
        "make_tensor_map<typename P::W>(&w_map",
        "make_tensor_map<typename P::X>(&w_map",
    ),
    "no extra shared memory requested": (
        "lora_gemm.cu",
        "= allow_shared_memory<P>(kernel, target.device)",
        "= cudaSuccess",
    ),
}


@pytest.mark.slow
@NINJA
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_the_whole_operator(target: str, tmp_path: Path):
    """Binding, launcher and gradient, from their own sources."""
    subprocess.run([sys.executable, str(EMULATION / "whole.py"), str(tmp_path), target], check=True)


@pytest.mark.slow
@NINJA
@pytest.mark.parametrize("fault", FAULTS_AROUND)
def test_notices_around_the_kernels(fault: str, tmp_path: Path):
    command = [sys.executable, str(EMULATION / "whole.py"), str(tmp_path), "sm_90a", *FAULTS_AROUND[fault]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "built" in done.stdout, done.stderr
