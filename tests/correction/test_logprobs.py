"""Chunked log-probs against fp64, finite differences, and what they may hold in memory."""

import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from fp8rl.correction import ShapeError, ValueRangeError, chunked_softmax, logprobs
from fp8rl.correction.logprobs import log_probs_from_hidden, log_probs_from_logits
from tests.correction.ranks import on_ranks
from tests.correction.tensor_sizes import LargestTensor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_chunks(monkeypatch):
    """Three tokens at a time for a vocabulary of 11, two between products with the head."""
    monkeypatch.setattr(chunked_softmax, "CPU_CHUNK", 33)
    monkeypatch.setattr(logprobs, "HEAD_BLOCK", 22)
    monkeypatch.setattr(logprobs, "HEAD_GRADIENT_CHUNK", 20)


def drawn(*shape, vocabulary, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(*shape, vocabulary, generator=g, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, vocabulary, shape, generator=g)


def in_float64(logits, tokens, temperature):
    each = (logits.double() / temperature).log_softmax(-1)
    entropy = -(each.exp() * each).sum(-1)
    return each.gather(-1, tokens[..., None])[..., 0], entropy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_and_entropy_are_those_of_fp64(dtype, temperature):
    logits, tokens = drawn(3, 100, vocabulary=8192, dtype=dtype)  # three chunks, the last ragged
    found = log_probs_from_logits(logits, tokens, temperature=temperature, entropy=True)
    expected, entropy = in_float64(logits, tokens, temperature)
    assert found.logprobs.dtype == found.entropy.dtype == torch.float32
    torch.testing.assert_close(found.logprobs.double(), expected, rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    assert log_probs_from_logits(logits, tokens).entropy is None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float32, 2e-5)])
def test_the_gradient_is_that_of_fp64_rounded_to_the_logits_dtype(dtype, tolerance):
    logits, tokens = drawn(2, 150, vocabulary=8192, dtype=dtype)
    upstream = torch.randn(2, 150, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()
    log_probs_from_logits(logits, tokens, temperature=0.7).logprobs.backward(upstream)
    wide = logits.detach().double().requires_grad_()
    in_float64(wide, tokens, 0.7)[0].backward(upstream.double())
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=tolerance, atol=1e-7)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 2, 4)])
def test_gradcheck(shape, temperature):
    logits, tokens = drawn(*shape, vocabulary=11, dtype=torch.float64)
    logits.requires_grad_()

    def from_logits(x):
        return log_probs_from_logits(x, tokens, temperature=temperature).logprobs

    assert torch.autograd.gradcheck(from_logits, logits)
    moved = logits.detach().transpose(0, -2).contiguous().transpose(0, -2).requires_grad_()
    assert torch.autograd.gradcheck(from_logits, moved)

    hidden, _ = drawn(*shape, vocabulary=4, dtype=torch.float64, seed=1)
    head, _ = drawn(11, vocabulary=4, dtype=torch.float64, seed=2)

    def from_hidden(x, w):
        found = log_probs_from_hidden(x, w, tokens, temperature=temperature, entropy=True)
        return found.logprobs

    both = (hidden.requires_grad_(), head.requires_grad_())
    assert torch.autograd.gradcheck(from_hidden, both)


def test_logits_of_any_strides_give_the_same_bit_for_bit():
    logits, tokens = drawn(3, 40, vocabulary=500)
    shifted, next_tokens = logits[:, :-1], tokens[:, 1:]
    assert not shifted.is_contiguous()
    expected = log_probs_from_logits(shifted.contiguous(), next_tokens).logprobs
    assert torch.equal(log_probs_from_logits(shifted, next_tokens).logprobs, expected)


@pytest.mark.usefixtures("small_chunks")
def test_hidden_states_and_their_logits_give_the_same():
    hidden, tokens = drawn(2, 9, vocabulary=16, seed=3)
    tokens %= 11
    head = drawn(11, vocabulary=16, seed=4)[0] / 4
    leaves = [x.clone().requires_grad_() for x in (hidden, head, hidden, head)]
    found = log_probs_from_hidden(*leaves[:2], tokens, temperature=0.8, entropy=True)
    expected = log_probs_from_logits(leaves[2] @ leaves[3].T, tokens, temperature=0.8, entropy=True)
    torch.testing.assert_close(found, expected)
    for scores in (found, expected):
        scores.logprobs.square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[2].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(leaves[1].grad, leaves[3].grad, rtol=1e-4, atol=1e-4)


def test_a_bf16_heads_gradient_is_added_up_in_fp32(monkeypatch):
    """512 blocks that each add the same: in bf16 the sum would stop growing at 2^8 times one."""
    monkeypatch.setattr(logprobs, "HEAD_BLOCK", 4)
    hidden = torch.ones(512, 2, dtype=torch.bfloat16)
    head = torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.zeros(512, dtype=torch.int64)
    log_probs_from_hidden(hidden, head, tokens).logprobs.sum().backward()
    expected = 512 * torch.tensor([0.75, -0.25, -0.25, -0.25])
    assert torch.equal(head.grad.float(), expected[:, None].expand(4, 2))


