"""The ranks of test_qkv_ranks.py, real Gloo processes: `python -m tests.sync.qkv_ranks FOLDER`.

The same model and the same eight rows in every layout. Each rank writes what it observed of each
layout after the reduction, and what mistakes were answered with, to FOLDER/RANK.json; at last one
is killed in the middle of a reduction.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import start_processes

from fp8rl.quant import AttentionShape, KVObservation, KVObserver, KVScales
from fp8rl.quant.shard_agreement import Peers
from fp8rl.sync import MegatronQKV
from fp8rl.trainer.megatron_cpu import cpu_stands_in, use_still_rng_tracker
from tests.sync.qkv_models import (
    PackedAttention,
    causal,
    config,
    gpt_model,
    packed_params,
    sequences,
)

RANKS, LAYERS, KILLED = 4, 4, 3
TOKENS, REAL = sequences()
ROWS = 2  # of a micro-batch


class Layout(NamedTuple):
    """How a model and its rows lie over the ranks; what is left of them is data parallel."""

    tp: int = 1
    pp: int = 1
    chunks: int = 1
    cp: int = 1
    packed: bool = False


LAYOUTS = {
    "dp4": Layout(),
    "tp2 dp2": Layout(tp=2),
    "pp2 dp2": Layout(pp=2),
    "tp2 pp2": Layout(tp=2, pp=2),
    "tp4, each key head on two ranks": Layout(tp=4),
    "pp2 dp2, two chunks a rank": Layout(pp=2, chunks=2),
    "dp4, packed": Layout(packed=True),
    "cp2 dp2, packed": Layout(cp=2, packed=True),
    "tp2 cp2, packed": Layout(tp=2, cp=2, packed=True),
}


@contextmanager
def laid_out(layout: Layout) -> Iterator[list[Any]]:
    """This rank's part of the model, as a list of chunks."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.chunks if layout.chunks > 1 else None,
        context_parallel_size=layout.cp,
    )
    use_still_rng_tracker()
    whole = config(tensor_parallel=layout.tp, pipeline_parallel=layout.pp)
    settings: dict[str, Any] = {"context_parallel_size": layout.cp}
    stages: list[int | None] = [None]
    if layout.chunks > 1:
        settings["virtual_pipeline_model_parallel_size"] = layout.chunks
        stages = list(range(layout.chunks))
    attention = PackedAttention if layout.packed else None
    with cpu_stands_in():
        yield [gpt_model(whole, attention, stage, **settings).eval() for stage in stages]
    parallel_state.destroy_model_parallel()


def observer() -> KVObserver:
    """One that keeps all there is to reduce."""
    in_use = KVScales.from_amax(torch.full((LAYERS, 3), 2.0), version=0, tokens=1)
    return KVObserver(AttentionShape(LAYERS, 4, 2), histogram=True, in_use=in_use)


def my_rows() -> slice:
    """This rank's rows: its data-parallel share of all."""
    from megatron.core import parallel_state

    rank = parallel_state.get_data_parallel_rank()
    size = len(TOKENS) // parallel_state.get_data_parallel_world_size()
    return slice(rank * size, (rank + 1) * size)


@torch.no_grad()
def observe(chunks: list[Any], layout: Layout, rows: slice) -> KVObservation:
    """Show this rank's layers and heads on some rows, by Megatron's own schedule."""
    seer = observer()
    with MegatronQKV(chunks).watch(seer) as watch:
        if layout.packed:
            run_packed(chunks[0], rows)
        else:
            run_padded(chunks, rows, watch)
    return seer.observation()


