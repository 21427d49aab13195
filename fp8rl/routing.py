"""Whether the engine's routers and the trainer's send a token to the same experts.

A token that goes to another expert is computed by other weights, however little its inputs were
rounded. With the k experts E(t, l) of token t in layer l,

    agreement = mean over t, l of |E_engine & E_trainer| / k        top-1: of [first choices equal]

over all tokens of some of the step's sequences but the last of each, whose routes decide nothing
that was sampled. Both are asked for one forward of these sequences, under the same version: the
engine reads them whole (prefill), with its FP8 weights and KV cache. In its decoding steps other
kernels may round otherwise, so that a tie may break otherwise too: routers work in BF16, where two
experts' logits are often equal, and equal models agree a little less than always.

Left out: replaying the engine's routes in the trainer (R3, arXiv 2510.11370), for which it would
have to return those of every token that it samples.
"""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from fp8rl.batch import TokenBatch
from fp8rl.engine.rollout import RolloutEngine
from fp8rl.run_dir import Metrics
from fp8rl.trainer.megatron import MegatronTrainer
from fp8rl.trainer.micro_batch import bounded

PROBE_TOKENS = 512  # 4,096 choices in a model of 4 layers with 2 experts a token


def compare_routes(
    trainer: MegatronTrainer, engine: RolloutEngine | None, batch: TokenBatch, version: int
) -> Metrics:
    """Ask both for the routes of some sequences of a batch; a collective of the trainer's ranks.

    Args:
        trainer: whose weights are ``version``.
        engine: rank 0's; None elsewhere, where there are no metrics.
        batch: whose sequences to take, of PROBE_TOKENS tokens in all, or one.
        version: of the weights that both are to have.

    Raises:
        StaleWeightsError: the engine has older weights. EngineError: it does not show its routes.
        RoutingError: the model has no experts.
    """
    probe = bounded(batch, max(PROBE_TOKENS, int(batch.lengths.max())))
    ours = trainer.observe_routes(probe)
    if engine is None:
        return {}
    rows = zip(probe.tokens.tolist(), probe.lengths.tolist(), strict=True)
    theirs = engine.observe_routes([row[:length] for row, length in rows], version=version)
    decides = probe.real.clone()
    decides[:, :-1] &= probe.real[:, 1:]
    decides[:, -1] = False
    return agreement(torch.cat([found[:-1] for found in theirs]), ours[decides])


def agreement(
    engine: Int64[Tensor, "tokens layers k"], trainer: Int64[Tensor, "tokens layers k"]
) -> Metrics:
    """Compare two choices of experts, token by token; the first of each k is the first choice."""
    same = (engine[..., :, None] == trainer[..., None, :]).any(-1).double().mean(-1)
    metrics: Metrics = {
        "router/agreement": float(same.mean()),
        "router/top1_agreement": float((engine[..., 0] == trainer[..., 0]).double().mean()),
        "router/tokens": len(engine),
    }
    by_layer = {f"router/agreement/{n}": float(x) for n, x in enumerate(same.mean(0))}
    return metrics | by_layer
