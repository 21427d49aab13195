"""One probe of engine and trainer on the same tokens: one forward of the one, a few of the other.

The tokens are some sequences of the batch just rolled out: their log-probs enter the loss, and they
follow the policy where it goes. The live engine reads them whole, with the weights and scales that
it samples with; of its decoding steps other kernels may round otherwise. Then the trainer, with the
same weights: once by itself, and with its layers given the engine's stream once as it is, and once
more for each rounding of the engine that it does not do itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool
from torch import Tensor

from fp8rl.batch import TokenBatch
from fp8rl.config.rollout import BF16_WEIGHTS
from fp8rl.config.run import RunConfig
from fp8rl.drift.parts import TRAINER, compare
from fp8rl.engine.rollout import RolloutEngine
from fp8rl.quant import KVScales, QuantPlan, ScaleFormat, fake_quantize
from fp8rl.run_dir import Metrics
from fp8rl.sync.routing_megatron import MegatronRouters
from fp8rl.sync.streams import StreamObservation
from fp8rl.sync.streams_megatron import MegatronStreams
from fp8rl.trainer.megatron import MegatronTrainer, engine_activations
from fp8rl.trainer.micro_batch import bounded


@dataclass(frozen=True)
class Probe:
    """What is compared, on one trainer rank.

    engine: rank 0's; None elsewhere. plan: what it was started with.
    """

    config: RunConfig
    trainer: MegatronTrainer
    engine: RolloutEngine | None
    plan: QuantPlan

    def measure(self, batch: TokenBatch, version: int, scales: KVScales | None) -> Metrics:
        """Compare on some sequences of a batch: a collective of the trainer's ranks.

        Args:
            batch: whose sequences to take, ``drift.probe_tokens`` tokens in all, or one.
            version: of the weights that both have.
            scales: of the engine's KV cache; None where it is BF16.

        Returns:
            The metrics, the same on every rank.

        Raises:
            StaleWeightsError: the engine has other weights. EngineError: it does not show its
                layers. FakeQuantError: an FP8 block straddles tensor-parallel ranks.
        """
        limit = max(self.config.drift.probe_tokens, int(batch.lengths.max()))
        tokens = bounded(batch, limit)
        engine = self._ask_engine(tokens, version)
        decides = _decides(tokens)
        given = torch.zeros(*decides.shape, *engine.stream.shape[1:], dtype=torch.bfloat16)
        given[decides] = engine.stream
        free = self._forward(tokens)
        models = {name: self._forward(tokens, given, model) for name, model in self._models(scales)}
        return compare(engine, free, models, tokens.response_mask[:, 1:][decides])

    def _models(
        self, scales: KVScales | None
    ) -> Iterator[tuple[str, AbstractContextManager[None]]]:
        """The trainer, and what it is with each rounding of the engine that it lacks, in order."""
        yield TRAINER, nullcontext()
        rollout, rounds = self.config.rollout, self.config.trainer.precision == "bf16"
        weights = rounds and rollout.precision not in BF16_WEIGHTS
        activations = engine_activations(self.config)
        if weights:
            yield "weights", self._rounded(None)
        if weights and activations is not None:
            yield "activations", self._rounded(activations)
        if scales is not None:
            with_weights = self._rounded(activations) if weights else nullcontext()
            yield "cache", self._cached(with_weights, scales)

    @contextmanager
    def _rounded(self, activations: ScaleFormat | None) -> Iterator[None]:
        linears = self.trainer.source().linears()
        attached = fake_quantize(linears, self.plan, activations=activations)
        try:
            with attached.held():
                yield
        finally:
            attached.remove()

    @contextmanager
    def _cached(self, weights: AbstractContextManager[None], scales: KVScales) -> Iterator[None]:
        on_cpu = not torch.cuda.is_available()  # where vLLM's cache cuts off, unless it is ours
        truncates = on_cpu and self.config.rollout.activations != "fp8"
        with (
            weights,
            MegatronStreams(self.trainer.model).rounded_cache(scales, truncates=truncates),
        ):
            yield

    def _forward(
        self,
        batch: TokenBatch,
        given: Tensor | None = None,
        model: AbstractContextManager[None] | None = None,
    ) -> StreamObservation:
        """A forward of the trainer, its layers given a stream or their own."""
        from megatron.core import parallel_state as ranks

        groups = ranks.get_tensor_model_parallel_group(), ranks.get_model_parallel_group()
        routes = None
        with ExitStack() as stack:
            stack.enter_context(model or nullcontext())
            streams = stack.enter_context(MegatronStreams(self.trainer.model).watch(given))
            if self.config.model.is_moe:
                routes = stack.enter_context(MegatronRouters(self.trainer.model).watch())
            logprobs = self.trainer.score(batch, temperature=1.0).logprobs
        decides = _decides(batch)
        rows, width = decides.shape
        stream = streams.gathered(*groups)[:rows, :width][decides].bfloat16()
        chosen = routes.gathered(*groups)[:rows, :width][decides] if routes else None
        return StreamObservation(stream, logprobs[:, 1:][decides], chosen)

    def _ask_engine(self, batch: TokenBatch, version: int) -> StreamObservation:
        """Rank 0 asks; every rank is told."""
        text = b""
        if self.engine is not None:
            rows = zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True)
            prompts = [row[:length] for row, length in rows]
            routes = self.config.model.is_moe
            seen = self.engine.observe_streams(prompts, version=version, routes=routes)
            if dist.get_world_size() == 1:
                return seen
            text = json.dumps(seen.to_json()).encode()
        length = torch.tensor(len(text))
        dist.broadcast(length, src=0)
        data = torch.frombuffer(bytearray(text or bytes(int(length))), dtype=torch.uint8)
        dist.broadcast(data, src=0)
        return StreamObservation.from_json(json.loads(data.numpy().tobytes()))


def _decides(batch: TokenBatch) -> Bool[Tensor, "batch time"]:
    """Real tokens that another follows; the last column, which cannot be one, is left out."""
    return batch.real[:, 1:]