def run_padded(chunks: list[Any], rows: slice, watch: Any) -> None:
    """Micro-batches of rows with garbage in their padding, through the pipeline."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward(data: Iterator[slice], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        micro = next(data)
        watch.token_mask = REAL[micro]
        tokens = TOKENS[micro]
        output = model(tokens, torch.arange(12).expand_as(tokens), causal(12))
        return output, lambda logits, non_loss_data: None

    micros = [slice(i, i + ROWS) for i in range(rows.start, rows.stop, ROWS)]
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(micros) for _ in chunks],
        model=chunks,
        num_microbatches=len(micros),
        seq_length=12,
        micro_batch_size=ROWS,
        forward_only=True,
        collect_non_loss_data=True,
    )


def run_packed(model: Any, rows: slice) -> None:
    """Rows packed one after another, each with room for a multiple of 4 tokens.

    Of each row a context-parallel rank r of C holds the chunks r and 2C - 1 - r of 2C.
    """
    from megatron.core import parallel_state

    rank = parallel_state.get_context_parallel_rank()
    ranks = parallel_state.get_context_parallel_world_size()
    lengths = REAL[rows].sum(1).tolist()
    rooms = [-(-length // 4) * 4 for length in lengths]
    mine = [rank, 2 * ranks - 1 - rank] if ranks > 1 else [0, 1]
    tokens, positions = [], []
    for row, room in zip(TOKENS[rows], rooms, strict=True):
        chunks = torch.arange(room).chunk(2 * ranks)
        here = torch.cat([chunks[c] for c in mine])
        tokens.append(row[here])
        positions.append(here)
    params = packed_params(lengths, rooms)
    model(torch.cat(tokens)[None], torch.cat(positions)[None], None, packed_seq_params=params)


def answer(call: Callable[[], object]) -> str:
    """The error that a mistake is answered with."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals(rank: int) -> dict[str, str]:
    """What each mistake of one rank is answered with on this rank."""
    layout = Layout()
    found = {}
    with laid_out(layout) as chunks:
        rows = my_rows()
        seer, source = observer(), MegatronQKV(chunks)
        if rank == 1:
            del source._layers[2]
        with source.watch(seer) as watch, torch.no_grad():
            run_padded(chunks, rows, watch)
        found["a layer left out"] = answer(lambda: seer.observation().reduced().amax())

        if rank == 2:
            chunks[0].decoder.layers[1].self_attention.k_layernorm.weight.data[5] = torch.nan
        dirty = observe(chunks, layout, rows)
        found["nan"] = answer(lambda: dirty.reduced().amax())

        other = AttentionShape(LAYERS + (rank == 2), 4, 2)
        clean = KVObserver(other).observation()
        found["another shape"] = answer(clean.reduced)
        kind = KVObserver(AttentionShape(LAYERS, 4, 2), histogram=rank == 0)
        found["another kind"] = answer(kind.observation().reduced)
    return found


def lose_a_rank(rank: int) -> dict[str, Any]:
    """One rank is killed between the two collectives of a reduction; what the others get."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == KILLED:
        Peers.total = die  # type: ignore[assignment, method-assign]
    seen = observer().observation()
    began = time.monotonic()
    message = answer(seen.reduced)
    return {"message": message, "seconds": time.monotonic() - began}


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
    facts: dict[str, Any] = {}
    for packed in (False, True):
        with laid_out(Layout(packed=packed)) as chunks:  # each rank alone, on all rows
            if rank == 0:
                alone = observe(chunks, Layout(packed=packed), slice(0, len(TOKENS)))
                facts["one, packed" if packed else "one"] = alone.to_json()
    for name, layout in LAYOUTS.items():
        with laid_out(layout) as chunks:
            facts[name] = observe(chunks, layout, my_rows()).reduced().to_json()
            if name == "dp4":
                uneven = [slice(0, 4), slice(4, 8), slice(0, 0), slice(0, 0)][rank]
                found = observe(chunks, layout, uneven) if uneven.stop else observer().observation()
                facts["dp4, two without rows"] = found.reduced().to_json()
    facts["refusals"] = refusals(rank)
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    (folder / f"{rank}.lost.json").write_text(json.dumps(lose_a_rank(rank)))


if __name__ == "__main__":
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.pipeline_parallel  # noqa: F401

    # Forked before any thread of torch runs, so that all is imported once.
    ranks = start_processes(
        main, (Path(sys.argv[1]),), nprocs=RANKS, start_method="fork", join=False
    )
    for process in ranks.processes:
        process.join()
