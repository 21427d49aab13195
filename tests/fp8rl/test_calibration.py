"""What a run calibrates on, what it proves of the engine's scales, what it warns of and saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fp8rl.batch import TokenBatch
from fp8rl.calibration import Calibration
from fp8rl.config.file import parse_config
from fp8rl.config.run import RunConfig
from fp8rl.errors import EngineError, TrainerError
from fp8rl.quant import KVScaleError, KVScales
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron import MegatronTrainer

VOCAB = 64
SHAPE = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 256, "init_std": 0.1}


def config(**kv_scales: Any) -> RunConfig:
    return parse_config({"model": SHAPE, "kv_scales": kv_scales})


def sequences(rows: int, seed: int, length: int = 10) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (rows, 16), generator=generator)
    positions = torch.arange(16).expand(rows, 16)
    return TokenBatch(tokens, (positions >= 4) & (positions < length))


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    with init_distributed(config()):
        yield


@pytest.fixture
def trainer() -> MegatronTrainer:
    return MegatronTrainer(config(), VOCAB)


@dataclass
class Buffers:
    """What an engine says that its buffers hold."""

    workers: list[dict[str, dict[str, list[float]]]]

    def kv_state(self) -> list[dict[str, dict[str, list[float]]]]:
        return self.workers


def calibration(trainer: MegatronTrainer, engine: Any = None, **kv_scales: Any) -> Calibration:
    return Calibration(
        config(**kv_scales).kv_scales,
        trainer,
        engine,
        prompts=lambda version: sequences(8, seed=100 + version, length=5),
        fixed=sequences(8, seed=1),
    )


def holding(scales: KVScales) -> Buffers:
    worker: dict[str, dict[str, list[float]]] = {}
    for name, tensor in scales.tensors().items():
        layer, _, x = name.removesuffix("_scale").rpartition(".")
        worker.setdefault(layer, {})[x] = [float(tensor)] * (2 if x == "q" else 3)
    return Buffers([worker])


def measured(made: Calibration, version: int) -> KVScales:
    found = made.measure(version)
    assert isinstance(found, KVScales)
    return found


def test_the_batch_just_trained_is_the_default_and_demonstrations_stand_in_at_the_start(
    trainer: MegatronTrainer,
) -> None:
    made = calibration(trainer)
    assert torch.equal(made.batch(0).tokens[:1, :10], made.batch(1).tokens[:1, :10])
    made.trained = sequences(8, seed=2)
    rows = {tuple(row) for row in made.batch(1).tokens.tolist()}
    assert rows <= {tuple(row[:10]) for row in made.trained.tokens.tolist()}


def test_prompts_are_those_of_the_step_to_come_and_fixed_never_changes(
    trainer: MegatronTrainer,
) -> None:
    prompts = calibration(trainer, calibrate_on="prompts")
    assert prompts.batch(3).tokens.shape[1] == 5
    assert not torch.equal(prompts.batch(3).tokens, prompts.batch(4).tokens)
    fixed = calibration(trainer, calibrate_on="fixed")
    before = fixed.batch(0).tokens
    fixed.trained = sequences(8, seed=2)
    assert torch.equal(fixed.batch(5).tokens, before)


def test_whole_sequences_are_taken_within_the_bound(trainer: MegatronTrainer) -> None:
    made = calibration(trainer, calibration_tokens=35)
    assert int(made.batch(0).lengths.sum()) == 30  # three of ten tokens each
    assert measured(made, 0).tokens == 30
    with pytest.raises(TrainerError, match=r"10 tokens; raise kv_scales.calibration_tokens"):
        calibration(trainer, calibration_tokens=9).batch(0)


def test_scales_carry_the_version_the_rule_and_the_tokens(trainer: MegatronTrainer) -> None:
    made = calibration(trainer, over_steps={"kind": "running_max", "steps": 3}, margin=1.5)
    scales = measured(made, 7)
    assert (scales.version, scales.tokens, scales.margin) == (7, 80, 1.5)
    assert scales.observer == "amax, running maximum of 3 versions"


def test_the_engines_buffers_are_held_against_what_was_published(trainer: MegatronTrainer) -> None:
    scales = measured(calibration(trainer), 0)
    metrics = calibration(trainer, holding(scales)).confirm(scales)
    assert metrics["kv_scale/1/v"] == scales.layers[1].v.scale
    assert metrics["kv/tokens"] == 80


@pytest.mark.parametrize(
    ("x", "place"), [("q", 0), ("q", 1), ("k", 0), ("k", 1), ("k", 2), ("v", 1)]
)
def test_one_buffer_that_differs_stops_the_run_and_is_named(
    trainer: MegatronTrainer, x: str, place: int
) -> None:
    scales = measured(calibration(trainer), 0)
    engine = holding(scales)
    engine.workers[0]["model.layers.1.self_attn.attn"][x][place] *= 2
    with pytest.raises(EngineError, match=f"1 differ: model.layers.1.self_attn.attn.{x}_scale"):
        calibration(trainer, engine).confirm(scales)


def test_a_buffer_that_nobody_sent_or_that_is_not_there_is_named(trainer: MegatronTrainer) -> None:
    scales = measured(calibration(trainer), 0)
    more, fewer = holding(scales), holding(scales)
    more.workers[0]["model.layers.2.self_attn.attn"] = {"k": [1.0, 1.0, 1.0]}
    with pytest.raises(EngineError, match=r"layers.2.self_attn.attn.k_scale: .* nobody sent it"):
        calibration(trainer, more).confirm(scales)
    del fewer.workers[0]["model.layers.0.self_attn.attn"]
    with pytest.raises(EngineError, match=r"3 differ: model.layers.0.*q_scale: published, but not"):
        calibration(trainer, fewer).confirm(scales)


def test_saturation_is_counted_against_the_scales_in_use_and_warned_of_once(
    trainer: MegatronTrainer,
) -> None:
    small = KVScales.from_amax(torch.full((2, 3), 1e-3), version=0, tokens=1)
    made = calibration(trainer, holding(small), warn_saturation=0.5)
    made.confirm(small)
    observer = made.watch()
    trainer.log_probs(sequences(8, seed=3), observer)
    metrics = made.rates(observer.observation())
    assert metrics["kv/saturation_max"] > 0.9
    assert metrics["kv_underflow/0/k"] == 0
    first = made.warnings(metrics)
    assert "of layer 0's q lie beyond its scale" in first[0]
    assert made.warnings(metrics) == []  # said already
    assert made.warnings({key: 0.0 for key in metrics}) == []
    assert made.warnings(metrics) == first  # it had gone and came back


def test_good_scales_saturate_nothing(trainer: MegatronTrainer) -> None:
    made = calibration(trainer)
    scales = measured(made, 0)
    made = calibration(trainer, holding(scales))
    made.confirm(scales)
    observer = made.watch()
    trainer.log_probs(made.batch(0), observer)
    assert made.rates(observer.observation())["kv/saturation_max"] == 0


def test_a_resumed_calibration_goes_on_as_the_unbroken_one(trainer: MegatronTrainer) -> None:
    options = {"over_steps": {"kind": "ema", "decay": 0.5}}
    unbroken, resumed = calibration(trainer, **options), calibration(trainer, **options)
    resumed.load_state(unbroken.state())  # before anything was measured
    scales = measured(unbroken, 0)
    unbroken.confirm(scales)
    unbroken.trained = sequences(8, seed=2)
    resumed.load_state(unbroken.state())
    assert measured(resumed, 1) == measured(unbroken, 1)
    changed = [each.confirm(scales)["kv/changed"] for each in (resumed, unbroken)]
    assert changed == [0, 0]


def test_scales_of_version_0_are_kept_under_each_versions_label(trainer: MegatronTrainer) -> None:
    made = calibration(trainer, recalibrate="once")
    first = measured(made, 0)
    assert first == measured(calibration(trainer), 0)
    made.confirm(first)
    made.trained = sequences(8, seed=2)
    later = measured(made, 5)
    assert (later.version, later.layers) == (5, first.layers)
    assert later.observer == "amax, of version 0 alone"
    resumed = calibration(trainer, recalibrate="once")
    resumed.load_state(made.state())
    assert measured(resumed, 6).layers == first.layers
    assert "version 0" in str(made.caveat())


def test_scales_that_are_never_measured_are_1_and_say_so(trainer: MegatronTrainer) -> None:
    made = calibration(trainer, recalibrate="never", measured_by="engine")
    scales = measured(made, 4)
    assert (scales.scales() == 1.0).all() and len(scales.layers) == 2
    assert (scales.version, scales.observer) == (4, "none: 1.0")
    assert "measured on nothing" in str(made.caveat())
    assert calibration(trainer).caveat() is None


def test_a_layer_of_zeros_is_an_error_that_names_it(trainer: MegatronTrainer) -> None:
    state = trainer.state()
    for name, tensor in state.items():
        if "layers.1.self_attention.k_layernorm" in name:
            tensor.zero_()
    trainer.load_state(state)
    with pytest.raises(KVScaleError, match="only zeros were observed in layer 1 k"):
        calibration(trainer).measure(0)
