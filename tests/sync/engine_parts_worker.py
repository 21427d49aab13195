"""Run in a process of its own: update, damage and break live vLLM models; print what was seen.

Usage: python -m tests.sync.engine_parts_worker CASE... Prints one JSON object, case -> findings.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from tests.sync import engine_models
from tests.sync.engine_cases import CASES, Case, Damage
from tests.sync.engine_models import Live

RANKS = 2


class Torn(dict[str, torch.Tensor]):
    """Tensors of a stream that ends early."""

    def items(self) -> Any:
        half = list(super().items())[: len(self) // 2]

        def stream() -> Iterator[tuple[str, torch.Tensor]]:
            yield from half
            raise ConnectionError("the stream ended")

        return stream()


def run(case: Case) -> dict[str, Any]:
    """Everything that is seen of one case, as JSON values."""
    from fp8rl.sync.engine_state import differences, expected_tensors, load, units

    live = engine_models.build(engine_models.config(case.family, **case.changes), case.precision)
    model, config = live.model, live.model_config
    parts = units(model)
    seen: dict[str, Any] = {
        "unplanned": [str(d) for d in live.plan.audit(expected_tensors(model))],
        "in no unit or in two": sorted(_off(parts, live)),
    }
    first, second = engine_models.sent(live.plan, 1), engine_models.sent(live.plan, 2)
    load(model, config, first)
    seen["after a load"] = differences(model, first)
    seen["old weights named"] = sorted({_name(line) for line in differences(model, second)})
    seen["weights"] = sorted(first)

    chosen = [unit for unit in parts if case.part in unit]
    before = state(live)
    some = {name: second[name] for unit in chosen for name in parts[unit]}
    load(model, config, some)
    seen["after a load of some"] = differences(model, first | some)
    seen["touched besides"] = [
        key
        for key, value in state(live).items()
        if value != before[key] and not any(key.startswith(unit) for unit in chosen)
    ]

    load(model, config, second)
    seen["damaged"] = {name: _damage(live, how, second) for name, (how, _) in case.damages.items()}
    seen["to be named"] = {name: tensor for name, (_, tensor) in case.damages.items()}
    seen["repaired"] = differences(model, second)
    seen["broken"] = {}
    third = engine_models.sent(live.plan, 3)
    for name in (*case.broken, "torn"):
        seen["broken"][name] = break_a_load(live, third, name)
        load(model, config, second)
    fresh = engine_models.build(engine_models.config(case.family, **case.changes), case.precision)
    load(fresh.model, fresh.model_config, second)
    expected = state(fresh)
    seen["unlike a fresh one"] = [k for k, v in state(live).items() if v != expected[k]]
    return seen


def break_a_load(live: Live, tensors: dict[str, torch.Tensor], name: str) -> dict[str, Any]:
    """Have the loader of one tensor raise, or the stream end early; what was left behind."""
    from fp8rl.sync.engine_state import load

    # A tensor without data: its loader raises when the module is filled.
    without = {key: tensor.to("meta") for key, tensor in tensors.items() if key == name}
    raised = None
    try:
        load(live.model, live.model_config, tensors | without if without else Torn(tensors))
    except (ConnectionError, NotImplementedError) as error:
        raised = type(error).__name__
    loaders = [getattr(p, "weight_loader", None) for p in live.model.parameters()]
    return {
        "raised": raised,
        "meta": sum(parameter.is_meta for parameter in live.model.parameters()),
        "wrapped": sum(getattr(f, "__name__", "") == "online_process_loader" for f in loaders),
    }


def refusals() -> dict[str, str]:
    """What ``load`` and ``differences`` say to what is not whole, known or fitting."""
    from fp8rl.sync.engine_state import differences, load
    from fp8rl.sync.errors import ManifestError, ReadBackError

    live = engine_models.build(engine_models.config("qwen3"), "fp8")
    sent = engine_models.sent(live.plan, 1)
    head, query = "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"
    before, said = state(live), {}
    for what, tensors in {
        "a part": {query: sent[query]},
        "unknown": {"model.layers.7.mlp.up_proj.weight": sent[query]},
        "shape": {head: sent[head][:-1]},
        "dtype": {head: sent[head].float()},
    }.items():
        try:
            load(live.model, live.model_config, tensors)
        except ManifestError as error:
            said[what] = str(error)
    try:
        differences(live.model, {query: sent[query]})
    except ManifestError as error:
        said["a part read back"] = str(error)
    said["touched"] = str(state(live) != before)
    live.model.lm_head.quant_method.process_weights_after_loading = lambda layer: None
    try:
        load(live.model, live.model_config, {head: sent[head]})
    except ReadBackError as error:
        said["old kernel"] = str(error)
    return said


def as_ranks(count: int) -> dict[str, list[Any]]:
    """Each weight of a MoE model -> [whole shape, box of each rank] of ``count`` such workers.

    Modules of a single worker are told that they are one of several; key/value heads, of which
    there is one, are then held by all.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.linear import (
        LinearBase,
        QKVParallelLinear,
        RowParallelLinear,
    )
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    from fp8rl.sync.engine_units import engine_units

    live = engine_models.build(engine_models.config("qwen3_moe", mlp_only_layers=[0]), "fp8")
    found: dict[str, list[Any]] = {}
    for rank in range(count):
        for module in live.model.modules():
            if isinstance(module, LinearBase):
                module.tp_rank, module.tp_size = rank, count
                if isinstance(module, RowParallelLinear):
                    module.input_size = count * module.input_size_per_partition
                if isinstance(module, QKVParallelLinear):
                    module.num_kv_head_replicas = count
            elif isinstance(module, VocabParallelEmbedding):
                rows, padded = module.org_vocab_size, module.num_embeddings_padded
                module.shard_indices = module._get_indices(padded, padded, rows, rows, rank, count)
            elif isinstance(module, RoutedExperts):
                parallel = module.moe_config.moe_parallel_config
                parallel.tp_rank, parallel.tp_size = rank, count
        for unit in engine_units(live.model):
            for place in unit.places:
                shape, boxes = found.setdefault(place.name, [place.shape, []])
                assert shape == place.shape, place.name
                boxes.append([place.box.offset, place.box.shape])
    return found