def test_a_frozen_head_gets_no_gradient_and_hidden_states_still_do():
    hidden, tokens = drawn(5, vocabulary=8)
    head = drawn(8, vocabulary=8, seed=1)[0]
    hidden.requires_grad_()
    log_probs_from_hidden(hidden, head, tokens).logprobs.sum().backward()
    assert hidden.grad.any() and head.grad is None


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_stands_at_positions_without_gradient_reaches_no_gradient(poison):
    counts = torch.tensor([1.0, 0.0, 1.0])
    logits, tokens = drawn(3, vocabulary=6)
    clean = logits.clone().requires_grad_()
    dirty = logits.clone()
    dirty[1] = poison
    dirty.requires_grad_()
    for x in (clean, dirty):
        scores = log_probs_from_logits(x, tokens).logprobs
        torch.where(counts > 0, scores, 0.0).sum().backward()
    assert torch.equal(clean.grad, dirty.grad) and not dirty.grad[1].any()

    head = drawn(6, vocabulary=6, seed=1)[0]
    grads = []
    for x in (clean, dirty):
        leaves = x.detach().clone().requires_grad_(), head.clone().requires_grad_()
        scores = log_probs_from_hidden(*leaves, tokens).logprobs
        torch.where(counts > 0, scores, 0.0).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_tokens_that_were_forbidden_have_probability_zero_and_no_part_in_the_entropy():
    logits, tokens = drawn(4, vocabulary=10)
    logits[:, 5:] = -torch.inf
    logits.requires_grad_()
    found = log_probs_from_logits(logits, tokens.clamp(max=4), entropy=True)
    expected = log_probs_from_logits(logits[:, :5].contiguous(), tokens.clamp(max=4), entropy=True)
    torch.testing.assert_close(found, expected)
    found.logprobs.sum().backward()
    assert logits.grad.isfinite().all() and not logits.grad[:, 5:].any()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_vocabulary_sharded_over_ranks_gives_the_same(temperature):
    logits, tokens = drawn(3, 5, vocabulary=24)
    logits[0, :, 8:16] = -torch.inf  # all that the second of three ranks has
    tokens[0] %= 8
    logits[1, 0, 20] = 1e4  # one rank's sums vanish beside another's
    upstream = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    leaf = logits.clone().requires_grad_()
    expected = log_probs_from_logits(leaf, tokens, temperature=temperature, entropy=True)
    expected.logprobs.backward(upstream)

    def rank(number, group):
        shard = logits[..., 8 * number : 8 * number + 8].clone().requires_grad_()
        found = log_probs_from_logits(
            shard, tokens, temperature=temperature, entropy=True, group=group
        )
        found.logprobs.backward(upstream)
        return found, shard.grad

    ranks = on_ranks(3, rank)
    for found, _ in ranks:
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.cat([grad for _, grad in ranks], -1), leaf.grad)


def test_an_id_outside_the_vocabulary_has_no_log_prob_and_harms_nothing_where_masked():
    logits, tokens = drawn(4, vocabulary=6)
    tokens[1], tokens[2] = -100, 6
    leaf = logits.clone().requires_grad_()
    found = log_probs_from_logits(leaf, tokens).logprobs
    assert found.isnan().tolist() == [False, True, True, False]
    torch.where(found.isnan(), 0.0, found).sum().backward()
    assert leaf.grad.isfinite().all() and not leaf.grad[1:3].any()
    hidden = log_probs_from_hidden(logits, torch.eye(6), tokens).logprobs
    torch.testing.assert_close(hidden, found, equal_nan=True)
    ids = tokens[None]

    def rank(number, group):
        shard = logits[None, :, 3 * number : 3 * number + 3]
        return log_probs_from_logits(shard, ids, group=group).logprobs[0]

    for sharded in on_ranks(2, rank):
        torch.testing.assert_close(sharded, found, equal_nan=True)


def test_entropy_is_that_of_known_distributions():
    uniform, certain = torch.zeros(1, 32), torch.full((1, 32), -1e4)
    certain[0, 3] = 0
    logits = torch.cat([uniform, certain])
    found = log_probs_from_logits(logits, torch.tensor([0, 3]), entropy=True)
    assert found.entropy.tolist() == pytest.approx([math.log(32), 0.0], abs=1e-6)
    assert found.logprobs.tolist() == pytest.approx([-math.log(32), 0.0], abs=1e-6)


