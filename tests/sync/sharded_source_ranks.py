"""The ranks of test_sharded_source.py, real Gloo processes: `python -m ... FOLDER WHAT RANK`.

One model, held in other parts each time. Each rank writes what it found to FOLDER/RANK.json. WHAT
is `core`, `all`, or the place in a pass where RANK dies; the others write what they got and live on
until all have.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import start_processes

from fp8rl.quant import (
    Box,
    QuantizedTensor,
    QuantPlan,
    dequantize_blockwise,
    quantize_blockwise,
)
from fp8rl.sync import shard_pass
from fp8rl.sync.local_shard import LocalShard
from fp8rl.sync.sharded_source import ShardedSource
from fp8rl.sync.source import TensorMeta
from fp8rl.sync.trainer_ranks import TrainerRanks
from tests.helpers import hf_config
from tests.sync.sharded_model import (
    BF16_PLAN,
    EMBEDDING,
    GATE,
    LAYOUTS,
    METADATA,
    NORM,
    OUT,
    PLAN,
    RANKS,
    WEIGHTS,
    aligned,
    gathered,
    layout,
    shards,
    whole,
    wrong,
)

PAIR = (1, 3)  # a group that is not the world
Shards = list[LocalShard]


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count all bytes that torch.distributed is given to send; calls not counted are refused."""
    said = {"bytes": 0}
    kept = dict(vars(dist))

    def reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        said["bytes"] += tensor.nbytes
        return kept["all_reduce"](tensor, *args, **kwargs)

    def batch(ops: list[Any]) -> Any:
        said["bytes"] += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return kept["batch_isend_irecv"](ops)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("bytes moved by another collective, which is not counted here")

    others = [n for n in kept if n.startswith(("all_", "broadcast", "reduce", "scatter", "gather"))]
    for name in [*others, "send", "recv"]:
        setattr(dist, name, refuse)
    dist.all_reduce, dist.batch_isend_irecv = reduce, batch  # type: ignore[assignment]
    try:
        yield said
    finally:
        for name in [*others, "send", "recv", "batch_isend_irecv"]:
            setattr(dist, name, kept[name])


def in_every_layout(rank: int, names: Sequence[str]) -> dict[str, Any]:
    """What is wrong of each layout for each set of destinations, and what it costs."""
    found: dict[str, Any] = {"wrong": {}, "bytes": {}}
    want, want_bf16 = gathered(PLAN, WEIGHTS), gathered(BF16_PLAN, WEIGHTS)
    for name in names:
        source = ShardedSource(METADATA, shards(layout(name), rank))
        got = dict(source.encoded(PLAN, to=[3, 1]))
        found["wrong"][f"{name}, to two"] = wrong(got, want if rank in (1, 3) else {})
        found["wrong"][f"{name}, iterated"] = wrong(dict(source), dict(WEIGHTS))
        sent = source.wire_bytes
        with counted() as fp8:
            got = dict(source.encoded(PLAN, to=[0]))
        found["wrong"][f"{name}, to one"] = wrong(got, want if rank == 0 else {})
        sent = source.wire_bytes - sent
        with counted() as bf16:
            got = dict(source.encoded(BF16_PLAN, to=[0]))
        found["wrong"][f"{name}, bf16"] = wrong(got, want_bf16 if rank == 0 else {})
        found["bytes"][name] = [fp8["bytes"], bf16["bytes"], sent]
    return found


def masters(rank: int) -> dict[str, list[str]]:
    """fp32 weights, as masters and as what is exported; and as they are, iterated."""
    tensors = {name: tensor.float() * 1.003 for name, tensor in WEIGHTS.items()}
    metadata = [TensorMeta(meta.name, torch.float32, meta.shape) for meta in METADATA]
    source = ShardedSource(metadata, shards(layout("random 1"), rank, tensors))
    found = {"iterated": wrong(dict(source), tensors)}
    for fp32_as in ("master", "export"):
        want = gathered(PLAN, tensors, fp32_as=fp32_as) if rank == 0 else {}
        found[fp32_as] = wrong(dict(source.encoded(PLAN, to=[0], fp32_as=fp32_as)), want)
    plan = replace(PLAN, scale_format="fp32")
    want = gathered(plan, tensors, fp32_as="export", scale_format="fp32") if rank == 0 else {}
    found["export, fp32 scales"] = wrong(dict(source.encoded(plan, to=[0], fp32_as="export")), want)
    return found


def in_a_pair(rank: int) -> list[str]:
    """A group of two of the ranks; destinations are its ranks, not the world's."""
    group = dist.new_group(list(PAIR))
    if rank not in PAIR:
        return []
    mine = PAIR.index(rank)
    boxes = layout("rows", ranks=len(PAIR))
    source = ShardedSource(METADATA, shards(boxes, mine), group=group)
    want = gathered(PLAN, WEIGHTS) if mine == 1 else {}
    return wrong(dict(source.encoded(PLAN, to=[1])), want)


