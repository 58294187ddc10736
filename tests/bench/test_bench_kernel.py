"""The kernel's benchmark, as far as it goes without a GPU: shapes, contestants, arithmetic, table."""

import pytest
import torch
from tiny import TINY_UNET

from minidistill.bench import kernel as bench_kernel
from minidistill.bench import speed as bench
from minidistill.bench.kernel import CONTESTANTS, PASSES, Layer, Shape, base, cost, eager, error, layer_shapes, markdown
from minidistill.kernels.dispatch import Region, fits
from minidistill.kernels.measured import WITHOUT_PAIR, best_region, chosen, verdict


def test_the_layers_of_sd15():
    shapes = layer_shapes()
    assert shapes[4096, 320, 320] == 5 * 8  # of five attentions: q, k, v and out, then q and out; 1x1 in and out
    assert shapes[77, 768, 1280] == 2 * 6 and shapes[1, 1280, 640] == 5
    assert shapes[4096, 320, 2560] == shapes[4096, 1280, 320] == 5  # the feed-forward's two
    assert all(K % 8 == N % 8 == 0 for _, K, N in shapes)


def test_shapes_follow_the_batch():
    one, four = layer_shapes(TINY_UNET, batch=1, tokens=5), layer_shapes(TINY_UNET, batch=4, tokens=5)
    assert [(4 * M, K, N) for M, K, N in one] == list(four) and list(one.values()) == list(four.values())


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("name", [name for name in CONTESTANTS if name not in (*WITHOUT_PAIR, "compile")])
def test_contestants_compute_the_same(name: str, which: str):
    """Also the fused operator, here by its reference."""
    layer = Layer.random(Shape(30, 24, 16), 4, torch.float32, "cpu")
    expected = PASSES[which](eager, layer.double())()
    found = PASSES[which](CONTESTANTS[name], layer)()
    assert len(found) == (1 if which == "forward" else 4) and error(found, expected) < 1e-5


@pytest.mark.parametrize("which", PASSES)
def test_without_a_pair_the_kernel_is_the_base(which: str):
    layer = Layer.random(Shape(30, 24, 16), 0, torch.float32, "cpu")
    found, expected = PASSES[which](CONTESTANTS["r = 0"], layer)(), PASSES[which](base, layer.double())()
    assert error(found[:2], expected) < 1e-5 and all(gradient.numel() == 0 for gradient in found[2:])


def test_cost():
    M, K, N, r = 10, 24, 16, 4
    operations, moved = cost(Shape(M, K, N), r, "forward")
    assert operations == 2 * M * (K * N + r * K + r * N) and moved == 2 * (M * K + N * K + M * N) + 4 * r * (K + N)
    assert cost(Shape(M, K, N), r, "forward and backward")[0] == 2 * M * (2 * K * N + 3 * r * (K + N))


def test_table():
    times = {"base": 1e-6, "addmm": 3e-6, "fused": 2e-6}
    row = {"M": 64, "K": 32, "N": 16, "rank": 4, "seconds": times, "errors": {"fused": 1e-3, "addmm": 2e-3}}
    row |= {"tflops": {"fused": 12.3}, "of_roofline": {"fused": 0.5}, "dispatched": "addmm"}
    rows = [row | {"pass": which, "graph": graph} for which in PASSES for graph in (False, True)]
    text = markdown(rows)
    assert text.count("| 64 x 32 -> 16 | 4 | 1.0 | 3.0 | **2.0** | addmm | 12 | 0.50 | 1.0e-03 | 2.0e-03 |\n") == 4
    assert "Forward and backward, in a CUDA graph, microseconds:" in text


def timed(M: int, K: int, N: int, rank: int, which: str, graph: bool, **microseconds: float) -> dict:
    """A row as if it were measured."""
    times = {"base": 1, "r = 0": 1.25, "eager": 6, "addmm": 3, "merge": 2.5} | microseconds
    row = {"M": M, "K": K, "N": N, "rank": rank, "pass": which, "graph": graph}
    return row | {"seconds": {name: 1e-6 * time for name, time in times.items()}}


def a_card() -> list[dict]:
    """On which the kernel wins up to 640 columns and loses beyond."""
    layers = [((4096, 320, 320), 2), ((4096, 640, 640), 2), ((4096, 2560, 640), 5)]
    return [
        timed(*layer, rank, which, graph, fused=time)
        for layer, time in layers
        for rank in (16, 64)
        for which in PASSES
        for graph in (False, True)
    ]


def test_the_region_that_belongs_into_the_table():
    rows = a_card()
    assert best_region(rows) == Region(640, 640, 64)
    assert best_region([row for row in rows if row["K"] > 640]) == Region(0, 0, 0)
    # A layer of the same width at which the kernel loses costs less inside than the others would outside.
    slower, much_slower = (timed(64, 640, 640, 16, "forward", True, fused=time) for time in (3.3, 30))
    assert best_region([*rows, slower]) == Region(640, 640, 64)
    assert best_region([*rows, much_slower]) == Region(320, 320, 64)


def test_the_dispatcher_chooses_what_the_bench_says():
    region = Region(640, 640, 16)
    for row in a_card():
        M, K, N, rank = (row[name] for name in ("M", "K", "N", "rank"))
        x, W, A = (torch.empty(size, dtype=torch.bfloat16) for size in ((M, K), (N, K), (rank, K)))
        assert (chosen(region, row) == "fused") == fits(region, x, W, A)
    assert chosen(None, row) == "eager"  # lora.py's lines


def test_verdict():
    said = verdict(a_card(), None, (9, 0))
    assert (
        "no region, plain PyTorch: at worst 0.33 of the faster of fused and addmm (4096 x 320 -> 320, rank 16" in said
    )
    assert "dispatch.FASTER, (9, 0): Region(K=640, N=640, rank=64): at worst 1.00 of the faster" in said
    assert (
        "r = 0, large layers, forward, in a CUDA graph: at worst 0.80 times as fast as base; the target is 0.80" in said
    )
    assert "one by one: at worst 1.25 times as fast as merge; the target is 1.30: missed." in said
    assert "not the fastest in 8 of 24 rows:\n  0.50 of merge: 4096 x 2560 -> 640, rank 16, forward, launched" in said
    assert said.count("of merge: 4096 x 2560 -> 640") == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(ValueError, match="there is nothing to measure: .*CUDA"):
        bench.main(["kernel"])
    assert bench_kernel.STUDY[0] == (64, 1280, 1280)