def test_nothing_as_large_as_the_logits_is_ever_made_in_fp32():
    logits, tokens = drawn(600, vocabulary=16384, dtype=torch.bfloat16)
    logits.requires_grad_()
    with LargestTensor() as largest:
        log_probs_from_logits(logits, tokens, entropy=True).logprobs.sum().backward()
    assert largest.by_dtype[torch.float32] <= 4 * chunked_softmax.CPU_CHUNK
    assert largest.nbytes == logits.nbytes  # the gradient


def test_from_hidden_states_logits_exist_in_blocks_alone(monkeypatch):
    monkeypatch.setattr(logprobs, "HEAD_BLOCK", 2**21)
    hidden, tokens = drawn(600, vocabulary=32, dtype=torch.bfloat16)
    head, _ = drawn(16384, vocabulary=32, dtype=torch.bfloat16)
    hidden.requires_grad_(), head.requires_grad_()
    with LargestTensor() as largest:
        log_probs_from_hidden(hidden, head, tokens).logprobs.sum().backward()
    assert largest.by_dtype[torch.bfloat16] <= 2 * 2**21
    assert largest.by_dtype[torch.float32] <= 4 * chunked_softmax.CPU_CHUNK


PEAK = """
    import json, torch
    from pathlib import Path
    from fp8rl.correction.logprobs import log_probs_from_hidden, log_probs_from_logits

    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) / 1024 for x in lines if x.startswith(field))

    def peak(function):
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        function()
        return resident("VmHWM") - before

    def whole(x, t):
        return x.float().log_softmax(-1).gather(-1, t[:, None])

    V, N, W = 65536, 2048, 64
    tokens = torch.randint(0, V, (N,))
    hidden, head = torch.randn(N, W).bfloat16(), torch.randn(V, W).bfloat16()
    logits = torch.randn(N, V, dtype=torch.bfloat16).requires_grad_()
    for function in (whole, lambda x, t: log_probs_from_logits(x, t).logprobs):  # warm
        function(logits[:2], tokens[:2]).sum().backward()
    logits.grad = None
    chunked = lambda: log_probs_from_logits(logits, tokens).logprobs
    found = {"logits": logits.nbytes / 2**20, "forward": peak(chunked)}
    found["both"] = peak(lambda: chunked().sum().backward())
    logits.grad = None
    found["whole"] = peak(lambda: whole(logits, tokens).sum().backward())
    del logits
    hidden.requires_grad_(), head.requires_grad_()
    fused = lambda: log_probs_from_hidden(hidden, head, tokens).logprobs.sum().backward()
    found["hidden"] = peak(fused)
    print(json.dumps(found))
"""


def test_peak_memory_of_a_process(capsys):
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    peak = json.loads(found.stdout)
    with capsys.disabled():
        print(f"\n  peak MiB of log-probs: { ({k: round(v) for k, v in peak.items()}) }")
    assert peak["forward"] < 0.25 * peak["logits"]
    assert peak["both"] < 1.25 * peak["logits"]  # the gradient, and chunks
    assert peak["hidden"] < 0.75 * peak["logits"]  # half of the logits at a time, and chunks
    assert peak["whole"] > 4 * peak["logits"]


@pytest.mark.usefixtures("annotations_unchecked")
def test_bad_input_is_refused_by_name():
    logits, tokens = drawn(3, 4, vocabulary=6)
    hidden, head = torch.zeros(3, 4, 5), torch.zeros(6, 5)
    for call, error, message in [
        (lambda: log_probs_from_logits(logits, tokens[:2]), ShapeError, r"logits: .* \[2, 4\]"),
        (lambda: log_probs_from_logits(logits.long(), tokens), ShapeError, "logits: torch.int64"),
        (lambda: log_probs_from_logits(logits, tokens.int()), ShapeError, "tokens: dtype"),
        (
            lambda: log_probs_from_logits(logits, tokens, temperature=0.0),
            ValueRangeError,
            "temperature: 0.0",
        ),
        (lambda: log_probs_from_hidden(hidden, head.T, tokens), ShapeError, r"head: .*\[5, 6\]"),
        (lambda: log_probs_from_hidden(hidden, head.double(), tokens), ShapeError, "head: "),
        (lambda: log_probs_from_hidden(hidden[0], head, tokens), ShapeError, "hidden: "),
    ]:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_gradient_is_that_of_the_forward(backward_inside, head_dtype):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 128, generator=g).requires_grad_()
    head = (1.7 * torch.randn(500, 128, generator=g)).to(head_dtype)  # logits of std 20
    tokens = torch.randint(0, 500, (64,), generator=g)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs = log_probs_from_hidden(hidden, head, tokens).logprobs
        if backward_inside:
            logprobs.sum().backward()
    if not backward_inside:
        logprobs.sum().backward()
    wide = hidden.detach().bfloat16().double().requires_grad_()
    logits = wide @ head.bfloat16().double().T
    logits.log_softmax(-1).gather(-1, tokens[:, None]).sum().backward()
    assert (hidden.grad.double() - wide.grad).norm() < 0.1 * wide.grad.norm()
