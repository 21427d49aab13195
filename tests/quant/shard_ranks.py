"""The ranks of the sharded tests, real Gloo processes: `python shard_ranks.py FOLDER`.

Each writes its parts to FOLDER/RANK.safetensors, and FOLDER/RANK.json with what was refused, how
much was said, and the random cases that came out wrong.
"""

import dataclasses
import datetime
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes

from fp8rl.quant import quantize_blockwise
from fp8rl.quant.shard_layout import Box, ShardLayout
from fp8rl.quant.sharded import QuantizedShard, WeightShard, quantize_shards

RANKS = 4
PAIR = (1, 3)  # a group that is not the world
RANDOM_CASES = 60
MASTER, EXPORT = {"fp32_as": "master"}, {"fp32_as": "export"}
Options = dict[str, Any]


class Case(NamedTuple):
    """A weight, how it is divided, and how it is quantized."""

    layout: ShardLayout
    dtype: torch.dtype = torch.bfloat16
    options: Options = {}  # noqa: RUF012


def grid(shape: tuple[int, int], row: int, column: int) -> ShardLayout:
    """Four parts that meet in one point."""
    n, k = shape
    rows, columns = ((0, row), (row, n - row)), ((0, column), (column, k - column))
    boxes = [Box((r, c), (h, w)) for r, h in rows for c, w in columns]
    return ShardLayout(shape, tuple(boxes))


chunk, split, fp32 = ShardLayout.chunk, ShardLayout.split, torch.float32
CASES = {
    "whole blocks": Case(chunk((512, 300), 0, RANKS)),
    "rows, as FSDP": Case(chunk((301, 257), 0, RANKS)),
    "rows, one rank empty": Case(chunk((5, 300), 0, RANKS)),
    "rows, four ranks in one block": Case(split((100, 140), 0, [10, 40, 20, 30])),
    "rows, cut anywhere": Case(split((700, 130), 0, [1, 383, 129, 187])),
    "columns, as tensor parallel": Case(chunk((130, 300), 1, RANKS)),
    "columns, cut anywhere": Case(split((200, 700), 1, [129, 0, 570, 1])),
    "grid, one block of four": Case(grid((300, 310), 150, 200)),
    "grid, three blocks high": Case(grid((500, 310), 420, 128)),
    "experts": Case(chunk((3, 130, 140), 0, RANKS)),
    "experts, rows": Case(chunk((3, 200, 140), 1, RANKS)),
    "experts, columns": Case(chunk((2, 130, 333), 2, RANKS)),
    "nothing": Case(chunk((0, 128), 0, RANKS)),
    "fp16": Case(chunk((301, 257), 0, RANKS), torch.float16),
    "fp32, master": Case(chunk((301, 257), 0, RANKS), fp32, MASTER),
    "fp32, export": Case(chunk((301, 257), 0, RANKS), fp32, EXPORT),
    "fp32 scales": Case(grid((300, 310), 150, 200), options={"scale_format": "fp32"}),
    "small blocks": Case(chunk((61, 90), 0, RANKS), options={"block_size": (5, 7)}),
    "rows of groups": Case(chunk((61, 150), 1, RANKS), options={"block_size": (1, 32)}),
}
PAIR_CASE = Case(chunk((333, 200), 0, len(PAIR)))
FSDP_SHAPE = (331, 140)


