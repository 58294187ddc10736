"""The kernel's benchmark as far as it goes without a GPU: layer shapes, ways to compute a layer, table."""

from itertools import product

import pytest
import torch
from tiny import TINY_UNET

from minidistill.bench import __main__ as bench
from minidistill.bench import kernel
from minidistill.bench.kernel import (
    PASSES,
    WAYS,
    WITHOUT_LORA,
    Layer,
    Shape,
    base,
    eager,
    error,
    layer_shapes,
    markdown,
)


def test_the_layers_of_sd15():
    shapes = layer_shapes()
    assert shapes[4096, 320, 320] == 5 * 8  # five attentions: q, k, v, out; q and out; 1x1 convolutions in and out
    assert shapes[77, 768, 1280] == 2 * 6 and shapes[1, 1280, 640] == 5
    assert shapes[4096, 320, 2560] == shapes[4096, 1280, 320] == 5  # the two feed-forward layers
    assert all(K % 8 == N % 8 == 0 for _, K, N in shapes)


def test_shapes_follow_the_batch():
    one, four = layer_shapes(TINY_UNET, batch=1, tokens=5), layer_shapes(TINY_UNET, batch=4, tokens=5)
    assert [(4 * M, K, N) for M, K, N in one] == list(four) and list(one.values()) == list(four.values())


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("name", [name for name in WAYS if name not in (*WITHOUT_LORA, "compile")])
def test_all_ways_compute_the_same(name: str, which: str):
    """Including the fused operator, which runs its reference here."""
    layer = Layer.random(Shape(30, 24, 16), 4, torch.float32, "cpu")
    expected = PASSES[which](eager, layer.double())()
    outputs = PASSES[which](WAYS[name], layer)()
    assert len(outputs) == (1 if which == "forward" else 4) and error(outputs, expected) < 1e-5


@pytest.mark.parametrize("which", PASSES)
def test_at_rank_0_the_kernel_is_the_base(which: str):
    layer = Layer.random(Shape(30, 24, 16), 0, torch.float32, "cpu")
    outputs, expected = PASSES[which](WAYS["r = 0"], layer)(), PASSES[which](base, layer.double())()
    assert error(outputs[:2], expected) < 1e-5 and all(gradient.numel() == 0 for gradient in outputs[2:])


def test_expected_values_use_the_same_rounded_numbers():
    """A and B too are rounded to the dtype that every way computes in."""
    layer = Layer.random(Shape(30, 24, 16), 4, torch.bfloat16, "cpu")
    for x, wide in zip(layer[:5], layer.double()[:5]):
        assert wide.dtype == torch.float64 and torch.equal(x.to(torch.bfloat16).double(), wide)


def test_measure_times_every_way(monkeypatch: pytest.MonkeyPatch):
    """In both passes, with and without a CUDA graph. "r = 0" gets a layer of rank 0, so it computes the base."""
    monkeypatch.setattr(kernel, "seconds", lambda run, repeats, in_graph: run()[0])
    rows = kernel.measure(Shape(30, 24, 16), 4, torch.float32, repeats=1, compiled=False, device="cpu")
    assert [(row["pass"], row["graph"]) for row in rows] == list(product(PASSES, (False, True)))
    for row in rows:
        assert set(row["seconds"]) == set(WAYS) - {"compile"}
        assert set(row["errors"]) == set(WAYS) - {"compile", *WITHOUT_LORA}
        outputs = row["seconds"]
        assert error([outputs["r = 0"]], [outputs["base"]]) < 1e-5 < error([outputs["fused"]], [outputs["base"]])


def test_table():
    times = {"base": 1e-6, "addmm": 3e-6, "fused": 2e-6}
    row = {"M": 64, "K": 32, "N": 16, "rank": 4, "seconds": times, "errors": {"fused": 1e-3, "addmm": 2e-3}}
    rows = [row | {"pass": which, "graph": graph} for which in PASSES for graph in (False, True)]
    text = markdown(rows)
    assert text.count("| 64 x 32 -> 16 | 4 | 1.0 | 3.0 | **2.0** | 1.0e-03 | 2.0e-03 |\n") == 4
    assert "Forward and backward, in a CUDA graph, microseconds:" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(ValueError, match="the kernel cannot be measured here: .*CUDA"):
        bench.main(["kernel"])
