"""Do rows in a kernel's layout hold what was sent? Bit for bit, without unpacking into memory.

    as stored    as they were sent, on any device
    VNNI         FP8 on a CPU: blocks of 32 rows, each [K / 2, 32, 2]; seen through a strided view
    repacked     BF16 experts on a CPU, in blocks of 32 rows: what was sent is packed likewise

Bytes are compared as 64-bit words where they fill such: ``torch.equal`` compares those ten times as
fast. Each function returns how many elements differ. Left out: which tensor lies in which kernel
(``engine_kernels.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad
from vllm import _custom_ops as ops

from fp8rl.quant.tensor import FP8_DTYPE
from fp8rl.sync.errors import ReadBackError

CHUNK = {"cpu": 2**20, "cuda": 2**26}  # bytes compared at once; a CPU's cache holds them
VNNI_ROWS = 32
LEAST_NORMAL = 2.0**-126
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def wrong_as_stored(held: Tensor, sent: Tensor) -> int:
    """How many elements of what is held are not what was sent; both as stored, by rows."""
    if held.shape != sent.shape:
        return sent.numel()
    if held.dim() < 2:
        return differing(held, sent.to(held.device))
    step = max(1, CHUNK[held.device.type] // max(1, held[0].nbytes))
    pairs = zip(torch.split(held, step), torch.split(sent, step), strict=True)
    return sum(differing(part, piece.to(held.device)) for part, piece in pairs)


def wrong_vnni(held: Tensor, sent: Tensor) -> int:
    """The same where the kernel holds FP8 rows [n, K] packed: seen unpacked, without a copy.

    Each block of 32 rows, or of what is left, lies as [K / 2, rows, 2].
    """
    _check_vnni()
    if held.shape != sent.shape:
        return sent.numel()
    wrong, whole = 0, len(sent) // VNNI_ROWS * VNNI_ROWS
    for start, stop in ((0, whole), (whole, len(sent))):
        if start == stop:
            continue
        rows = min(VNNI_ROWS, stop - start)
        unpacked = held[start:stop].view(torch.int16).view(-1, sent.shape[1] // 2, rows)
        pairs = sent[start:stop].view(torch.int16).view(-1, rows, sent.shape[1] // 2)
        if not torch.equal(pairs, unpacked.transpose(1, 2)):
            both = pairs ^ unpacked.transpose(1, 2)
            wrong += int((both & 0xFF != 0).sum() + (both & ~0xFF != 0).sum())
    return wrong


@lru_cache
def _check_vnni() -> None:
    """Refuse a CPU for which vLLM's operator packs FP8 in another way than is compared here."""
    rows = (torch.arange(80 * 64) % 251 % 127).to(torch.uint8).view(80, 64).view(FP8_DTYPE)
    packed = torch.ops._C.convert_weight_packed(rows).view(torch.int16)
    blocks = [rows[start : start + VNNI_ROWS].view(torch.int16).t() for start in (0, 32, 64)]
    if not torch.equal(packed.reshape(-1), torch.cat([block.reshape(-1) for block in blocks])):
        raise ReadBackError(
            "vLLM's CPU kernels hold FP8 weights in a layout on this processor that fp8rl does not "
            "know, so it cannot prove them; use BF16 weights"
        )


def wrong_repacked(held: Tensor, sent: Tensor, isa: str) -> int:
    """The same where the kernel holds BF16 rows packed for ``isa``, in blocks of 32.

    Where its rows or columns are more than were sent, the rest is to be zeros.
    """
    step = max(32, CHUNK["cpu"] // held[0].nbytes // 32 * 32)
    extra = (0, held.shape[1] - sent.shape[1], 0, held.shape[0] - sent.shape[0])
    padded = pad(sent, extra) if any(extra) else sent
    wrong = 0
    for part, piece in zip(torch.split(held, step), torch.split(padded, step), strict=True):
        wrong += differing(part, ops.cpu_prepack_moe_weight(piece.contiguous()[None], isa)[0])
    return wrong


def differing(held: Tensor, expected: Tensor) -> int:
    """How many elements differ in any bit."""
    if held.shape != expected.shape or held.dtype != expected.dtype:
        return expected.numel()
    if torch.equal(_words(held), _words(expected)):
        return 0
    integers = _INTEGERS[held.element_size()]
    return int((held.contiguous().view(integers) != expected.contiguous().view(integers)).sum())


def _words(tensor: Tensor) -> Tensor:
    """A tensor's bytes, as int64 where they fill whole words, which compare ten times as fast."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    whole = flat.numel() % 8 == 0 and flat.storage_offset() % 8 == 0
    return flat.view(torch.int64) if whole else flat


def packed_bf16(shards: Sequence[Tensor], rows: int) -> Tensor:
    """The parts of a BF16 weight as its CPU kernel packs them, with zeros up to ``rows``."""
    joined = torch.cat([*shards])
    packed: Tensor = torch.ops._C.convert_weight_packed(pad(joined, (0, 0, 0, rows - len(joined))))
    return packed


def flushed(values: Tensor) -> Tensor:
    """The same with 0 for what AMX takes for 0."""
    return torch.where(values.abs() < LEAST_NORMAL, 0, values)
