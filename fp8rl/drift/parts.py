"""Where the difference of engine and trainer comes from, layer by layer: the numbers.

h[l] is the residual stream before layer l, E the engine's, T the trainer's own on the same tokens.
f is what the trainer's layer makes of a stream, and f_1, f_2, .. the same with one more of the
roundings that the engine does, in the order weights, activations, cache. All of them are given the
engine's stream, so that nothing of the layers before enters:

    total         rms(E[l+1] - T[l+1]) / rms(T[l+1])       what has come together up to here
    own           rms(E[l+1] - f(E[l])) / c                what this layer alone does otherwise
    weights, ..   rms(f_i(E[l]) - f_(i-1)(E[l])) / c       what one rounding does to it
    unexplained   rms(E[l+1] - f_n(E[l])) / c              what none does: order of sums, or a fault
    c = rms(f(E[l]) - E[l])                                what the layer adds to the stream

The vectors behind the parts add up to that of ``own``; their squares do as far as they are
uncorrelated. With experts, tokens whose experts change from one model to the next are counted under
``router`` in place of that part, and ``misrouted`` is the share of choices in which the engine's
router differs from its model, given the same stream.

Outside of the layers: ``embedding``, rms error of h[0]; ``head``, mean |log p_engine - log p| where
the trainer's last norm and head are given the engine's stream; ``logprob``, the same with the
trainer's own: what reaches the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fp8rl.run_dir import Metrics
from fp8rl.sync.streams import StreamObservation

TRAINER = "trainer"  # the first model: the trainer as it is
ROUNDINGS = ("weights", "activations", "cache")
PARTS = (*ROUNDINGS, "router", "unexplained")


def compare(
    engine: StreamObservation,
    free: StreamObservation,
    models: Mapping[str, StreamObservation],
    response: Bool[Tensor, " tokens"],
) -> Metrics:
    """Compare an engine with a trainer, layer by layer.

    Args:
        engine: what it shows of the probe's tokens.
        free: the trainer's own forward of them.
        models: forwards whose layers were given the engine's stream: ``trainer``, then those with
            ever more roundings, named by the last, in order.
        response: which of the tokens are followed by one that the policy generated.
    """
    metrics: Metrics = {
        "drift/tokens": len(engine.stream),
        "drift/logprob": _mean_abs(engine, free, response),
        "drift/head": _mean_abs(engine, [*models.values()][-1], response),
        "drift/embedding": _relative(engine, free, 0),
    }
    for layer in range(engine.stream.shape[1] - 1):
        found = _layer(layer, engine, models)
        found["total"] = _relative(engine, free, layer + 1)
        metrics |= {f"drift/{layer}/{name}": value for name, value in found.items()}
    return metrics


def _layer(
    layer: int, engine: StreamObservation, models: Mapping[str, StreamObservation]
) -> dict[str, float]:
    """The parts of one layer's own difference."""
    given = engine.stream[:, layer].float()
    seen = [*models.values(), engine]
    outputs = [one.stream[:, layer + 1].float() for one in seen]
    size = max(_rms(outputs[0] - given), torch.finfo(torch.float32).tiny)
    found = {"own": _rms(outputs[-1] - outputs[0]) / size}
    rerouted = 0.0
    names = [*models, "unexplained"][1:]
    for name, (a, b), (before, after) in zip(names, pairwise(seen), pairwise(outputs), strict=True):
        same = _same_routes(a, b, layer)
        difference = after - before
        found[name] = _rms(difference * same[:, None]) / size
        rerouted += (_rms(difference * ~same[:, None]) / size) ** 2
    if engine.routes is not None:
        found["router"] = rerouted**0.5
        found["misrouted"] = _misrouted(engine, seen[-2], layer)
    return found


def _same_routes(a: StreamObservation, b: StreamObservation, layer: int) -> Bool[Tensor, " tokens"]:
    """Tokens that both send to the same experts, in whatever order."""
    if a.routes is None or b.routes is None:
        return torch.ones(len(a.stream), dtype=torch.bool)
    one, other = a.routes[:, layer].sort(-1).values, b.routes[:, layer].sort(-1).values
    return (one == other).all(-1)


def _misrouted(a: StreamObservation, b: StreamObservation, layer: int) -> float:
    """The share of choices that differ."""
    assert a.routes is not None and b.routes is not None
    same = a.routes[:, layer, :, None] == b.routes[:, layer, None, :]
    return float(1 - same.any(-1).double().mean())


def _relative(a: StreamObservation, b: StreamObservation, point: int) -> float:
    ours, theirs = a.stream[:, point].float(), b.stream[:, point].float()
    return _rms(ours - theirs) / max(_rms(theirs), torch.finfo(torch.float32).tiny)


def _mean_abs(a: StreamObservation, b: StreamObservation, response: Tensor) -> float:
    return float((a.logprobs - b.logprobs)[response].double().abs().mean())


def _rms(x: Float[Tensor, "*shape"]) -> float:
    return float(x.double().square().mean().sqrt())
