"""conditioning.py: a batch of prompts that can be selected from, expanded, moved and joined like a tensor."""

import pytest
import torch
from tiny import randn, tiny_student, tiny_unet, unet_inputs
from torch import Tensor

from minidistill.conditioning import Conditioning, cat


@pytest.fixture(params=["tokens alone", "with pooled and sizes"])
def cond(request: pytest.FixtureRequest) -> Conditioning:
    """Four prompts. The sizes are odd numbers above 1000, which bfloat16 lacks."""
    more = () if request.param == "tokens alone" else (randn(4, 7, seed=1), 1001 + 2 * torch.arange(24).view(4, 6))
    return Conditioning(randn(4, 5, 32), *more)


def tensors(cond: Conditioning) -> list[Tensor]:
    return [x for x in (cond.tokens, cond.pooled, cond.sizes) if x is not None]


def assert_is(cond: Conditioning, expected: list[Tensor]) -> None:
    for own, x in zip(tensors(cond), expected, strict=True):
        assert torch.equal(own, x) and own.dtype == x.dtype


def test_its_length_is_the_number_of_prompts(cond: Conditioning):
    assert len(cond) == 4


@pytest.mark.parametrize(
    "index",
    [slice(2), slice(1, 3), slice(None, None, 2), torch.tensor([3, 0, 3]), torch.tensor([True, False, True, False])],
    ids=str,
)
def test_a_slice_or_an_index_tensor_selects_prompts(index, cond: Conditioning):
    assert_is(cond[index], [x[index] for x in tensors(cond)])


def test_expand_repeats_one_prompt_without_copying(cond: Conditioning):
    three = cond[:1].expand(3)
    assert len(three) == 3
    for own, one in zip(tensors(three), tensors(cond), strict=True):
        assert own.shape == (3, *one.shape[1:]) and own.data_ptr() == one.data_ptr()
        assert all(torch.equal(x, one[0]) for x in own)


def test_to_takes_what_a_tensor_takes(cond: Conditioning):
    for how in (dict(dtype=torch.bfloat16), dict(device="cpu", dtype=torch.float64), dict(device="meta")):
        moved = cond.to(**how)
        for own, before in zip(tensors(moved), tensors(cond), strict=True):
            expected = before.to(**how) if before.is_floating_point() else before.to(how.get("device"))
            assert (own.dtype, own.device) == (expected.dtype, expected.device)
            assert own.is_meta or torch.equal(own, expected)
    assert_is(cond.to("cpu"), tensors(cond))


def test_cat_joins_along_the_batch(cond: Conditioning):
    other = cond.map(lambda x: x + 1)[:2]
    assert_is(cat([cond, other]), [torch.cat(both) for both in zip(tensors(cond), tensors(other), strict=True)])
    assert torch.equal(cat([cond.tokens, other.tokens]), torch.cat([cond.tokens, other.tokens]))


def test_it_cannot_be_changed(cond: Conditioning):
    with pytest.raises(AttributeError):
        cond.tokens = cond.tokens[:1]


def test_the_unet_takes_a_conditioning_or_a_bare_tensor():
    z_t, t, tokens = unet_inputs()
    unet, student = tiny_unet(), tiny_student()
    with torch.no_grad():
        assert torch.equal(unet(z_t, t, Conditioning(tokens)), unet(z_t, t, tokens))
        for enabled in (False, True):
            bare = student(z_t, t, tokens, lora_enabled=enabled)
            assert torch.equal(student(z_t, t, Conditioning(tokens), lora_enabled=enabled), bare)
        assert not torch.equal(unet(z_t, t, Conditioning(tokens.flip(0))), unet(z_t, t, tokens))
