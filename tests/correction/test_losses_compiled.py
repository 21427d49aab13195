"""What the losses cost: one graph when compiled, no wait for a device, no large temporary."""

import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fp8rl.correction import Counts, count, policy_loss
from tests.correction.loss_cases import LOSSES, name, packed
from tests.correction.tensor_sizes import LargestTensor

ROOT = Path(__file__).parents[2]
every_loss = pytest.mark.parametrize("config", LOSSES, ids=name)

# In a process of its own: the suite's type checks would be compiled with the losses.
COMPILE = """
    import sys, torch
    from fp8rl.correction import count, policy_loss
    from tests.correction.loss_cases import LOSSES, packed

    g = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(4, 6, generator=g) - 1
    new = old + 0.2 * torch.randn(4, 6, generator=g)
    advantages, weights = torch.randn(4, generator=g), torch.rand(4, 6, generator=g)
    kept = torch.rand(4, 6, generator=g) < 0.7
    lengths = [6, 2, 4, 6]
    bounds, flat = packed(lengths, new, old, weights, kept)

    def padded(config, new):
        counts = count(kept)
        return policy_loss(config, new, old, advantages, weights, kept, counts=counts)

    def in_a_row(config, new):
        _, old, weights, kept = flat
        return policy_loss(config, new, old, advantages, weights, kept, cu_seqlens=bounds)

    for config in LOSSES[:: int(sys.argv[2])]:
        for function, start in ((padded, new), (in_a_row, flat[0])):
            torch.compiler.reset()
            compiled = torch.compile(function, fullgraph=True, backend=sys.argv[1])
            results = []
            for call in (function, compiled):
                x = start.clone().requires_grad_()
                out = call(config, x)
                out.loss.backward()
                results.append((out.loss.detach(), x.grad, *out.metrics.values()))
            for eager, graph in zip(*results, strict=True):
                torch.testing.assert_close(graph, eager)
    print("same")
"""


@pytest.mark.parametrize(
    ("backend", "every"),
    [
        ("aot_eager", 3),
        pytest.param("aot_eager", 1, marks=[pytest.mark.long]),
        pytest.param("inductor", 3, marks=[pytest.mark.long]),
    ],
)
def test_every_loss_compiles_to_one_graph_and_gives_the_same(backend, every):
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMPILE), backend, str(every)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.stdout.endswith("same\n"), found.stderr


@every_loss
@pytest.mark.parametrize("counts", [None, Counts(1, 1)], ids=["own", "given"])
def test_no_value_is_read_back(config, counts):
    """Tensors on the meta device have no values: reading one raises."""
    x = -torch.ones(4, 6, device="meta")
    new = x.clone().requires_grad_()
    kept = torch.ones(4, 6, dtype=torch.bool, device="meta")
    out = policy_loss(config, new, x, torch.ones(4, device="meta"), x, kept, counts=counts)
    out.loss.backward()
    assert new.grad.shape == x.shape


@contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@every_loss
def test_on_cuda_nothing_waits_and_unusable_values_poison_the_loss(make_batch, config):
    b = make_batch(0)
    lengths = [7, 2, 5, 4]
    bounds, rows = packed(lengths, b.new, b.old, b.rollout.exp(), b.mask)
    new, old, weights, kept = (x.cuda() for x in rows)
    bounds, advantages = bounds.cuda(), b.advantages.cuda()
    with no_waiting():
        leaf = new.clone().requires_grad_()
        given = (old, advantages, weights, kept)
        counts = count(kept, cu_seqlens=bounds)
        out = policy_loss(config, leaf, *given, cu_seqlens=bounds, counts=counts)
        bad = policy_loss(config, leaf, -old, *given[1:], cu_seqlens=bounds)
        (poisoned,) = torch.autograd.grad(bad.loss, leaf)
        out.loss.backward()
    expected = policy_loss(
        config, rows[0], rows[1], b.advantages, rows[2], rows[3], cu_seqlens=bounds.cpu()
    )
    torch.testing.assert_close(out.loss.detach().cpu(), expected.loss)
    assert leaf.grad.isfinite().all()
    assert bad.loss.isnan() and poisoned.isnan().any()


@every_loss
@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 1000, 4096])], ids=["padded", "row"])
def test_no_temporary_is_larger_than_the_input(config, cu_seqlens):
    shape = (4096,) if cu_seqlens is not None else (4, 1024)
    old = -torch.rand(shape) - 1
    new = (old + 0.1).requires_grad_()
    kept = torch.ones(shape, dtype=torch.bool)
    advantages = torch.randn(len(cu_seqlens) - 1 if cu_seqlens is not None else 4)
    with LargestTensor() as largest:
        out = policy_loss(config, new, old, advantages, old.exp(), kept, cu_seqlens=cu_seqlens)
        out.loss.backward()
    allowed = old.nbytes if cu_seqlens is None else 2 * old.nbytes  # int64 owners of tokens
    assert old.nbytes <= largest.nbytes <= allowed