def in_fp8(boxes: dict[str, Any], rank: int, formats: Sequence[str]) -> Shards:
    """Weights held in FP8 as by Transformer Engine; format of the scales of each rank, or bf16."""
    found = []
    for shard in shards(boxes, rank):
        if PLAN.is_quantized(shard.name) and formats[rank] != "bf16":
            q = quantize_blockwise(WEIGHTS[shard.name], scale_format=formats[rank])  # type: ignore[arg-type]
            scale_inv = q.scale_inv[shard.box.blocks((128, 128)).slices]
            part = QuantizedTensor(q.data[shard.box.slices], scale_inv, (128, 128), q.scale_format)
            shard = replace(shard, read=lambda part=part: part)
        found.append(shard)
    return found


def answer(call: Callable[[], object]) -> str:
    """The error that a mistake is answered with, and how soon."""
    began = time.monotonic()
    try:
        call()
    except (ValueError, RuntimeError, OSError) as error:
        assert time.monotonic() - began < 5
        return f"{type(error).__name__}: {error}"
    return "nothing"


def run(source: ShardedSource, **arguments: Any) -> None:
    """A whole pass."""
    arguments = {"plan": PLAN, "to": [0, 2]} | arguments
    for _ in source.encoded(**arguments):
        pass


def leave(source: ShardedSource, rank: int, after: int) -> None:
    """A pass that a destination leaves after some tensors."""
    with closing(source.encoded(PLAN, to=[0, 2])) as tensors:  # type: ignore[type-var]
        for i, _ in enumerate(tensors):
            if rank == 2 and i + 1 == after:
                return


def changed(rank: int, at: int, which: str, **changes: Any) -> Shards:
    """The rows of a rank; on rank `at` one shard is another."""
    mine = shards(layout("rows"), rank)
    return [replace(s, **changes) if (rank, s.name) == (at, which) else s for s in mine]


def spoiled(rank: int, spots: dict[str, list[tuple[int, ...]]], boxes: str = "rows") -> Shards:
    """Weights with Inf at some places."""
    tensors = dict(WEIGHTS)
    for name, places in spots.items():
        tensors[name] = WEIGHTS[name].clone()
        for place in places:
            tensors[name][place] = torch.inf
    return shards(layout(boxes), rank, tensors)


def refusals(rank: int, between: bool) -> dict[str, str]:
    """What each mistake is answered with on this rank; a good pass must work then.

    between: after every one of them.
    """
    rows, pow2 = layout("rows"), ["pow2"] * RANKS

    def build(mine: Shards, metadata: Sequence[TensorMeta] = METADATA) -> Callable[[], object]:
        return lambda: ShardedSource(metadata, mine)

    def read(mine: Shards) -> Callable[[], object]:
        return lambda: run(ShardedSource(METADATA, mine))

    def fail() -> Tensor:
        raise OSError("no such parameter")

    moved = Box((1, 0), (128, 256))
    other = METADATA if rank != 1 else [replace(METADATA[0], shape=(65, 256)), *METADATA[1:]]
    mine = shards(rows, rank)
    good = ShardedSource(METADATA, mine)
    short = WEIGHTS[GATE][:100]
    nan_code = in_fp8(aligned(), rank, pow2)
    for shard in nan_code:
        if shard.name == GATE and rank == 1:
            part = shard.read()
            assert isinstance(part, QuantizedTensor)
            part.data.view(torch.uint8)[3, 5] = 0xFF
    mistakes: dict[str, Callable[[], object]] = {
        "a gap": build([s for s in mine if (rank, s.name) != (2, GATE)]),
        "an overlap": build(changed(rank, 1, GATE, box=moved)),
        "outside": build(changed(rank, 3, GATE, box=replace(moved, offset=(400, 0)))),
        "unknown": build(changed(rank, 3, GATE, name="model.gate")),
        "two boxes": build(mine + [s for s in mine if (rank, s.name) == (3, OUT)]),
        "other metadata": build(mine, other),
        "shape": read(changed(rank, 1, GATE, read=lambda: short)),
        "dtype": read(changed(rank, 1, NORM, read=lambda: WEIGHTS[NORM][64:128].float())),
        "breaks": read(changed(rank, 3, OUT, read=fail)),
        "inf in a weight": read(spoiled(rank, {GATE: [(300, 7), (20, 3)]})),
        "inf in a weight of one rank": read(spoiled(rank, {GATE: [(300, 7)]}, "one rank")),
        "inf in a norm": read(spoiled(rank, {NORM: [(200,), (70,)]})),
        "inf in two": read(spoiled(rank, {EMBEDDING: [(40, 2), (5, 5), (5, 6)], OUT: [(0, 0)]})),
        "left at once": lambda: leave(good, rank, 1),
        "left at the end": lambda: leave(good, rank, len(METADATA)),
        "other destinations": lambda: run(good, to=[0] if rank else [0, 1]),
        "no rank": lambda: run(good, to=[0, RANKS]),
        "other plan": lambda: run(good, plan=PLAN if rank != 3 else BF16_PLAN),
        "plan of another": lambda: run(good, plan=QuantPlan.from_hf_config(hf_config())),
        "fp8 cut within a block": read(in_fp8(rows, rank, pow2)),
        "fp8 and bf16": read(in_fp8(aligned(), rank, ["pow2", "bf16", "pow2", "pow2"])),
        "other scales": read(in_fp8(aligned(), rank, ["pow2", "pow2", "fp32", "pow2"])),
        "nan in fp8": read(nan_code),
    }
    answers = {}
    for mistake, make in mistakes.items():
        answers[mistake] = answer(make)
        if between:
            run(good)
    answers["none"] = answer(lambda: run(good))
    return answers


