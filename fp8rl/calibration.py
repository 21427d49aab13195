"""How a run gets the KV-cache scales of each version, and watches what they do.

    measure   q, k, v of version v on a few tokens -> scales that carry v
                by the trainer: a forward of its own, before the weights are sent
                by the engine:  a forward of the live engine, after it was sent the weights
    confirm   the engine's own buffers, read once more before anything is sampled, are these scales
    watch     while the trainer scores the rollout of v: how many elements the scales clip or lose

Calibrated on the batch just trained (``trained``; at the start, on demonstrations), on the prompts
of the step to come (``prompts``) or on the same demonstrations each step (``fixed``), always whole
sequences within a bound on tokens. Every trainer rank has the same scales; rank 0 has the engine.

Scales of another version than the weights are refused everywhere, so those that are not measured
anew (``kv_scales.recalibrate`` once) or not at all (never) are relabelled here, and say so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from fp8rl.batch import TokenBatch
from fp8rl.config.rollout import KVScaleConfig
from fp8rl.engine.rollout import RolloutEngine
from fp8rl.errors import EngineError
from fp8rl.quant import E4M3_MAX, QKV, KVCalibrator, KVObservation, KVObserver, KVScales
from fp8rl.run_dir import Metrics
from fp8rl.trainer.megatron import MegatronTrainer
from fp8rl.trainer.micro_batch import bounded

LAYERS_SHOWN = 5
ANEW = 4  # times the tokens, where the scales before were bad
KEPT = " alone"  # the observer's end, of scales that a later version keeps
UNMEASURED = "none: 1.0"  # the observer of scales that nothing was observed for


class Calibration:
    """The KV scales of one run, on one trainer rank.

    ``trained`` is the batch just trained; the loop sets it after each step.
    """

    def __init__(
        self,
        config: KVScaleConfig,
        trainer: MegatronTrainer,
        engine: RolloutEngine | None,
        *,
        prompts: Callable[[int], TokenBatch],
        fixed: TokenBatch,
    ) -> None:
        """Set up for a run.

        Args:
            config: how to measure.
            trainer: observes, on every rank.
            engine: rank 0's; None elsewhere.
            prompts: the prompts of a version's step.
            fixed: demonstrations; what is observed before anything was trained on.
        """
        self._config = config
        self._trainer = trainer
        self._engine = engine
        self._prompts = prompts
        self._fixed = fixed
        self._calibrator = KVCalibrator(config, trainer.attention_shape)
        self._in_use: KVScales | None = None
        self._warned: set[str] = set()
        self.trained = fixed

    def measure(self, version: int, *, anew: bool = False) -> KVScales | Callable[[], KVScales]:
        """Measure the scales of ``version``, or return how the engine will, for the publisher.

        With ``recalibrate`` once, or never, those of version 0, or 1.0, under this version's label;
        but with ``anew`` these are measured too, and all on ANEW times the tokens.

        Raises:
            KVScaleError: a layer was not seen, or holds NaN, Inf or zeros only; named.
            TrainerError: not one sequence fits ``calibration_tokens``.
        """
        if self._config.recalibrate == "never":
            amax = torch.full((self._trainer.attention_shape.layers, len(QKV)), E4M3_MAX)
            return KVScales.from_amax(amax, version=version, tokens=1, observer=UNMEASURED)
        if self._config.recalibrate == "once" and self._in_use is not None and not anew:
            measured = self._in_use
            kept = f"{self._config.name}, of version {measured.version}{KEPT}"
            kept = measured.observer if measured.observer.endswith(KEPT) else kept
            return replace(measured, version=version, observer=kept)
        batch = self.batch(version, anew=anew)
        if self._config.measured_by == "trainer":
            observation = self._trainer.observe_kv(batch, self._calibrator.observer())
            return self._calibrator.scales(observation, version)
        return lambda: self._calibrator.scales(self._observe_in_engine(batch), version)

    @property
    def in_use(self) -> KVScales | None:
        """The scales that the engine holds; None before the first were confirmed."""
        return self._in_use

    def batch(self, version: int, *, anew: bool = False) -> TokenBatch:
        """What ``version`` is calibrated on."""
        tokens = self._config.calibration_tokens * (ANEW if anew else 1)
        if self._config.calibrate_on == "prompts":
            return bounded(self._prompts(version), tokens)
        return bounded(
            self.trained if self._config.calibrate_on == "trained" else self._fixed, tokens
        )

    def confirm(self, published: KVScales | None) -> Metrics:
        """Compare the engine's live buffers with what was published; tell every rank of the scales.

        Returns the metrics of the scales.

        Raises:
            EngineError: a buffer holds another value, or none was sent for it; named.
        """
        if self._engine is not None:
            assert published is not None  # the engine committed, so its scales were sent
            for worker in self._engine.kv_state():
                _compare(worker, published)
        scales = _from_rank_0(published)
        before, self._in_use = self._in_use, scales
        metrics: Metrics = {"kv/tokens": scales.tokens}
        if before is not None:
            metrics["kv/changed"] = int((before.scales() != scales.scales()).sum())
        for number, layer in enumerate(scales.layers):
            metrics |= {f"kv_scale/{number}/{x}": getattr(layer, x).scale for x in QKV}
        return metrics

    def caveat(self) -> str | None:
        """What a run without fresh scales has to say at its start; None where they are fresh."""
        return {
            "every-step": None,
            "once": "warning: kv_scales.recalibrate is once: the KV cache keeps the scales of "
            "version 0, whatever the weights become",
            "never": "warning: kv_scales.recalibrate is never: every scale of the KV cache is 1.0, "
            "measured on nothing",
        }[self._config.recalibrate]

    def watch(self) -> KVObserver:
        """Return an observer that counts what the scales in use clip and lose."""
        return KVObserver(self._trainer.attention_shape, in_use=self._in_use)

    def rates(self, observation: KVObservation) -> Metrics:
        """The metrics of what ``watch`` saw."""
        saturation, underflow = observation.saturation(), observation.underflow()
        metrics: Metrics = {"kv/saturation_max": float(saturation.max())}
        for layer in range(saturation.shape[0]):
            for column, x in enumerate(QKV):
                metrics[f"kv_saturation/{layer}/{x}"] = float(saturation[layer, column])
                metrics[f"kv_underflow/{layer}/{x}"] = float(underflow[layer, column])
        return metrics

    def warnings(self, metrics: Metrics) -> list[str]:
        """One line for each tensor whose saturation passed the threshold since the last step."""
        limit, found = self._config.warn_saturation, []
        over = {
            key: float(value)
            for key, value in metrics.items()
            if key.startswith("kv_saturation/") and float(value) > limit
        }
        for key, share in over.items():
            if key not in self._warned:
                _, layer, x = key.split("/")
                found.append(
                    f"warning: {share:.2%} of layer {layer}'s {x} lie beyond its scale and are "
                    f"clipped (kv_scales.warn_saturation is {limit:.2%}); raise kv_scales.margin "
                    "or kv_scales.calibration_tokens"
                )
        self._warned = set(over)
        return found

    def state(self) -> dict[str, Tensor]:
        """Return what the next step needs, for a checkpoint: flat CPU tensors."""
        scales = b"" if self._in_use is None else json.dumps(self._in_use.to_json()).encode()
        return {
            "calibration/tokens": self.trained.tokens,
            "calibration/response_mask": self.trained.response_mask.to(torch.uint8),
            "calibration/history": self._calibrator.state()["history"],
            "calibration/in_use": torch.tensor(list(scales), dtype=torch.uint8),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned."""
        mask = state["calibration/response_mask"].bool()
        self.trained = TokenBatch(state["calibration/tokens"], mask)
        self._calibrator.load_state({"history": state["calibration/history"]})
        scales = bytes(state["calibration/in_use"].tolist())
        self._in_use = KVScales.from_json(json.loads(scales)) if scales else None

    def _observe_in_engine(self, batch: TokenBatch) -> KVObservation:
        assert self._engine is not None  # the publisher calls this on rank 0 alone
        rows = zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True)
        sequences = [row[:length] for row, length in rows]
        return self._engine.observe_kv(sequences, histogram=self._calibrator.needs_histogram)


