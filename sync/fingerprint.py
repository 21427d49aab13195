"""Fingerprints of tensors: 128 bits, made where the tensor lies, as fast as memory is read.

A tensor is its bytes. They are hashed by a tree of matrix products over the integers, which a CPU
and a GPU compute alike, without rounding or overflow:

    level(b)   b, padded with zeros to rows of 4096 bytes, as signed bytes [rows, 4096]
               times TABLE [4096, 16], as int32: 64 bytes for each row
    tree(b)    level(level(... b)) until at most 64 KiB are left; short bytes are their own tree
    fingerprint = blake2b-64(tree of each 16 MiB in turn, length) || sum of all signed bytes

in hexadecimal, 16 + 16 digits, integers little-endian, the sum modulo 2^64. TABLE's first column is
ones, whence the sum; the others are the head of SHAKE-128 cut to [-64, 63], so that no processor's
int8 product saturates.

What it sees. *One changed bit* changes the sum by 2^k, k < 8, so for certain. *Any other damage
that was made without regard to TABLE* (flips, swapped or shifted blocks, another tensor's data):
let d != 0 be the difference of two rows. A column t hides it where sum(d[j] * t[j]) = 0; with all
but one t[j] fixed, at most one of 128 values of the last does that, so all 15 hide it with
probability 128^-15 = 2^-105 at most, on each level. No modulus is in it, hence no weak high bits,
which multilinear hashing modulo 2^64 has: two flipped sign bits cancel there for any odd factors.
Truncated or extended data has another length. blake2b adds 2^-64, and that is the whole. It is
proof against accidents, not against somebody who chooses the damage: TABLE is public.

Source: Carter and Wegman 1979 (inner products with random vectors). Left out: keys.
Private name of torch used: ``torch._int_mm``, its only int8 product on every device.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch
from torch import Tensor

from fp8rl.sync.errors import ManifestError

ROW = 4096  # bytes, of which one product makes 4 * COLUMNS
COLUMNS = 16
SLAB = 2**24  # bytes with a tree of their own
LEAVES = 2**16  # bytes that blake2b takes as they are
SEED = b"fp8rl fingerprint 1"
CUDA_ROWS = 32  # cuBLAS multiplies int8 matrices of more than 16 rows only

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def fingerprint(tensor: Tensor) -> str:
    """Hash a tensor's bytes: 32 hexadecimal digits, the same on every device.

    tensor: any shape and dtype, neither of which is part of the hash. One that is not contiguous is
    copied first. On top of the tensor it takes 256 KiB.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.int8)
    tree = hashlib.blake2b(digest_size=8)
    total = 0
    for slab in torch.split(data, SLAB) if data.numel() else ():
        if slab.numel() <= LEAVES:
            total += int(slab.sum())
        else:
            products = _level(slab)
            total += int(products[:, 0].sum())
            slab = products.reshape(-1).view(torch.int8)
        while slab.numel() > LEAVES:
            slab = _level(slab).reshape(-1).view(torch.int8)
        tree.update(slab.cpu().numpy().tobytes())
    tree.update(data.numel().to_bytes(8, "little"))
    return tree.hexdigest() + f"{total % 2**64:016x}"


def finite(tensor: Tensor) -> bool:
    """Whether a tensor of E4M3, fp16, BF16 or fp32 holds neither NaN nor Inf; of any shape.

    E4M3's NaNs are the greatest of its bytes: 0x7F of the signed, 0xFF of the unsigned ones. The
    others are added up. What is added to NaN or Inf never becomes finite again, so a finite sum is
    proof; one that is not may come of large numbers, and then each of them is looked at.

    Raises ManifestError for another dtype.
    """
    values = tensor.detach()
    if values.dtype == torch.float8_e4m3fn:
        if values.numel() == 0:
            return True
        signed, unsigned = values.view(torch.int8), values.view(torch.uint8)
        return not (int(signed.amax()) == 0x7F or int(unsigned.amax()) == 0xFF)
    if values.dtype not in _FLOATS:
        raise ManifestError(
            f"finite() knows {torch.float8_e4m3fn}, {', '.join(map(str, _FLOATS))}; found a tensor "
            f"of {values.dtype}"
        )
    return math.isfinite(float(values.sum())) or bool(values.isfinite().all())


def _level(data: Tensor) -> Tensor:
    """Bytes int8 [n] -> products int32 [ceil(n / ROW), COLUMNS]; the last row padded with zeros."""
    whole = data.numel() // ROW
    products = [_product(data[: whole * ROW].view(whole, ROW))] if whole else []
    rest = data[whole * ROW :]
    if rest.numel():
        products.append(_product(torch.nn.functional.pad(rest, (0, ROW - rest.numel()))[None]))
    return torch.cat(products) if len(products) > 1 else products[0]


def _product(rows: Tensor) -> Tensor:
    table = _table(rows.device)
    if rows.is_cuda and len(rows) < CUDA_ROWS:
        padded = torch.nn.functional.pad(rows, (0, 0, 0, CUDA_ROWS - len(rows)))
        return torch._int_mm(padded, table)[: len(rows)].contiguous()
    return torch._int_mm(rows, table)


@lru_cache
def _table(device: torch.device) -> Tensor:
    """TABLE, int8 [ROW, COLUMNS]: a column of ones, then pseudo-random numbers in [-64, 63]."""
    head = hashlib.shake_128(SEED).digest(ROW * COLUMNS)
    table = torch.frombuffer(bytearray(head), dtype=torch.uint8).view(ROW, COLUMNS) % 128
    signed = table.to(torch.int8) - 64
    signed[:, 0] = 1
    return signed.to(device)
