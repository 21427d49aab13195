"""What a live vLLM model expects and what it holds; the one file that reads vLLM's insides.

Two questions are answered here, tensor by tensor under Hugging Face names:

* ``expected_tensors``: which tensors, dtypes and shapes the engine's model takes, derived from its
  own modules (fused linears split into their parts; scales for every FP8 attention layer), not from
  what a trainer believes;
* ``differences``: whether, after an update, the engine holds exactly the weights that were sent
  (KV scales have a file of their own, ``engine_scales.py``).

After loading, kernels hold weights in layouts of their own, so each is compared in its own way:

* FP8 on a CPU: VNNI-packed bytes, compared with the sent bytes packed by the same operator;
* BF16 linears on a CPU: hidden inside a closure (SGL or oneDNN), so the kernel itself is run on the
  identity matrix, which gives back its weights exactly (every sum has one term; -0.0 reads as 0.0);
* biases: as they lie, in BF16 or fp32, and as the kernel adds them, which is run on a row of zeros;
* everything else: compared as it lies.

A kernel that is not in this list is refused by name: nothing counts as proven unread.

Private names of vLLM used, checked at import on 0.32: ``BlockScaledMMLinearKernel`` classes by
name, ``layer.cpu_linear``, and the layerwise-reload helpers (to clean up after a load that broke:
vLLM leaves meta tensors behind).
Left out: tensor-parallel engines, MoE experts, kernels on CUDA.
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

from fp8rl.quant import QKV, EngineTensor
from fp8rl.sync.engine_scales import has_fp8_cache
from fp8rl.sync.errors import ManifestError, ReadBackError

SUPPORTED_VLLM = "0.32."
if not vllm.__version__.startswith(SUPPORTED_VLLM):
    raise ImportError(
        f"vllm {vllm.__version__} found, but fp8rl.sync.engine_state reads private names of vllm "
        f"{SUPPORTED_VLLM}x; install that version or a newer fp8rl"
    )

FP8_BLOCK = 128
CPU_FP8_KERNEL = "CPUFp8BlockScaledMMKernel"
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
                for x in QKV
                if has_fp8_cache(module)
            )
        else:
            found.extend(
                EngineTensor(f"{prefix}.{name}", parameter.dtype, tuple(parameter.shape))
                for name, parameter in module.named_parameters(recurse=False)
            )
    return found


def differences(model: nn.Module, sent: Mapping[str, torch.Tensor]) -> list[str]:
    """Compare the engine's own state with what was sent; returns one line for each difference.

    Args:
        model: the live model, after the update.
        sent: weights by Hugging Face name, whole CPU tensors.

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


def fit_biases(model: nn.Module) -> None:
    """Give the biases of FP8 linears on a CPU the dtype that their kernel takes: fp32.

    vLLM 0.32 converts biases for its BF16 kernels but not for this one, which then fails in the
    first forward ("expected scalar type Float but found BFloat16"). To call after every load.
    """
    for module in model.modules():
        if not isinstance(module, LinearBase) or module.bias is None or not _is_fp8(module):
            continue
        if _kernel(module) == CPU_FP8_KERNEL:
            module.bias.data = module.bias.data.float()


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
    width_in = module.input_size_per_partition
    for part in _parts(model, prefix, module):
        rows = part.stop - part.start
        if _is_fp8(module):
            blocks = (-(-rows // FP8_BLOCK), -(-width_in // FP8_BLOCK))
            yield EngineTensor(f"{part.prefix}.weight", torch.float8_e4m3fn, (rows, width_in))
            yield EngineTensor(f"{part.prefix}.weight_scale_inv", torch.float32, blocks)
        else:
            yield EngineTensor(f"{part.prefix}.weight", torch.bfloat16, (rows, width_in))
        if module.bias is not None:
            yield EngineTensor(f"{part.prefix}.bias", torch.bfloat16, (rows,))


def _is_fp8(module: LinearBase) -> bool:
    return isinstance(module.quant_method, Fp8LinearMethod)


def _kernel(module: LinearBase) -> str:
    """The class of an FP8 linear's kernel."""
    return type(module.quant_method.fp8_linear).__name__


def _comparisons(
    model: nn.Module, sent: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield (name, what the engine holds, what it should hold), both in the kernel's layout."""
    for prefix, module in model.named_modules():
        if isinstance(module, LinearBase):
            parts = _parts(model, prefix, module)
            compare = _compare_fp8 if _is_fp8(module) else _compare_bf16
            yield from compare(parts, prefix, module, sent)
            if module.bias is not None:
                yield from _compare_biases(parts, module, sent)
        elif isinstance(module, VocabParallelEmbedding):
            yield from _compare_vocabulary(prefix, module, sent)
        elif not isinstance(module, Attention):
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


def _compare_bf16(
    parts: list[Part], prefix: str, module: LinearBase, sent: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    held = _probe(module, module.input_size_per_partition)
    for part in parts:
        name = f"{part.prefix}.weight"
        yield name, held[part.start : part.stop], sent[name]


def _compare_biases(
    parts: list[Part], module: LinearBase, sent: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The bias as it lies, and what the kernel adds to an output of zero."""
    zeros = torch.zeros(1, module.input_size_per_partition, dtype=torch.bfloat16)
    added = module.quant_method.apply(module, zeros, module.bias)[0]
    held = torch.stack([module.bias.data.float(), added.float()])
    for part in parts:
        name = f"{part.prefix}.bias"
        yield name, held[:, part.start : part.stop], sent[name].float().expand(2, -1)


def _weight_packer(prefix: str, module: LinearBase) -> Callable[[torch.Tensor], torch.Tensor]:
    """The operator by which this module's kernel re-laid its weight out after loading."""
    if _kernel(module) == CPU_FP8_KERNEL:
        return torch.ops._C.convert_weight_packed
    raise ReadBackError(
        f"{prefix} runs on kernel {_kernel(module)}, whose weight layout fp8rl cannot read back "
        f"yet; known: {CPU_FP8_KERNEL}"
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


def units(model):
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, LinearBase):
            found[prefix] = tuple(t.name for t in _linear_tensors(model, prefix, module))
        elif isinstance(module, VocabParallelEmbedding):
            found[prefix] = (f"{prefix}.weight",)
        elif not isinstance(module, Attention):
            names = tuple(f"{prefix}.{n}" for n, _ in module.named_parameters(recurse=False))
            if names:
                found[prefix] = names
    return found


def load(model, model_config, tensors):
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    initialize_layerwise_reload(model)
    try:
        model.load_weights(iter(tensors.items()))
        finalize_layerwise_reload(model, model_config)
        fit_biases(model)
    except BaseException:
        abandon_reload(model)
        raise