def held_in_fp8(rank: int) -> dict[str, list[str]]:
    """FP8 weights pass as they are; they are read back where the plan wants BF16."""
    source = ShardedSource(METADATA, in_fp8(aligned(), rank, ["pow2"] * RANKS))
    found = {}
    for name, plan in {"fp8": PLAN, "bf16": BF16_PLAN}.items():
        read_back = {
            n: dequantize_blockwise(quantize_blockwise(t)) if PLAN.is_quantized(n) else t
            for n, t in WEIGHTS.items()
        }
        want = gathered(PLAN, WEIGHTS) if name == "fp8" else read_back
        found[name] = wrong(dict(source.encoded(plan, to=[3])), want if rank == 3 else {})
    found["iterated"] = wrong(dict(source), read_back)
    return found


def memory(rank: int) -> int:
    """Bytes by which this rank grows in a pass over 160 MiB of BF16 on rank 1, to rank 0."""
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (512, 1024) for i in range(160)}
    plan = QuantPlan.from_tensors(shapes)
    metadata = [TensorMeta(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    weight = torch.randn(512, 1024).bfloat16()
    mine = [LocalShard(name, whole(s), lambda: weight) for name, s in shapes.items() if rank == 1]
    source = ShardedSource(metadata, mine)
    shard_pass.BUCKET_BYTES = 2**22  # type: ignore[misc]
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = high_water()
    run(source, plan=plan, to=[0])
    return high_water() - before


def high_water() -> int:
    """The most memory that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def lose(rank: int, killed: int, at: str) -> dict[str, Any]:
    """One rank is killed in the midst of a pass; what the others get, without ending."""

    def die(*_: object) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    mine = shards(layout("rows"), rank)
    shard_pass.BUCKET_BYTES = 2**20  # type: ignore[misc]
    source = ShardedSource(METADATA, changed(rank, killed, OUT, read=die) if at == "read" else mine)
    if (rank, at) == (killed, "move"):
        TrainerRanks.move = die  # type: ignore[method-assign]

    def use() -> None:
        for i, _ in enumerate(source.encoded(PLAN, to=[0])):
            if (rank, at, i) == (killed, "use", 3):
                die()

    began = time.monotonic()
    found: dict[str, Any] = {"error": answer(use), "seconds": time.monotonic() - began}
    found["again"] = answer(lambda: run(source))
    return found


def main(rank: int, folder: Path, what: str, killed: int) -> None:
    """Run everything, in the same order on all ranks."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    if what in ("core", "all"):
        facts: dict[str, Any] = {"memory": memory(rank)}
        shard_pass.BUCKET_BYTES = 2**20  # type: ignore[misc]  # so that the model takes several
        facts |= in_every_layout(rank, LAYOUTS[:2] if what == "core" else LAYOUTS)
        facts["wrong"]["a pair"] = in_a_pair(rank)
        facts["wrong"] |= {f"fp8, {name}": found for name, found in held_in_fp8(rank).items()}
        facts["wrong"] |= {f"fp32, {name}": found for name, found in masters(rank).items()}
        facts["refusals"] = refusals(rank, between=what == "all")
    else:
        facts = lose(rank, killed, what)
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    while what not in ("core", "all") and len(list(folder.glob("?.json"))) < RANKS - 1:
        time.sleep(0.05)  # none may learn of a death from the end of another


if __name__ == "__main__":
    # Forked before any thread of torch runs, so that it is imported once.
    arguments = (Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    context = start_processes(main, arguments, nprocs=RANKS, start_method="fork", join=False)
    assert context is not None
    for process in context.processes:
        process.join()
