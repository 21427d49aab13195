"""What a live vLLM model expects and what it holds; the one file that reads vLLM's insides.

Two questions are answered here, tensor by tensor under Hugging Face names:

* ``expected_tensors``: which tensors, dtypes and shapes the engine's model takes, derived from its
  own modules (fused linears split into their parts; scales for every FP8 attention layer), not from
  what a trainer believes;
* ``differences``: whether, after an update, the engine holds exactly what was sent.

After loading, kernels hold weights in layouts of their own, so each is compared in its own way:

* FP8 on a CPU: VNNI-packed bytes, compared with the sent bytes packed by the same operator;
* BF16 linears on a CPU: hidden inside a closure (SGL or oneDNN), so the kernel itself is run on the
  identity matrix, which gives back its weights exactly (every sum has one term; -0.0 reads as 0.0);
* everything else: compared as it lies.

A kernel that is not in this list is refused by name: nothing counts as proven unread.

Private names of vLLM used, checked at import on 0.32: ``BlockScaledMMLinearKernel`` classes by
name, ``Attention._{q,k,v}_scale`` with their float and CPU mirrors, ``layer.cpu_linear``, and the
layerwise-reload helpers (to clean up after a load that broke: vLLM leaves meta tensors behind).
Left out: tensor-parallel engines, MoE experts, biases, kernels on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import vllm
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import (
    _place_kernel_tensors,
    get_layerwise_info,
)

from fp8rl.quant import EngineTensor
from fp8rl.sync.errors import ManifestError, ReadBackError

SUPPORTED_VLLM = "0.32."
if not vllm.__version__.startswith(SUPPORTED_VLLM):
    raise ImportError(
        f"vllm {vllm.__version__} found, but fp8rl.sync.engine_state reads private names of vllm "
        f"{SUPPORTED_VLLM}x; install that version or a newer fp8rl"
    )

FP8_BLOCK = 128
PROBE_ROWS = 512  # rows of the identity matrix sent through a kernel at once


@dataclass(frozen=True)
class Part:
    """Rows ``start:stop`` of a module, which are one Hugging Face tensor."""

    prefix: str
    start: int
    stop: int


def expected_tensors(model: nn.Module) -> list[EngineTensor]:
    """List every tensor that the engine's model takes, weights and KV scales, in its own order.

    Raises:
        ManifestError: the model holds a layer that this version cannot update (named).
    """
    found: list[EngineTensor] = []
    for prefix, module in model.named_modules():
        if isinstance(module, LinearBase):
            found.extend(_linear_tensors(model, prefix, module))
        elif isinstance(module, VocabParallelEmbedding):
            shape = (module.org_vocab_size, module.embedding_dim)
            found.append(EngineTensor(f"{prefix}.weight", torch.bfloat16, shape))
        elif isinstance(module, Attention):
            found.extend(
                EngineTensor(f"{prefix}.{x}_scale", torch.float32, (1,))
                for x in ("q", "k", "v")
                if has_fp8_cache(module)
            )
        else:
            found.extend(
                EngineTensor(f"{prefix}.{name}", parameter.dtype, tuple(parameter.shape))
                for name, parameter in module.named_parameters(recurse=False)
            )
    return found


def has_fp8_cache(module: nn.Module) -> bool:
    """Whether a module is an attention layer whose KV cache is FP8."""
    return isinstance(module, Attention) and module.kv_cache_dtype.startswith("fp8")


def differences(model: nn.Module, sent: Mapping[str, torch.Tensor]) -> list[str]:
    """Compare the engine's own state with what was sent; returns one line for each difference.

    Args:
        model: the live model, after the update.
        sent: Hugging Face name -> CPU tensor, whole.

    Raises:
        ReadBackError: a kernel's layout is not known here, so nothing can be proven.
    """
    problems: list[str] = []
    read: set[str] = set()
    for name, held, expected in _comparisons(model, sent):
        read.add(name)
        if held.shape != expected.shape:
            problems.append(f"{name}: engine holds {list(held.shape)}, sent {list(expected.shape)}")
        elif not torch.equal(held, expected):
            wrong = int((held != expected).sum())
            problems.append(f"{name}: {wrong} of {held.numel()} elements differ from what was sent")
    problems += [f"{name}: sent but not found in the engine" for name in sent if name not in read]
    return problems


def abandon_reload(model: nn.Module) -> None:
    """Put kernel tensors back where a load broke halfway, so that the next one can begin.

    The weights are then a mixture of versions: nothing may be served before the next good update.
    """
    for module in model.modules():
        info = get_layerwise_info(module)
        if info.can_load() and info.kernel_tensors is not None:
            _place_kernel_tensors(module, info)
        if info.can_load():
            info.reset()


def _parts(model: nn.Module, prefix: str, module: LinearBase) -> list[Part]:
    """Split a (fused) linear into the Hugging Face linears that it is made of."""
    parent, _, leaf = prefix.rpartition(".")
    leaves = getattr(model, "packed_modules_mapping", {}).get(leaf, [leaf])
    widths = list(module.output_partition_sizes)
    if len(leaves) != len(widths):
        raise ManifestError(f"{prefix}: {len(widths)} parts in the engine, {leaves} by name")
    parts, start = [], 0
    for name, width in zip(leaves, widths, strict=True):
        parts.append(Part(f"{parent}.{name}", start, start + width))
        start += width
    return parts


def _linear_tensors(model: nn.Module, prefix: str, module: LinearBase) -> Iterator[EngineTensor]:
    if module.bias is not None:
        raise ManifestError(f"{prefix} has a bias, which this version cannot update")
    width_in = module.input_size_per_partition
    for part in _parts(model, prefix, module):
        rows = part.stop - part.start
        if _is_fp8(module):
            blocks = (-(-rows // FP8_BLOCK), -(-width_in // FP8_BLOCK))
            yield EngineTensor(f"{part.prefix}.weight", torch.float8_e4m3fn, (rows, width_in))
            yield EngineTensor(f"{part.prefix}.weight_scale_inv", torch.float32, blocks)
        else:
            yield EngineTensor(f"{part.prefix}.weight", torch.bfloat16, (rows, width_in))


def _is_fp8(module: LinearBase) -> bool:
    return isinstance(module.quant_method, Fp8LinearMethod)


def _comparisons(
    model: nn.Module, sent: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield (name, what the engine holds, what it should hold), both in the kernel's layout."""
    for prefix, module in model.named_modules():
        if isinstance(module, LinearBase) and _is_fp8(module):
            yield from _compare_fp8(_parts(model, prefix, module), prefix, module, sent)
        elif isinstance(module, LinearBase):
            held = _probe(module, module.input_size_per_partition)
            for part in _parts(model, prefix, module):
                name = f"{part.prefix}.weight"
                yield name, held[part.start : part.stop], sent[name]
        elif isinstance(module, VocabParallelEmbedding):
            yield from _compare_vocabulary(prefix, module, sent)
        elif isinstance(module, Attention):
            if has_fp8_cache(module):
                yield from _compare_scales(prefix, module, sent)
        else:
            for leaf, parameter in module.named_parameters(recurse=False):
                yield f"{prefix}.{leaf}", parameter.data.cpu(), sent[f"{prefix}.{leaf}"]


