"""What tensors of a checkpoint are, for an architecture nobody described: from names and shapes.

The rule: a 2-D `.weight` inside a numbered decoder layer is a linear, unless its name says that it
is a norm, an embedding or a router; everything else is kept. Parts that engines are known to fuse
(q, k, v; gate, up; all experts of a layer) are held together by their usual names. How an engine
splits a linear cannot be seen from here, so both dimensions must fill blocks on every rank.

This is a guess, and the plan says so in every reason. Left out: experts stacked in one 3-D tensor
and convolutions, which are kept.
"""

import re
from collections.abc import Mapping
from typing import Final

from fp8rl.quant.architectures import CheckpointTensor, Split
from fp8rl.quant.architectures_table import Role
from fp8rl.quant.errors import QuantPlanError

_LAYER: Final = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)\.")
_OTHER_TOWER: Final = re.compile(r"(?:^|[._])(?:vision|visual|vit|image|audio|speech)(?:[._]|$)")
_EXPERT: Final = re.compile(r"(.+\.experts)\.\d+\.")
# The first that is found in a name decides.
_ROLES: Final[tuple[tuple[re.Pattern[str], Role], ...]] = (
    (re.compile(r"bias$"), "bias"),
    (re.compile(r"norm|(?:^|\.)ln_?\w*\."), "norm"),
    (re.compile(r"embed|(?:^|\.)w[tp]e\."), "embedding"),
    (re.compile(r"router|gating|_gate\.|(?:^|\.)(?:gate|wg)(?:\.|$)"), "router"),
    (re.compile(r"^(?:\w+\.)*(?:lm_head|output|score|classifier)\.weight$"), "head"),
)
# Last name of a linear -> that of the module which engines fuse it into.
_FUSED: Final = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "w1": "w13",
    "w3": "w13",
    "q_a_proj": "fused_qkv_a_proj",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj",
}


def tensors_by_rule(shapes: Mapping[str, tuple[int, ...]]) -> tuple[CheckpointTensor, ...]:
    """Return the tensors of a checkpoint, name -> shape, with the part each seems to play.

    Raises QuantPlanError where no linear of a decoder layer is found.
    """
    tensors = tuple(_place(name, tuple(shape)) for name, shape in shapes.items())
    if not any(t.role == "linear" for t in tensors):
        raise QuantPlanError(
            f"none of these {len(tensors)} tensors is a 2-D '.weight' of a numbered decoder layer "
            "like 'model.layers.0.mlp.up_proj.weight', so there is nothing to plan by rule"
        )
    return tensors


def _place(name: str, shape: tuple[int, ...]) -> CheckpointTensor:
    number = _LAYER.search(name)
    layer = int(number[1]) if number and not _OTHER_TOWER.search(name) else None
    for pattern, role in _ROLES:
        if pattern.search(name) and (role != "head" or layer is None):
            return CheckpointTensor(name, shape, role, layer)
    if layer is None or len(shape) != 2 or not name.endswith(".weight"):
        return CheckpointTensor(name, shape, "unplaced", layer)
    either = Split((0, 1), None)
    return CheckpointTensor(name, shape, "linear", layer, either, _fused(name))


def _fused(name: str) -> str | None:
    expert = _EXPERT.match(name)
    if expert:
        return expert[1]
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    return f"{parent}.{_FUSED[leaf]}" if leaf in _FUSED else None