def state(live: Live) -> dict[str, Any]:
    """All that the model computes with: tensors, packed copies, products of each kernel."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase

    from fp8rl.sync.fingerprint import fingerprint

    found: dict[str, Any] = {}
    for kind in (live.model.named_parameters, live.model.named_buffers):
        found |= {name: fingerprint(tensor.data) for name, tensor in kind()}
    for prefix, module in live.model.named_modules():
        width = getattr(module, "input_size_per_partition", getattr(module, "input_size", None))
        if width is not None:
            x = torch.randn(3, width, generator=torch.Generator().manual_seed(width)).bfloat16()
            bias = module.bias if isinstance(module, LinearBase) else None
            found[f"{prefix}.product"] = fingerprint(module.quant_method.apply(module, x, bias))
        if isinstance(module, RoutedExperts):
            experts = module.quant_method.moe_kernel.fused_experts
            for scale in ("w1_scale", "w2_scale"):
                if getattr(experts, scale) is not None:
                    found[f"{prefix}.{scale}"] = fingerprint(getattr(experts, scale))
    return found


def _damage(live: Live, damage: Damage, sent: dict[str, torch.Tensor]) -> list[str]:
    from fp8rl.sync.engine_state import differences

    undo = damage(live.model)
    found = differences(live.model, sent)
    undo()
    return found


def _name(line: str) -> str:
    return line.partition(": ")[0]


def _off(parts: dict[str, tuple[str, ...]], live: Live) -> Iterable[str]:
    """Planned weights that are not in exactly one unit, or the reverse."""
    planned = [tensor.name for tensor in live.plan.engine_tensors()]
    named = [name for names in parts.values() for name in names]
    return {name for name in {*planned, *named} if planned.count(name) + named.count(name) != 2}


def main(names: list[str]) -> None:
    """Run the cases named; "refusals" and "ranks" are two more."""
    others = {"refusals": refusals, "ranks": lambda: as_ranks(RANKS)}
    found = {name: others[name]() if name in others else run(CASES[name]) for name in names}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
