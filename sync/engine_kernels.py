"""Does a kernel of the live engine hold what was sent? One reader for each layout of weights.

After loading, kernels hold weights in layouts of their own:

    FP8 linears, FP8 experts on a CPU    VNNI-packed bytes: blocks of 32 rows, pairs of columns
    BF16 experts on a CPU                packed for AMX, in blocks of 32 rows
    BF16 linears up to 1 MiB on a CPU    packed by the same operator, inside a closure
    larger BF16 linears, heads           inside oneDNN, where nothing can be read
    FP8 linears of ``ReferenceKernel``   as stored
    FP8 and BF16 on CUDA                 as stored (not run: written after the source of vLLM 0.32)
    all else                             as it lies

A packed weight is compared byte for byte: FP8 through a strided view that undoes the packing (two
reads of memory, no copy; that vLLM's operator packs so is checked once in a process), BF16 by
packing what was sent with the operator that vLLM packed with. The scales of experts are read where
the kernel reads them, which after a reload is not the layer's parameter.

oneDNN's weights can only be seen through products: x @ W with one 1 in x gives back a column of W
exactly (each sum has one term), and reading all K columns costs 2 N K^2 operations, more than the
load itself. ``PROBES`` columns, drawn anew for each proof, are read. A kernel that differs in a
fraction f of its columns passes for right with probability (1 - f)^64 at most: 5e-20 for one that
differs in half of them, 1e-3 for a tenth. That it was made anew ``load`` checks, and for heads and
embeddings the weight from which it was made is compared in full. What is left, a changed number
inside oneDNN's copy alone, is not what this can find. Numbers below 2^-126, which AMX takes for 0,
are no difference there.

A kernel that is not in this list is refused by name: nothing counts as proven unread. On CUDA,
DeepGEMM with E8M0 scales requantizes while loading; it leaves blocks as they are whose power-of-two
scale fits tightly and whose amax is 1e-4 or more, and others differ from what was sent: weights of
a plan with ``scale_format="fp32"`` are refused there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from fp8rl.quant.tensor import FP8_DTYPE
from fp8rl.sync.engine_layouts import (
    differing,
    flushed,
    packed_bf16,
    wrong_as_stored,
    wrong_repacked,
    wrong_vnni,
)
from fp8rl.sync.engine_load import CPU_FP8_LINEAR
from fp8rl.sync.engine_private import (
    cpu_kernel,
    fp8_kernel,
    method,
    moe_backend,
    moe_experts,
    packed_weight,
)
from fp8rl.sync.engine_units import SCALE, Place, Unit
from fp8rl.sync.errors import ReadBackError

PROBES = 64
AS_STORED_LINEARS = (
    "CutlassFp8BlockScaledMMKernel",
    "DeepGemmFp8BlockScaledMMKernel",
    "FlashInferFp8DeepGEMMDynamicBlockScaledKernel",
    "TritonFp8BlockScaledMMKernel",
)
W8A8_REFERENCE = "ReferenceKernel"  # engine_w8a8.py, which also has the two below
W8A8_METHODS = ("W8A8Experts", "W8A8Linear")
AS_STORED_EXPERTS = (
    "BATCHED_DEEPGEMM",
    "BATCHED_TRITON",
    "BATCHED_VLLM_CUTLASS",
    "DEEPGEMM",
    "TRITON",
    "VLLM_CUTLASS",
)

Count = Callable[[Tensor, Tensor], int]  # (what is held, what was sent) -> elements that differ
Kernel = Callable[..., Tensor]


class Finding(NamedTuple):
    """Of ``read`` elements of a tensor in the engine, how many are not what was sent."""

    name: str
    wrong: int
    read: int


def compare(unit: Unit, sent: Mapping[str, Tensor]) -> Iterator[Finding]:
    """Read back this worker's part of a unit, each tensor at least once.

    sent: whole tensors by name. Raises ReadBackError for a kernel whose layout is not known.
    """
    module = unit.module
    if isinstance(module, RoutedExperts):
        yield from _experts(unit, sent)
    elif isinstance(module, VocabParallelEmbedding):
        yield from _embedding(unit, sent)
    elif isinstance(module, LinearBase):
        read = _fp8_linear if module.weight.dtype == FP8_DTYPE else _bf16_linear
        yield from read(unit, sent)
        yield from _biases(unit, sent)
    else:
        for place in unit.places:
            yield _as_it_lies(place, getattr(module, place.parameter).data, sent)


def activations(model: torch.nn.Module) -> dict[str, str]:
    """Say of each FP8 layer of a live model, by its prefix, in what its kernel takes its input.

    "fp8" (W8A8): kernels of CUDA, and ours for a CPU. "bf16" (W8A16): vLLM's for a CPU. Else the
    name of a kernel that is not known here.
    """
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, RoutedExperts) and module.w13_weight.dtype == FP8_DTYPE:
            kernel = moe_backend(module)
        elif isinstance(module, LinearBase) and module.weight.dtype == FP8_DTYPE:
            kernel = fp8_kernel(module)
        else:
            continue
        if kernel in ("CPU", *CPU_FP8_LINEAR, W8A8_REFERENCE):  # take what the method gives them
            found[prefix] = "fp8" if method(module) in W8A8_METHODS else "bf16"
        else:
            on_cuda = kernel in AS_STORED_LINEARS + AS_STORED_EXPERTS
            found[prefix] = "fp8" if on_cuda else kernel
    return found


def _fp8_linear(unit: Unit, sent: Mapping[str, Tensor]) -> Iterator[Finding]:
    kernel, as_stored = fp8_kernel(unit.module), (W8A8_REFERENCE, *AS_STORED_LINEARS)
    if kernel not in (*CPU_FP8_LINEAR, *as_stored):
        raise _unknown(unit.prefix, f"FP8 kernel {kernel}", (*CPU_FP8_LINEAR, *as_stored))
    count = wrong_vnni if kernel in CPU_FP8_LINEAR else wrong_as_stored
    for place in unit.places:
        if place.parameter == "weight":
            yield _as_it_lies(place, unit.module.weight.data[place.at], sent, count)
        elif place.parameter == SCALE:
            yield _scales(unit, place, unit.module.weight_scale_inv.data, sent)


def _bf16_linear(unit: Unit, sent: Mapping[str, Tensor]) -> Iterator[Finding]:
    places = [place for place in unit.places if place.parameter == "weight"]
    if unit.module.weight.is_cuda:
        for place in places:
            yield _as_it_lies(place, unit.module.weight.data[place.at], sent)
    else:
        rows = sum(unit.module.output_partition_sizes)
        yield from _through_kernel(unit.module, unit.prefix, places, rows, sent)


def _embedding(unit: Unit, sent: Mapping[str, Tensor]) -> Iterator[Finding]:
    """The rows that are looked up, and what heads multiply by, which on a CPU is a copy."""
    (place,) = unit.places
    yield _as_it_lies(place, unit.module.weight.data[place.at], sent)
    for head in (unit.module, *unit.tied):
        if isinstance(head, ParallelLMHead) and not head.weight.is_cuda:
            rows = head.num_embeddings_per_partition
            yield from _through_kernel(head, unit.prefix, [place], rows, sent)


def _biases(unit: Unit, sent: Mapping[str, Tensor]) -> Iterator[Finding]:
    """The bias as it lies, in BF16 or fp32, and on a CPU what the kernel adds to zeros."""
    module = unit.module
    if module.bias is None:
        return
    held = [module.bias.data]
    if not module.bias.is_cuda:
        zeros = torch.zeros(1, unit.places[0].box.shape[1], dtype=torch.bfloat16)
        held.append(module.quant_method.apply(module, zeros, module.bias)[0])
    values = torch.stack([row.float() for row in held])
    for place in unit.places:
        if place.parameter == "bias":
            shard = sent[place.name][place.box.slices].float().expand(len(held), -1)
            part = values[:, place.at[0]]
            yield Finding(place.name, wrong_as_stored(part, shard), shard.numel())


def _experts(unit: Unit, sent: Mapping[str, Tensor]) -> Iterator[Finding]:
    count, backend = _expert_count(unit), moe_backend(unit.module)
    experts = moe_experts(unit.module)
    scales = {"w13_weight_scale_inv": "w1_scale", "w2_weight_scale_inv": "w2_scale"}
    for place in unit.places:
        if place.box.empty:
            continue  # on another worker
        if place.parameter in scales:
            yield _scales(unit, place, getattr(experts, scales[place.parameter]), sent)
            continue
        held = getattr(unit.module, place.parameter).data
        at = place.at
        if backend == "CPU" and place.parameter == "w13_weight":
            half = held.shape[1] // 2  # gate and up may each be padded
            at = (at[0], slice(half, None) if place.at[1].start else slice(half))
        yield _as_it_lies(place, held[at], sent, count)


def _expert_count(unit: Unit) -> Count:
    """How the rows of one expert are compared in its kernel's layout."""
    backend, experts = moe_backend(unit.module), moe_experts(unit.module)
    if backend in AS_STORED_EXPERTS:
        return wrong_as_stored
    if backend != "CPU" or getattr(experts, "_use_zentorch", False):
        raise _unknown(unit.prefix, f"MoE kernel {backend}", ("CPU", *AS_STORED_EXPERTS))
    if unit.module.w13_weight.dtype == FP8_DTYPE:
        return wrong_vnni
    return partial(wrong_repacked, isa=experts.isa)


