"""What the ranks of a group tell each other about a call, so that none waits for another in vain.

    agree      one MAX all-reduce of 24 bytes: do all mean the same, and has any a non-finite value?
    largest    one MAX all-reduce of what they agreed to exchange

Collectives whose sizes differ between ranks hang or corrupt memory, so agreement comes first and
has one size: (digest, -digest, trouble), whose maxima are opposite only where all digests are
equal. What a rank would quantize, or why it cannot, is one text; where the digests of the texts
differ, the texts are gathered and every rank raises an error that shows the first difference.

Left out: a rank that never calls. That is for the group's own timeout.
"""

import hashlib
from collections.abc import Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from fp8rl.quant.errors import ShardError

_CANNOT = "cannot quantize its part: "
_SHOWN = 100  # characters of a line around the first difference


class Peers:
    """The ranks that hold the parts of a weight. Every method is a collective of all of them.

    Raises ShardError where torch.distributed is not initialized or this process is not in `group`.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if not dist.is_initialized():
            raise ShardError(
                "torch.distributed is not initialized: call init_process_group first, or "
                "quantize_blockwise where one process holds the whole weight (a KV observation is "
                "then complete as it is)"
            )
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ShardError("this process is not in the group; call on the group's ranks only")
        on_cpu = "cpu:" in dist.get_backend_config(group)
        self.device = torch.device("cpu" if on_cpu else "cuda")

    def largest(self, values: Tensor) -> Tensor:
        """Return the elementwise maximum over the ranks, on the device of `values`."""
        reduced = values.to(self.device, copy=True)
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=self.group)
        return reduced.to(values.device)

    def total(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over the ranks, on the device of `values`."""
        reduced = values.to(self.device, copy=True)
        dist.all_reduce(reduced, op=dist.ReduceOp.SUM, group=self.group)
        return reduced.to(values.device)

    def gather(self, values: Tensor) -> list[Tensor]:
        """Return the `values` of every rank, of one shape, on the CPU."""
        here = values.to(self.device)
        gathered = [torch.empty_like(here) for _ in range(self.ranks)]
        dist.all_gather(gathered, here, group=self.group)
        return [part.cpu() for part in gathered]

    def agree(self, lines: Sequence[str], failure: ValueError | None, trouble: bool) -> bool:
        """Tell whether any rank has `trouble`, once all have the same `lines`.

        Raises `failure`, on the rank that has one, after the others know; ShardError on ranks whose
        peers failed or have other lines.
        """
        text = "\n".join(lines) if failure is None else f"{_CANNOT}{failure}"
        digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
        top, bottom, any_trouble = self.largest(torch.tensor([digest, -digest, trouble])).tolist()
        texts = [text] * self.ranks if top == -bottom else self.gather_text(text)
        if failure is not None:
            raise failure
        for rank, other in enumerate(texts):
            if other.startswith(_CANNOT):
                raise ShardError(f"rank {rank} of the group {other}")
        if top != -bottom:
            raise ShardError(_difference(texts))
        return bool(any_trouble)

    def gather_text(self, text: str) -> list[str]:
        """Return the `text` of every rank."""
        encoded = text.encode()
        lengths = [int(n) for n in self.gather(torch.tensor([len(encoded)]))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        gathered = zip(self.gather(padded), lengths, strict=True)
        return [bytes(part[:n].tolist()).decode() for part, n in gathered]


def _difference(texts: Sequence[str]) -> str:
    """Say where texts that are not all equal differ first."""
    for lines in zip_longest(*(text.split("\n") for text in texts), fillvalue="nothing more"):
        if len(set(lines)) > 1:
            break
    other = next(rank for rank, line in enumerate(lines) if line != lines[0])
    found = [lines[0], lines[other]]
    start = next((i for i, (a, b) in enumerate(zip(*found, strict=False)) if a != b), 0)
    shown = [
        line if len(line) <= _SHOWN else f"{line[:40]} ... {line[max(start - 20, 40) :][:_SHOWN]}"
        for line in found
    ]
    return (
        f"ranks differ in their calls: rank 0 of the group has '{shown[0]}' where rank {other} has "
        f"'{shown[1]}'; all must call with the same model or weights, in the same order, and with "
        "the same layouts and options"
    )
