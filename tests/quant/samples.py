"""Tensors of all kinds to quantize, and what is equal: shared by the tests of the cast."""

from functools import partial

import numpy as np
import torch
from hypothesis import strategies as st

from fp8rl.quant import QuantizedTensor, quantize_blockwise

quantize = partial(quantize_blockwise, fp32_as="master")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def codes(q: QuantizedTensor) -> np.ndarray:
    return q.data.view(torch.uint8).numpy()


def assert_same(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert np.array_equal(codes(a), codes(b))
    assert torch.equal(a.scale_inv, b.scale_inv)


def spread(shape: tuple[int, ...], seed: int, low: float, high: float) -> torch.Tensor:
    """Signed fp32 values with exponents all over [low, high], some of them zeros of either sign."""
    rng = np.random.default_rng(seed)
    x = np.exp2(rng.uniform(low, high, shape)) * rng.choice([-1.0, 1.0, 0.0, -0.0], shape)
    limit = float(np.finfo(np.float32).max)
    return torch.from_numpy(np.clip(x, -limit, limit).astype(np.float32))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Matrices and expert stacks of any size and magnitude, some with a zeroed corner."""
    lead = draw(st.sampled_from([(), (1,), (3,)]))
    shape = (*lead, draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    low = draw(st.floats(-150, 126))
    x = spread(shape, draw(st.integers(0, 2**32)), low, min(low + draw(st.floats(0, 40)), 127.99))
    if draw(st.booleans()):
        x[..., :16, :16] = 0.0
    x = x.to(draw(st.sampled_from(DTYPES)))
    return torch.where(torch.isfinite(x), x, torch.zeros_like(x))