def _as_it_lies(
    place: Place, held: Tensor, sent: Mapping[str, Tensor], count: Count = wrong_as_stored
) -> Finding:
    """Compare a place with what is ``held`` of it, by default as stored."""
    shard = sent[place.name][place.box.slices]
    return Finding(place.name, count(held, shard), shard.numel())


def _scales(unit: Unit, place: Place, held: Tensor, sent: Mapping[str, Tensor]) -> Finding:
    if held.dtype != torch.float32:
        raise _unknown(unit.prefix, f"scales re-laid out as {held.dtype}", ("fp32",))
    return _as_it_lies(place, held.data[place.at], sent)


def _through_kernel(
    module: Any, prefix: str, places: Sequence[Place], rows: int, sent: Mapping[str, Tensor]
) -> Iterator[Finding]:
    """Compare what a BF16 kernel on a CPU multiplies by: packed bytes, or columns read by products.

    rows: of the kernel's weight, those of ``places`` and zeros after them.
    """
    kernel = cpu_kernel(module)
    if kernel is None:
        raise _unknown(prefix, f"a {type(module).__name__} without kernel", ("a CPU's, CUDA's"))
    shards = [sent[place.name][place.box.slices] for place in places]
    width, packed = shards[0].shape[1], packed_weight(kernel)
    wrong = 0 if packed is None else differing(packed, packed_bf16(shards, rows))
    if packed is not None and not wrong:
        for place, shard in zip(places, shards, strict=True):
            yield Finding(place.name, 0, shard.numel())
        return
    columns = torch.randperm(width, generator=_chance())
    found = _columns(
        kernel, module, columns[:PROBES] if packed is None else columns, places, shards
    )
    if wrong and not any(finding.wrong for finding in found):  # too small to be seen in a product
        found = [Finding(place.name, wrong, rows * width) for place in places]
    yield from found


def _columns(
    kernel: Kernel,
    module: Any,
    columns: Tensor,
    places: Sequence[Place],
    shards: Sequence[Tensor],
) -> list[Finding]:
    """Read columns of a kernel's weight by products with ones, and of what was sent likewise."""
    ones = torch.zeros(len(columns), shards[0].shape[1], dtype=shards[0].dtype)
    ones[torch.arange(len(columns)), columns] = 1
    held, findings = kernel(ones, module.weight, None), []
    for place, shard in zip(places, shards, strict=True):
        part, expected = held[:, place.at[0]], linear(ones, shard)
        wrong = differing(part, expected) and differing(flushed(part), flushed(expected))
        findings.append(Finding(place.name, wrong, expected.numel()))
    return findings


def _chance() -> torch.Generator:
    """Randomness of its own: the engine's must not notice a proof."""
    return torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "little"))


def _unknown(prefix: str, found: str, known: Sequence[str]) -> ReadBackError:
    return ReadBackError(
        f"{prefix}: {found}; fp8rl cannot read its weights back and so cannot prove them. Known: "
        f"{', '.join(known)}"
    )