def _compare(worker: Mapping[str, Mapping[str, Sequence[float]]], published: KVScales) -> None:
    """Hold one worker's live buffers against the published scales."""
    sent = {name: float(tensor) for name, tensor in published.tensors().items()}
    held = {
        f"{layer}.{x}_scale": values
        for layer, scales in worker.items()
        for x, values in scales.items()
    }
    wrong = [f"{name}: published, but not in the engine" for name in sent if name not in held]
    for name, values in held.items():
        if name not in sent:
            wrong.append(f"{name}: in the engine ({list(values)}), but nobody sent it")
        elif any(value != sent[name] for value in values):
            wrong.append(f"{name}: the engine holds {list(values)}, published {sent[name]}")
    if wrong:
        raise EngineError(
            f"the engine's KV scales are not those of version {published.version}: {len(wrong)} "
            f"differ: {'; '.join(wrong[:LAYERS_SHOWN])}; nothing was sampled with them"
        )


def _from_rank_0(scales: KVScales | None) -> KVScales:
    """Rank 0's scales on every rank."""
    if dist.get_world_size() == 1:
        assert scales is not None
        return scales
    text = b"" if scales is None else json.dumps(scales.to_json()).encode()
    length = torch.tensor(len(text))
    dist.broadcast(length, src=0)
    data = torch.zeros(int(length), dtype=torch.uint8)
    if dist.get_rank() == 0:
        data = torch.tensor(list(text), dtype=torch.uint8)
    dist.broadcast(data, src=0)
    return KVScales.from_json(json.loads(bytes(data.tolist())))