def whole(name: str, case: Case) -> torch.Tensor:
    """The weight of a case: magnitudes of all sizes, the same on every rank."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    x = torch.randn(case.layout.shape, generator=generator)
    size = torch.randint(-12, 12, case.layout.shape, generator=generator)
    x = x * torch.exp2(size.float())
    x[..., :40, :40] = 0.0
    return x.to(case.dtype)


def part(name: str, case: Case, rank: int) -> WeightShard:
    """The part of a rank, cut out of the whole."""
    return WeightShard(name, whole(name, case)[case.layout.boxes[rank].slices], case.layout)


def quantize_all(rank: int) -> list[QuantizedShard]:
    """All cases, those of the same options in one call."""
    calls: dict[str, tuple[Options, list[WeightShard]]] = {}
    for name, case in CASES.items():
        calls.setdefault(str(case.options), (case.options, []))[1].append(part(name, case, rank))
    return [q for options, shards in calls.values() for q in quantize_shards(shards, **options)]


def fsdp_weight() -> torch.Tensor:
    """The fp32 master weight of a linear."""
    return torch.randn(FSDP_SHAPE, generator=torch.Generator().manual_seed(5))


def quantize_fsdp() -> QuantizedShard:
    """A linear sharded by FSDP2 itself."""
    linear = torch.nn.Linear(FSDP_SHAPE[1], FSDP_SHAPE[0], bias=False)
    linear.weight.data.copy_(fsdp_weight())
    fully_shard(linear, mesh=init_device_mesh("cpu", (RANKS,)))
    local = linear.weight.to_local()
    layout = ShardLayout.chunk(tuple(linear.weight.shape), 0, RANKS)
    return quantize_shards([WeightShard("fsdp", local, layout)], **EXPORT)[0]


def random_case(seed: int) -> Case:
    """Cuts, sizes, types and blocks of any kind."""
    rng = random.Random(seed)
    lead = rng.choice([(), (), (rng.randint(1, 3),)])
    shape = (*lead, rng.randint(1, 60), rng.randint(1, 60))
    dim = rng.randrange(len(shape))
    cuts = sorted(rng.randint(0, shape[dim]) for _ in range(RANKS - 1))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, shape[dim]], strict=True)]
    options = {
        "block_size": rng.choice([(16, 16), (16, 1), (1, 16), (7, 5), (64, 64)]),
        "scale_format": rng.choice(["pow2", "fp32"]),
        "fp32_as": rng.choice(["master", "export"]),
    }
    dtype = rng.choice([torch.bfloat16, torch.float16, torch.float32])
    return Case(split(shape, dim, sizes), dtype, options)


def wrong_random_cases(rank: int) -> list[int]:
    """Seeds whose part is not that of the whole, quantized as one, in a model's default dtype."""
    wrong = []
    for seed in range(RANDOM_CASES):
        case = random_case(seed)
        mine = part(str(seed), case, rank)
        torch.set_default_dtype(torch.bfloat16)
        found = quantize_shards([mine], **case.options)[0]
        torch.set_default_dtype(torch.float32)
        want = quantize_blockwise(whole(str(seed), case), **case.options)
        data = want.data.view(torch.uint8)[found.box.slices]
        scales = want.scale_inv[found.box.blocks(found.block_size).slices]
        same = torch.equal(found.data.view(torch.uint8), data)
        if not (same and (0 in data.shape or torch.equal(found.scale_inv, scales))):
            wrong.append(seed)
    return wrong


def previous_scales(name: str, case: Case) -> torch.Tensor:
    """Scales that the whole could have had: from an eighth to eight times its own."""
    fresh = quantize_blockwise(whole(name, case), **case.options).scale_inv
    generator = torch.Generator().manual_seed(7)
    shift = torch.randint(-3, 4, fresh.shape, generator=generator)
    return (fresh * torch.exp2(shift.float())).clamp(2.0**-126, 2.0**127)


def sticky_part(name: str, case: Case, rank: int, *, shift: int = 0) -> WeightShard:
    """The part of a rank with its previous scales, `shift` binades from those of the whole."""
    box = case.layout.boxes[rank].blocks(case.options.get("block_size", (128, 128)))
    previous = previous_scales(name, case)[box.slices] * 2.0**shift
    return dataclasses.replace(part(name, case, rank), previous_scale_inv=previous)


def sticky_names() -> list[str]:
    """The cases that can have sticky scales."""
    return [name for name, case in CASES.items() if "scale_format" not in case.options]


def wrong_sticky_cases(rank: int) -> list[str]:
    """Cases whose part, with previous scales, is not that of the whole with them."""
    wrong = []
    for name in sticky_names():
        case = CASES[name]
        found = quantize_shards([sticky_part(name, case, rank)], **case.options)[0]
        previous = previous_scales(name, case)
        want = quantize_blockwise(whole(name, case), previous_scale_inv=previous, **case.options)
        data = want.data.view(torch.uint8)[found.box.slices]
        scales = want.scale_inv[found.box.blocks(found.block_size).slices]
        same = torch.equal(found.data.view(torch.uint8), data)
        if not (same and torch.equal(found.scale_inv, scales)):
            wrong.append(name)
    return wrong


