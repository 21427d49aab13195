"""What trainer ranks tell each other while shards move, so that none waits for another in vain.

    agree    one MAX all-reduce of 24 bytes: is any rank in trouble, and what has any of them met?
    telling  local work; if it breaks, this rank agrees in the others' next turn, with its reason
    move     point-to-point messages, sizes known to both ends

Between two messages every rank calls ``agree``, once for each stretch of local work, so a rank that
failed always meets the others in one of the same size. Only then are reasons gathered, and every
rank raises: the one that broke its own error, the others a ``SourceError`` that quotes it, all of
them the same ``NonFiniteWeightError`` where a value was NaN or Inf.

Where the trainer is all ranks of torch.distributed and has Gloo, it talks in a Gloo group of its
own: when a rank ends, only its neighbours in a collective notice, and they make it known by leaving
that group, which breaks the connections of the rest. (The trainer's own group is left alone.)
Weights on GPUs go through the trainer's group, where it has NCCL. A process without
torch.distributed talks to nobody.

Left out: a rank that is alive and silent, one that ends within an NCCL message, and in a trainer of
some ranks one that ends and is no neighbour. Those are for the timeout of the group: torch's
default in our own, for it cannot be asked for the trainer's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from traceback import clear_frames
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from fp8rl.quant import NonFiniteWeightError, RankLostError, ShardError
from fp8rl.quant.shard_agreement import Peers
from fp8rl.sync.errors import SourceError

_OWN_GROUPS: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


class NonFinite(NamedTuple):
    """NaN or Inf in this rank's part of a tensor.

    tensor: its number in the metadata. first: index of the first such element in the whole.
    """

    tensor: int
    name: str
    elements: int
    first: Sequence[int]
    value: float


class TrainerRanks:
    """The ranks of a group (None: the default one), or this process alone.

    rank, size: in the group. device: where messages lie, None for a process alone. sent: bytes of
    all messages from here.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """Join the others: a collective, as every method is."""
        self.rank, self.size, self.sent = 0, 1, 0
        self.device: torch.device | None = None
        self._peers: Peers | None = None  # in the group to talk in; None too once a rank is lost
        self._data: dist.ProcessGroup | None = None  # the group that messages go through
        if group is None and not dist.is_initialized():
            return
        trainer = Peers(group)  # refuses a process that is not in the group
        self.rank, self.size, self.device = trainer.rank, trainer.ranks, trainer.device
        self._trainer_group = dist.group.WORLD if group is None else group
        with self.losses():
            self._data = _talking_group(self._trainer_group)
        self._peers = Peers(self._data)

    @property
    def on_cuda(self) -> bool:
        """Whether messages lie on this rank's GPU."""
        return self.device is not None and self.device.type == "cuda"

    @property
    def peers(self) -> Peers:
        """The ranks to talk to; keep no reference. RankLostError once one of them is lost."""
        if self._peers is None:
            raise RankLostError(
                "a trainer rank was lost in an earlier pass, and no weight moves without it; start "
                "the run again from its last checkpoint"
            )
        return self._peers

    def same(self, lines: Sequence[str]) -> None:
        """Raise SourceError on every rank unless all have the same `lines`."""
        if self.device is None:
            return
        with self.losses():
            try:
                self.peers.agree(lines, None, trouble=False)
            except ShardError as error:
                raise SourceError(str(error)) from error

    def gather(self, text: str) -> list[str]:
        """Return the text of every rank."""
        if self.device is None:
            return [text]
        with self.losses():
            return self.peers.gather_text(text)

    def largest(self, values: Sequence[int]) -> list[int]:
        """Return the largest of each value over the ranks."""
        if self.device is None:
            return list(values)
        with self.losses():
            found: list[int] = self.peers.largest(torch.tensor(values)).tolist()
        return found

    def agree(
        self,
        *,
        error: str = "",
        non_finite: Sequence[NonFinite] = (),
        on_cuda: bool = False,
        met: bool = False,
    ) -> bool:
        """Go on together, or not at all; tell whether any rank has `met` what it looks for.

        error: why this rank cannot go on. non_finite: what it found in its parts. on_cuda: whether
        these lie on a GPU: messages then travel by NCCL, where the group has it beside Gloo.

        Raises SourceError or NonFiniteWeightError, the same on every rank; RankLostError.
        """
        trouble = bool(error or non_finite)
        troubles, anywhere_cuda, any_met = self.largest([trouble, on_cuda, met])
        if troubles:
            reports = self.gather(json.dumps({"error": error, "non_finite": list(non_finite)}))
            raise _verdict([json.loads(report) for report in reports])
        if anywhere_cuda and self.device is not None and not self.on_cuda:
            self._go_to_cuda()
        return bool(any_met)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Local work: if it breaks here, whatever the reason, the others raise in their `agree`."""
        try:
            yield
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, GeneratorExit):
                reason = "the loop over its tensors was left before the end"
            with suppress(SourceError, NonFiniteWeightError, RankLostError):
                self.agree(error=reason)
            raise

    def move(self, sends: Sequence[tuple[int, Tensor]], receives: Mapping[int, Tensor]) -> None:
        """Exchange uint8 messages with ranks of the group; all have arrived on return."""
        batch = [
            dist.P2POp(dist.irecv, message, group=self._data, group_peer=rank)
            for rank, message in receives.items()
        ]
        batch += [
            dist.P2POp(dist.isend, message, group=self._data, group_peer=rank)
            for rank, message in sends
        ]
        if not batch:
            return
        with self.losses():
            try:
                for work in dist.batch_isend_irecv(batch):
                    work.wait()
            finally:
                batch.clear()  # it holds the group, which `losses` lets go of
        self.sent += sum(message.nbytes for _, message in sends)

    @contextmanager
    def losses(self) -> Iterator[None]:
        """Collectives: what a backend raises in them is a RankLostError, and soon on all ranks."""
        try:
            yield
        except RankLostError:
            raise
        except RuntimeError as error:  # backends raise no narrower one
            clear_frames(error.__traceback__)  # which hold the group
            self._leave()
            raise RankLostError(
                "a trainer rank was lost, or a collective failed, while shards moved: the rank's "
                "own output says why; start the run again from its last checkpoint "
                f"({error})"
            ) from error

    def _leave(self) -> None:
        """Break the connections of our own group: it closes them when nobody holds it any more."""
        assert self._trainer_group is not None
        own = _OWN_GROUPS.pop(self._trainer_group, None)
        self._data = self._peers = None
        if own is not None:
            dist.destroy_process_group(own)

    def _go_to_cuda(self) -> None:
        """From here on messages go through the trainer's NCCL, if there is one."""
        if "cuda:nccl" not in dist.get_backend_config(self._trainer_group):
            return
        self.device = torch.device("cuda")
        self._data = self._trainer_group
        with self.losses():  # NCCL wants all ranks in a group's first call
            dist.all_reduce(torch.zeros(1, device=self.device), group=self._data)


def _talking_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """A Gloo group of our own, one for each trainer group; that itself where there can be none."""
    assert group is not None
    # A group of some ranks has a name of its own only by how many groups each has seen, and ranks
    # of a trainer have seen different numbers of them.
    whole = dist.get_world_size(group) == dist.get_world_size()
    if "gloo" not in dist.get_backend_config(group) or not whole:
        return group
    own = _OWN_GROUPS.get(group)
    if own is None:
        own = dist.new_group(backend="gloo")
        assert own is not None  # all ranks are in it
        _OWN_GROUPS[group] = own
    return own


def _verdict(reports: Sequence[Mapping[str, Any]]) -> SourceError | NonFiniteWeightError:
    """The error that every rank raises."""
    for rank, report in enumerate(reports):
        if report["error"]:
            return SourceError(
                f"rank {rank} of the trainer's group broke off the pass over the weights, so all "
                f"ranks did: {report['error']}"
            )
    found = [NonFinite(*one) for report in reports for one in report["non_finite"]]
    earliest = min(found, key=lambda one: (one.tensor, one.first))
    count = sum(one.elements for one in found if one.tensor == earliest.tensor)
    return NonFiniteWeightError(earliest.name, count, tuple(earliest.first), earliest.value)
