"""Sticky scales: their rule, an amax that wavers, what they cost, what is refused."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.quant import (
    NonFiniteWeightError,
    QuantFormatError,
    QuantizedTensor,
    dequantize_blockwise,
    empty_quantized,
    measure_error,
    quantize_blockwise,
)
from fp8rl.quant.chunked import chunked_cast
from fp8rl.quant.reference import reference_cast

from . import oracle
from .refusal import refusal
from .samples import assert_same, codes, quantize, spread


def previous_like(scale_inv: torch.Tensor, seed: int) -> torch.Tensor:
    """Scales from an eighth to eight times as large, as if the weight had been another."""
    shift = np.random.default_rng(seed).integers(-3, 4, scale_inv.shape)
    return (scale_inv * torch.from_numpy(2.0**shift).float()).clamp(2.0**-126, 2.0**127)


def test_the_rule_as_a_table():
    """One block with amax 448, whose fresh scale is 1.0."""
    x = torch.tensor([[448.0, 3.0]])
    kept = {2.0**k: 1.0 for k in range(-126, 128)} | {2.0: 2.0}
    for previous, expected in kept.items():
        q = quantize(x, previous_scale_inv=torch.tensor([[previous]]))
        assert q.scale_inv.tolist() == [[expected]]
        assert dequantize_blockwise(q).tolist() == [[448.0, 3.0]]
    zeros = quantize(torch.zeros(1, 2), previous_scale_inv=torch.tensor([[2.0]]))
    assert zeros.scale_inv.tolist() == [[1.0]]


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    low=st.floats(-150, 126),
    seed=st.integers(0, 2**32),
)
def test_each_block_keeps_its_scale_where_it_is_the_fresh_one_or_twice_that(shape, low, seed):
    x = spread(shape, seed, low, min(low + 9, 127.99))
    fresh = quantize(x, block_size=(16, 16))
    previous = previous_like(fresh.scale_inv, seed)
    found = quantize(x, block_size=(16, 16), previous_scale_inv=previous)
    for i, j in np.ndindex(*found.scale_inv.shape):
        block = x[16 * i : 16 * i + 16, 16 * j : 16 * j + 16].numpy()
        amax, had, has = (
            float(np.abs(block).max()),
            float(previous[i, j]),
            float(found.scale_inv[i, j]),
        )
        fits, in_reach = amax <= 448 * had, amax > 448 * had / 4
        smallest = max(oracle.pow2_scale_inv(amax), 2.0**-126)
        near = fits and (in_reach or had <= 2 * smallest) and amax > 0
        assert has == (had if near else 1.0 if amax == 0 else smallest)
        part = codes(found)[16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
        assert np.array_equal(part, oracle.e4m3_codes(block.astype(np.float64) / has))


@settings(max_examples=100, deadline=None)
@given(
    lead=st.sampled_from([(), (3,)]),
    rows=st.integers(1, 50),
    columns=st.integers(1, 50),
    block_size=st.sampled_from([(16, 16), (1, 16), (5, 7)]),
    seed=st.integers(0, 2**32),
)
def test_the_chunked_cast_is_the_reference_and_settles(lead, rows, columns, block_size, seed):
    x = spread((*lead, rows, columns), seed, -10, 10)
    previous = previous_like(quantize(x, block_size=block_size).scale_inv, seed)
    data, scale_inv = reference_cast(x, block_size, "pow2", previous)
    expected = QuantizedTensor(data, scale_inv, block_size, "pow2")
    out = empty_quantized(x.shape, block_size=block_size)
    out.scale_inv.copy_(previous)
    chunked_cast(x, out, sticky=True)
    assert_same(out, expected)
    again = quantize(x, block_size=block_size, previous_scale_inv=scale_inv)
    assert_same(again, expected)
    in_place = quantize(x, block_size=block_size, previous_scale_inv=out.scale_inv, out=out)
    assert in_place is out
    assert_same(out, expected)


def test_a_weight_that_wavers_at_the_edge_of_a_binade_rewrites_what_changed_and_no_more():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=generator) * 0.02
    edge = 448 * 2.0**-12  # 0.109, above every other weight
    versions = []
    for largest in (0.999 * edge, 1.01 * edge, 0.999 * edge, 1.01 * edge):
        versions.append(weight.clone())
        versions[-1][3, 200] = largest
    fresh = [quantize(x) for x in versions]
    sticky = [fresh[0]]
    for x in versions[1:]:
        sticky.append(quantize(x, previous_scale_inv=sticky[-1].scale_inv))
    rewritten = [int((codes(a) != codes(b)).sum()) for a, b in pairwise(fresh)]
    assert min(rewritten) > 0.99 * 128 * 128
    scales = [q.scale_inv[0, 1].item() for q in sticky]
    assert scales == [2.0**-12, 2.0**-11, 2.0**-11, 2.0**-11]
    for a, b in pairwise(sticky[1:]):
        different = (codes(a) != codes(b)).nonzero()
        assert [index.tolist() for index in different] in ([[3], [200]], [[], []])
        assert torch.equal(a.scale_inv, b.scale_inv)


@pytest.mark.parametrize(
    ("outlier", "fresh_error", "sticky_error"),
    [(0, 0.0265, 0.0265), (2**12, 0.0266, 0.0275), (2**14, 0.0330, 0.0565)],
)
def test_what_a_binade_above_the_fresh_scale_costs(outlier, fresh_error, sticky_error):
    """Every block at twice its fresh scale, the most that there is; one outlier in each block."""
    x = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)) * 0.02
    others = torch.ones_like(x, dtype=torch.bool)
    others[::128, ::128] = False
    x[~others] += 0.02 * outlier
    fresh = quantize(x)
    sticky = quantize(x, previous_scale_inv=2 * fresh.scale_inv)
    assert torch.equal(sticky.scale_inv, 2 * fresh.scale_inv)
    for q, expected in ((fresh, fresh_error), (sticky, sticky_error)):
        found = measure_error(x[others], dequantize_blockwise(q, torch.float32)[others])
        assert found.relative_rms == pytest.approx(expected, rel=0.01)


def test_previous_scales_that_cannot_be_are_refused():
    x = torch.ones(40, 300)
    good = quantize(x).scale_inv
    for previous, options, message in [
        (good[:, :2], {}, r"w: previous scales .*\(1, 2\).*expected .*\(1, 3\)"),
        (good.double(), {}, r"float64.*expected .*float32"),
        (good.to("meta"), {}, "'meta'.*expected .*'cpu'"),
        (good, {"scale_format": "fp32"}, "'fp32'.*expected .*'pow2'"),
    ]:
        with refusal(QuantFormatError, message):
            quantize(x, name="w", previous_scale_inv=previous, **options)
    for bad in (0.0, -1.0, 3.0, 2.0**-127, math.inf, math.nan):
        wrong = torch.tensor([[0.5, bad, bad]])
        with refusal(QuantFormatError, rf"w: 2 previous scale\(s\) are no powers.*{bad}"):
            quantize(x, name="w", previous_scale_inv=wrong)


def test_a_non_finite_weight_is_found_though_its_scale_could_be_kept():
    x = torch.ones(4, 4, dtype=torch.bfloat16)
    previous = quantize_blockwise(x).scale_inv
    x[2, 1] = math.nan
    with pytest.raises(NonFiniteWeightError, match=r"first at index \[2, 1\]"):
        quantize_blockwise(x, previous_scale_inv=previous)
