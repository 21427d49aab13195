from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from jaxtyping import config
from torch import Tensor


@dataclass
class Batch:
    new: Tensor  # log-probs of the policy being stepped
    old: Tensor  # of the trainer when the batch came
    rollout: Tensor  # of the engine
    advantages: Tensor  # [B]
    mask: Tensor

    def leaf(self) -> Tensor:
        return self.new.detach().clone().requires_grad_()

    def select(self, rows: Tensor | slice) -> "Batch":
        return Batch(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def _make(seed: int, rows: int = 4, tokens: int = 7, mismatch: float = 0.5) -> Batch:
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, tokens, generator=g) * 5 - 2.5
    return Batch(
        new=(old + 0.2 * torch.randn(rows, tokens, generator=g)).clamp(max=0),
        old=old,
        rollout=(old + mismatch * torch.randn(rows, tokens, generator=g)).clamp(max=0),
        advantages=torch.randn(rows, generator=g),
        mask=torch.rand(rows, tokens, generator=g) < 0.7,
    )


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    return _make


@pytest.fixture
def annotations_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for users: the suite's type checker would refuse bad input before the room does."""
    monkeypatch.setattr(config, "jaxtyping_disable", True)
