"""Stacked experts of a checkpoint, seen one by one under the names of the Hugging Face Hub.

transformers 5 can save the experts of a layer as two tensors, under its own names:

    {layer}.mlp.experts.gate_up_proj  [E, 2I, H]      gate_proj (w1) above up_proj (w3)
    {layer}.mlp.experts.down_proj     [E, H, I]       down_proj (w2)

The Hub, and vLLM's loader of FP8 experts, know each expert's linear by itself. A stacked tensor is
those linears in a row, so each is a piece of the same file, and nothing is moved.

Source: transformers 5, conversion_mapping (`mixtral`, `qwen2_moe`); vLLM, fused_moe. Left out:
stacks of architectures without a known plan, which stay as they are.
"""

import math
import re
from collections.abc import Container, Iterable
from dataclasses import replace
from typing import Final

from fp8rl.quant.checkpoint_file import StoredTensor

_STACK = re.compile(r"(?P<layer>.+)\.mlp\.experts\.(?P<kind>gate_up_proj|down_proj)")
# In the names of a family: the experts, and what the slice of each in a stack holds from the top.
_FAMILIES: Final = (
    ("mlp.experts", {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}),
    ("block_sparse_moe.experts", {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}),
)


def hub_tensors(tensors: Iterable[StoredTensor], known: Container[str]) -> list[StoredTensor]:
    """Return the tensors under those of their names that are `known`, stacks taken apart.

    A tensor that is not known under any name is returned as it is.
    """
    return [piece for tensor in tensors for piece in _pieces(tensor, known)]


def _pieces(tensor: StoredTensor, known: Container[str]) -> list[StoredTensor]:
    stack = _STACK.fullmatch(tensor.name)
    if stack is not None and len(tensor.shape) == 3:
        for experts, linears in _FAMILIES:
            name = f"{stack['layer']}.{experts}.{{}}.{{}}.weight"
            if name.format(0, linears[stack["kind"]][0]) in known:
                return _unstacked(tensor, name, linears[stack["kind"]])
    mixtral = tensor.name.replace(".mlp.", ".block_sparse_moe.")  # its router, saved by the same
    if tensor.name not in known and mixtral in known:
        return [replace(tensor, name=mixtral)]
    return [tensor]


def _unstacked(tensor: StoredTensor, name: str, linears: tuple[str, ...]) -> list[StoredTensor]:
    experts, rows, columns = tensor.shape
    if rows % len(linears):  # no such stack: left to be refused as a tensor without a place
        return [tensor]
    shape = (rows // len(linears), columns)
    nbytes = math.prod(shape) * tensor.dtype.itemsize
    names = [name.format(expert, linear) for expert in range(experts) for linear in linears]
    return [
        replace(
            tensor, name=each, shape=shape, offset=tensor.offset + index * nbytes, nbytes=nbytes
        )
        for index, each in enumerate(names)
    ]