def refusals(rank: int, pair: dist.ProcessGroup) -> dict[str, str]:
    """What each mistake is answered with on this rank; a good call after each must work."""
    good = Case(chunk((301, 257), 0, RANKS))
    other = Case(split((301, 257), 0, [76, 76, 70, 79]))  # ranks 0 and 1 hold the same as in `good`
    names = ("a", "b")

    def shards(case: Case = good, names: tuple[str, ...] = names) -> list[WeightShard]:
        return [part(name, case, rank) for name in names]

    def call(shards: list[WeightShard], **options: Any) -> Callable[[], object]:
        return lambda: quantize_shards(shards, **options)

    def broken(at: dict[str, list[tuple[int, int]]], value: float) -> Callable[[], object]:
        found = []
        for name in names:
            x = whole(name, good)
            for index in at.get(name, []):
                x[index] = value
            found.append(WeightShard(name, x[good.layout.boxes[rank].slices], good.layout))
        return call(found)

    def only(at: int, bad: Callable[[], object]) -> Callable[[], object]:
        return bad if rank == at else call(shards())

    wide = [WeightShard(s.name, s.local.double(), s.layout) for s in shards()]
    single = [WeightShard(s.name, s.local.float(), s.layout) for s in shards()]
    cut = [WeightShard(s.name, s.local[1:], s.layout) for s in shards()]
    odd = dataclasses.replace(shards()[0], previous_scale_inv=torch.ones(1, 1))
    mistakes = {
        "nan inside": broken({"b": [(160, 250)]}, torch.nan),  # rank 2's own block
        "nan shared": broken({"a": [(151, 3)]}, torch.nan),
        "many infs": broken({"b": [(0, 0)], "a": [(300, 1), (77, 200), (77, 2)]}, -torch.inf),
        "other format": only(1, call(shards(), scale_format="fp32")),
        "other order": only(2, call(shards(names=("b", "a")))),
        "one fewer": only(3, call(shards(names=("a",)))),
        "none": only(3, call([])),
        "other layout": only(0, call(shards(other))),
        "unknown format": only(1, call(shards(), scale_format="e8m0")),
        "wide": only(2, call(wide)),
        "single": only(1, call(single, fp32_as="master")),
        "unsaid": only(1, call(single)),
        "cut": only(2, call(cut)),
        "odd previous": only(2, call([odd, odd])),
        "some sticky": only(3, call([sticky_part(name, good, rank) for name in names])),
        "three parts": call([WeightShard("a", whole("a", good), chunk((301, 257), 0, 3))]),
        "outsider": lambda: quantize_shards([], group=pair),
    }
    answers = {}
    for mistake, make in mistakes.items():
        try:
            make()
        except ValueError as error:
            answers[mistake] = f"{type(error).__name__}: {error}"
        quantize_shards(shards())
    return answers


def traffic(rank: int) -> dict[str, list[int]]:
    """Bytes of each collective, by case, seen on their way to the real ones."""
    said: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        said.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    found = {}
    dist.all_reduce = counted
    for name, case in CASES.items():
        said.clear()
        quantize_shards([part(name, case, rank)], **case.options)
        found[name] = list(said)
    dist.all_reduce = all_reduce
    return found


def main(rank: int, folder: Path) -> None:
    """Run everything, in the same order on all ranks."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    pair = dist.new_group(list(PAIR))
    parts = [*quantize_all(rank), quantize_fsdp()]
    if rank in PAIR:
        mine = part("pair", PAIR_CASE, PAIR.index(rank))
        parts += quantize_shards([mine], group=pair)
    apart = sticky_part("rows, cut anywhere", CASES["rows, cut anywhere"], rank, shift=rank % 2)
    parts.append(quantize_shards([dataclasses.replace(apart, name="ranks that differ")])[0])
    tensors = {}
    for q in parts:
        tensors[f"{q.name}.data"], tensors[f"{q.name}.scale_inv"] = q.data, q.scale_inv
    save_file(tensors, folder / f"{rank}.safetensors")
    facts = {
        "refusals": refusals(rank, pair),
        "traffic": traffic(rank),
        "wrong": wrong_random_cases(rank),
        "wrong_sticky": wrong_sticky_cases(rank),
    }
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked before any thread of torch runs, so that it is imported once.
    start_processes(main, (Path(sys.argv[1]),), nprocs=RANKS, start_method="fork")
