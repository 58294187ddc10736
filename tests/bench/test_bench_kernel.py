"""The kernel's benchmark, as far as it goes without a GPU: shapes, contestants, arithmetic, table."""

import pytest
import torch
from tiny import TINY_UNET

from minidistill.bench import kernel as bench_kernel
from minidistill.bench import speed as bench
from minidistill.bench.kernel import (
    CONTESTANTS,
    PASSES,
    WITHOUT_PAIR,
    Layer,
    Shape,
    base,
    cost,
    eager,
    error,
    layer_shapes,
    markdown,
)


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
    row |= {"tflops": {"fused": 12.3}, "of_roofline": {"fused": 0.5}}
    rows = [row | {"pass": which, "graph": graph} for which in PASSES for graph in (False, True)]
    text = markdown(rows)
    assert text.count("| 64 x 32 -> 16 | 4 | 1.0 | 3.0 | **2.0** | 12 | 0.50 | 1.0e-03 | 2.0e-03 |\n") == 4
    assert "Forward and backward, in a CUDA graph, microseconds:" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(ValueError, match="there is nothing to measure: .*CUDA"):
        bench.main(["kernel"])
    assert bench_kernel.STUDY[0] == (64, 1280, 1280)
