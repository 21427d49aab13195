"""The trainer's parts: token batches, micro-batches, AdamW on masters, the process group."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from fp8rl.batch import TokenBatch
from fp8rl.config.file import parse_config
from fp8rl.errors import BatchError, TrainerError
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.master_adamw import MasterAdamW
from fp8rl.trainer.megatron_cpu import cpu_stands_in
from fp8rl.trainer.micro_batch import cut, sample_rows

TOKENS = torch.arange(10).reshape(2, 5)
MASK = torch.tensor([[False, False, True, True, False], [False, True, True, True, True]])


def test_lengths_end_at_the_last_generated_token() -> None:
    b = TokenBatch(TOKENS, MASK)
    assert b.lengths.tolist() == [4, 5] and b.lengths.dtype == torch.int64
    assert b.real.tolist() == [[True] * 4 + [False], [True] * 5]
    assert b.rows(torch.tensor([1])).tokens.tolist() == [[5, 6, 7, 8, 9]]
    assert b.rows(slice(0, 1)).lengths.tolist() == [4]


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (TOKENS.float(), MASK, "tokens must be int64"),
        (TOKENS[0], MASK[0], "tokens must be int64"),
        (TOKENS[:0], MASK[:0], "not empty"),
        (TOKENS, MASK[:, :4], r"response_mask must be bool \[2, 5\]"),
        (TOKENS, MASK.int(), "response_mask must be bool"),
        (TOKENS, ~MASK, "first token"),
        (TOKENS, MASK & torch.tensor([[True], [False]]), r"rows \[1\] hold no generated"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(
    tokens: torch.Tensor, mask: torch.Tensor, message: str
) -> None:
    with pytest.raises(BatchError, match=message):
        TokenBatch(tokens, mask)


@given(rows=st.integers(1, 40), bound=st.integers(1, 50))
def test_micro_batches_are_of_one_size_and_hold_every_row_once(rows: int, bound: int) -> None:
    tokens = torch.arange(rows * 2).reshape(rows, 2)
    b = TokenBatch(tokens, torch.tensor([False, True]).expand(rows, 2))
    micros = cut(b, bound)
    assert len({micro.tokens.shape for micro in micros}) == 1
    assert micros[0].tokens.shape[0] <= bound
    assert all(micro.count == len(micros) for micro in micros)
    assert torch.equal(torch.cat([micro.tokens[: micro.real] for micro in micros]), tokens)
    assert [r for micro in micros for r in range(rows)[micro.rows]] == list(range(rows))
    assert not any(micro.token_mask[micro.real :].any() for micro in micros)
    assert not any(micro.response_mask[micro.real :].any() for micro in micros)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=50), st.integers(30, 200))
def test_sampled_rows_fit_the_bound_and_repeat(lengths: list[int], bound: int) -> None:
    rows = sample_rows(torch.tensor(lengths), bound)
    total = int(torch.tensor(lengths)[rows].sum())
    assert total <= bound and len(set(rows.tolist())) == len(rows) > 0
    assert sum(lengths) > bound - 30 or len(rows) == len(lengths)
    assert torch.equal(rows, sample_rows(torch.tensor(lengths), bound))


@pytest.fixture
def one_rank() -> Iterator[None]:
    with init_distributed(parse_config({})):
        yield


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_master_adamw_is_torch_adamw_on_fp32_copies(clip: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (16, 8), "vector": (8,)}
    ours = {
        n: torch.nn.Parameter(torch.randn(s, generator=generator).bfloat16())
        for n, s in shapes.items()
    }
    theirs = {n: torch.nn.Parameter(p.detach().float().clone()) for n, p in ours.items()}
    groups = [
        {"params": [theirs["matrix"]], "weight_decay": 0.1},
        {"params": [theirs["vector"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, foreach=False, betas=(0.9, 0.95))
    optimizer = MasterAdamW(
        ours, learning_rate=1e-2, weight_decay=0.1, grad_clip=clip, group=dist.group.WORLD
    )
    for _ in range(4):
        for name, parameter in ours.items():
            parameter.main_grad = torch.randn(shapes[name], generator=generator)
            theirs[name].grad = parameter.main_grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(list(theirs.values()), clip)
        reference.step()
        with cpu_stands_in():
            assert optimizer.step() == pytest.approx(float(norm), rel=1e-6)
    state = optimizer.state()
    for name, parameter in theirs.items():
        assert torch.allclose(state[f"master/{name}"], parameter, rtol=1e-6, atol=1e-7)
        assert torch.equal(ours[name].detach(), state[f"master/{name}"].bfloat16())
    assert state["adam/step"].tolist() == [4.0]


def test_more_ranks_than_were_started_is_refused() -> None:
    wanted = parse_config({"trainer": {"tensor_parallel": 2}})
    with pytest.raises(TrainerError, match="--nproc-per-node 2"), init_distributed(wanted):
        pass
    assert not dist.is_initialized()


def test_the_stand_in_ends_with_its_block() -> None:
    asked = torch.cuda.current_device
    with cpu_stands_in():
        assert torch.cuda.current_device() == torch.device("cpu")
        assert torch.zeros(1, device="cuda").device.type == "cpu"
    assert torch.cuda.current_device is asked