def _compare_fp8(
    parts: list[Part], prefix: str, module: LinearBase, sent: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    pack = _weight_packer(prefix, module)
    held = module.weight.data.view(torch.uint8)
    held_scales = module.weight_scale_inv.data
    for part in parts:
        weight, scale = f"{part.prefix}.weight", f"{part.prefix}.weight_scale_inv"
        expected = pack(sent[weight]).view(torch.uint8)
        yield weight, held[part.start : part.stop], expected
        first, last = part.start // FP8_BLOCK, -(-part.stop // FP8_BLOCK)
        yield scale, held_scales[first:last], sent[scale]


def _weight_packer(prefix: str, module: LinearBase) -> Callable[[torch.Tensor], torch.Tensor]:
    """The operator by which this module's kernel re-laid its weight out after loading."""
    kernel = type(module.quant_method.fp8_linear).__name__
    if kernel == "CPUFp8BlockScaledMMKernel":
        return torch.ops._C.convert_weight_packed
    raise ReadBackError(
        f"{prefix} runs on kernel {kernel}, whose weight layout fp8rl cannot read back yet; "
        "known: CPUFp8BlockScaledMMKernel"
    )


def _compare_vocabulary(
    prefix: str, module: VocabParallelEmbedding, sent: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    name = f"{prefix}.weight"
    rows = module.org_vocab_size
    yield name, module.weight.data[:rows].cpu(), sent[name]
    if prefix.endswith("lm_head"):  # logits come from the kernel's copy, not from .weight
        yield name, _probe(module, module.embedding_dim)[:rows], sent[name]


def _probe(module: nn.Module, width_in: int) -> torch.Tensor:
    """The ``[out, in]`` BF16 weight by which a CPU kernel really multiplies."""
    kernel = getattr(module, "cpu_linear", None)
    if kernel is None:
        raise ReadBackError(
            f"{type(module).__name__} has no CPU kernel; BF16 linears on other devices cannot be "
            "read back yet"
        )
    identity = torch.eye(width_in, dtype=torch.bfloat16)
    columns = [kernel(rows, module.weight, None) for rows in torch.split(identity, PROBE_ROWS)]
    return torch.cat(columns).t()


def _compare_scales(
    prefix: str, layer: Attention, sent: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The device scale, its float mirror (read by the CPU kernel) and its CPU copy, for q, k, v."""
    for x in ("q", "k", "v"):
        held = [float(getattr(layer, f"_{x}_scale")), getattr(layer, f"_{x}_scale_float")]
        if x != "q":  # vLLM keeps no CPU copy of q's
            held.append(float(getattr(layer, f"_{x}_scale_cpu")))
        name = f"{prefix}.{x}_scale"
        yield name, torch.tensor(held), sent[name].expand(len(held))
