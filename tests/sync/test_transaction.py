"""A broken update is refused by name, changes nothing that is served, and a good one heals all.

One live engine goes through every fault in turn. A fault is put on the wire, between the real
publisher and the real engine. After each the engine must refuse the new version and answer as
before with the old one, bit for bit; after the next good publish its tokens and log-probs must be
those, bit for bit, of a fresh engine given the same weights. The prompts are longer than a KV
block, so a stale prefix cache would show.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8rl.engine.rollout import RolloutEngine, Sample, Sampling
from fp8rl.errors import EngineDiedError, EngineError, StaleWeightsError
from fp8rl.quant import KVScaleError, NonFiniteWeightError
from fp8rl.sync.fingerprint import fingerprint
from fp8rl.sync.publisher import Publisher
from fp8rl.sync.source import IterableSource
from tests import helpers

pytestmark = pytest.mark.slow

FINAL = 7  # seed of the weights with which engines are compared
SAMPLING = Sampling(max_tokens=12, stop_token=helpers.EOS, samples=2)
PROMPTS = [[2 + (i * k) % 60 for i in range(300)] for k in (1, 3, 7)] + [[5, 6, 7]]
A_WEIGHT = "model.layers.1.self_attn.o_proj.weight"
A_SCALE = "model.layers.0.mlp.gate_proj.weight_scale_inv"
A_KV_SCALE = "model.layers.1.self_attn.attn.v_scale"

Change = Callable[[dict[str, Any], torch.Tensor], None]


@dataclass
class FaultyWire:
    """The engine as a client whose updates can be damaged on their way.

    A stage is held back until its manifest is there, so that a fault can touch both.
    """

    engine: RolloutEngine
    change: Change | None = None
    ring: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    stages: list[dict[str, Any]] = field(default_factory=list)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        path = init_info["transport"]["path"]
        size = os.stat(path).st_size
        self.ring = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        self.engine.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self.stages = []
        self.engine.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if "stage" in update_info:
            self.stages.append(update_info)
            return
        if "manifest" in update_info:
            (stage,) = self.stages
            payload = self.ring[stage["stage"]["at"] :][: stage["stage"]["nbytes"]]
            if self.change is not None:
                self.change(update_info["manifest"], payload)
            if not update_info["manifest"]:  # a wire can also lose one
                self.stages = []
                return
            self.engine.update_weights(stage)
            self.stages = []
        self.engine.update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.engine.finish_weight_update(weight_version)


@dataclass
class Live:
    """A live engine and the way to it."""

    wire: FaultyWire
    publisher: Publisher
    version: int = -1

    def publish(self, seed: int, change: Change | None = None, *, follow: bool = False) -> int:
        self.version += 1
        self.wire.change = change
        scales = helpers.scales(self.version)
        self.publisher.publish(
            helpers.source(seed),
            version=self.version,
            kv_scales=(lambda: scales) if follow else scales,
        )
        return self.version

    def generate(self, version: int) -> list[list[Sample]]:
        return self.wire.engine.generate(PROMPTS, version=version, sampling=SAMPLING, seed=11)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    engine = RolloutEngine(helpers.settings(), tmp_path_factory.mktemp("live"))
    wire = FaultyWire(engine)
    with engine, Publisher(engine.settings.plan(), wire, kv_layers=helpers.LAYERS) as publisher:
        yield Live(wire, publisher)


@pytest.fixture(scope="module")
def fresh_answers(tmp_path_factory: pytest.TempPathFactory) -> list[list[Sample]]:
    """What an engine answers that never held any weights but the final ones."""
    with RolloutEngine(helpers.settings(), tmp_path_factory.mktemp("fresh")) as engine:
        plan = engine.settings.plan()
        with Publisher(plan, engine, kv_layers=helpers.LAYERS) as publisher:
            publisher.publish(helpers.source(FINAL), version=0, kv_scales=helpers.scales(0))
        return engine.generate(PROMPTS, version=0, sampling=SAMPLING, seed=11)


def words(answers: list[list[Sample]]) -> list[Any]:
    """Tokens and log-probs, without the versions, for comparing bit for bit."""
    return [[(sample.tokens, sample.logprobs) for sample in group] for group in answers]


def record(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    return next(tensor for tensor in manifest["tensors"] if tensor["name"] == name)


def tensor_bytes(manifest: dict[str, Any], payload: torch.Tensor, name: str) -> torch.Tensor:
    found = record(manifest, name)
    return payload[found["parcel"]["offset"] :][: found["parcel"]["nbytes"]]


def flip_a_byte(name: str) -> Change:
    def change(manifest: dict[str, Any], payload: torch.Tensor) -> None:
        tensor_bytes(manifest, payload, name)[0] ^= 1

    return change


def overwrite(name: str, byte: int, *, count: int) -> Change:
    """Other bytes with a digest that fits them: a sender that is wrong, not a wire."""

    def change(manifest: dict[str, Any], payload: torch.Tensor) -> None:
        raw = tensor_bytes(manifest, payload, name)
        raw[:count] = byte
        record(manifest, name)["digest"] = fingerprint(raw)

    return change


def leave_out(name: str) -> Change:
    def change(manifest: dict[str, Any], payload: torch.Tensor) -> None:
        manifest["tensors"] = [t for t in manifest["tensors"] if t["name"] != name]

    return change


def set_fields(of: str | None, **fields: Any) -> Change:
    def change(manifest: dict[str, Any], payload: torch.Tensor) -> None:
        (manifest if of is None else record(manifest, of)).update(fields)

    return change


def lose(manifest: dict[str, Any], payload: torch.Tensor) -> None:
    manifest.clear()


def in_the_weights(fault: Change) -> Change:
    """Of an update whose scales follow: damage the first manifest only."""

    def change(manifest: dict[str, Any], payload: torch.Tensor) -> None:
        if manifest["kv_scales"] == "follow":
            fault(manifest, payload)

    return change


def in_the_scales(fault: Change) -> Change:
    """Of an update whose scales follow: damage the second manifest only."""

    def change(manifest: dict[str, Any], payload: torch.Tensor) -> None:
        if manifest["kv_scales"] != "follow":
            fault(manifest, payload)

    return change


OTHER_WEIGHTS = {"version": 0, "observer": "amax", "tokens": 100}
FAULTS: dict[str, tuple[Change, str]] = {
    "one byte of a weight flipped": (flip_a_byte(A_WEIGHT), A_WEIGHT),
    "one byte of a weight's scales flipped": (flip_a_byte(A_SCALE), A_SCALE),
    "one KV scale changed": (flip_a_byte(A_KV_SCALE), A_KV_SCALE),
    "NaN in a weight": (overwrite(A_WEIGHT, 0x7F, count=1), f"{A_WEIGHT}: holds NaN"),
    "NaN in a norm": (overwrite("model.norm.weight", 0xFF, count=2), "model.norm.weight"),
    "a KV scale of zero": (overwrite(A_KV_SCALE, 0, count=4), A_KV_SCALE),
    "one tensor missing": (leave_out(A_WEIGHT), f"1 missing: {A_WEIGHT}"),
    "one KV scale missing": (leave_out(A_KV_SCALE), f"1 missing: {A_KV_SCALE}"),
    "a tensor of another model": (
        set_fields("model.norm.weight", name="model.layers.9.norm.weight"),
        "model.norm.weight",
    ),
    "a tensor of another shape": (set_fields("lm_head.weight", shape=[256, 64]), "lm_head.weight"),
    "no word on where the KV scales come from": (set_fields(None, kv_scales=None), "provenance"),
    "KV scales of other weights": (
        set_fields(None, kv_scales=OTHER_WEIGHTS),
        "measured on version 0, the weights are version",
    ),
    "an older version": (set_fields(None, version=0), "not newer"),
    "a place outside the payload": (
        set_fields("lm_head.weight", parcel={"offset": 2**40, "nbytes": 64 * 256 * 2}),
        "outside the payload",
    ),
    "a manifest of another payload": (set_fields(None, payload_nbytes=2**40), "a payload of"),
    "a base that the engine does not hold": (
        set_fields(None, base={"version": 0, "digest": "a" * 64}),
        "send a full update",
    ),
    "an unknown field": (set_fields(None, code="x"), "code"),
}


FAULTS_OF_SCALES_THAT_FOLLOW: dict[str, tuple[Change, str]] = {
    "the scales never come": (
        in_the_scales(lose),
        "its KV scales were to follow and never came: model.layers.0.self_attn.attn.q_scale",
    ),
    "the weights never came": (in_the_weights(lose), "KV scales came alone"),
    "one scale is missing": (in_the_scales(leave_out(A_KV_SCALE)), f"1 missing: {A_KV_SCALE}"),
    "they are those of other weights": (
        in_the_scales(set_fields(None, kv_scales=OTHER_WEIGHTS)),
        "measured on version 0",
    ),
    "a scale of zero": (in_the_scales(overwrite(A_KV_SCALE, 0, count=4)), A_KV_SCALE),
}


@pytest.mark.parametrize("fault", [*FAULTS, *FAULTS_OF_SCALES_THAT_FOLLOW])
def test_a_broken_update_is_named_changes_nothing_and_is_healed(
    fault: str, live: Live, fresh_answers: list[list[Sample]]
) -> None:
    follow = fault in FAULTS_OF_SCALES_THAT_FOLLOW
    change, named = (FAULTS_OF_SCALES_THAT_FOLLOW if follow else FAULTS)[fault]
    good = live.publish(seed=1)
    before = live.generate(good)
    with pytest.raises(EngineError) as refused:
        live.publish(seed=2, change=change, follow=follow)
    assert named in str(refused.value)
    with pytest.raises(StaleWeightsError, match="its last update failed") as stale:
        live.generate(live.version)
    assert named in str(stale.value) or "never came" in str(stale.value)
    assert live.generate(good) == before  # the old weights, the old scales, nothing in between

    healed = live.publish(seed=FINAL, follow=follow)
    answers = live.generate(healed)
    assert {v for group in answers for sample in group for v in sample.versions} == {healed}
    assert words(answers) == words(fresh_answers)
    assert words(answers) != words(before)


def test_scales_of_other_weights_are_refused_before_the_engine_hears_of_them(live: Live) -> None:
    good = live.publish(seed=1)
    before = live.generate(good)
    with pytest.raises(KVScaleError, match=r"published with .* measured on version 0"):
        live.publisher.publish(helpers.source(2), version=good + 1, kv_scales=helpers.scales(0))
    with pytest.raises(StaleWeightsError):
        live.generate(good + 1)
    assert live.generate(good) == before


def test_a_nan_in_the_trainer_leaves_the_engine_as_it_was(live: Live) -> None:
    good = live.publish(seed=1)
    before = live.generate(good)
    weights = helpers.weights(2)
    weights[A_WEIGHT][3, 4] = float("nan")
    with pytest.raises(NonFiniteWeightError, match=A_WEIGHT):
        live.publisher.publish(
            IterableSource(weights), version=good + 1, kv_scales=helpers.scales(good + 1)
        )
    with pytest.raises(StaleWeightsError, match=f"version {good + 1} were asked for"):
        live.generate(good + 1)
    assert live.generate(good) == before


def test_an_engine_never_answers_with_older_weights_than_asked_for(live: Live) -> None:
    version = live.publish(seed=1)
    with pytest.raises(StaleWeightsError, match=f"the engine holds {version}"):
        live.generate(version + 1)
    live.version += 5  # newer than asked for is fine
    newer = live.publish(seed=1)
    assert live.generate(version) == live.generate(newer)


def test_every_tensor_and_scale_is_proven(live: Live) -> None:
    live.publish(seed=1)
    (worker,) = live.wire.engine.worker_report()
    weights = live.wire.engine.settings.plan().engine_tensors()
    assert worker["backend"] == "Receiver"
    assert worker["tensors_proven"] == len(weights) + 3 * helpers.LAYERS
    assert worker["kv_scales_proven"] == 3 * helpers.LAYERS


@pytest.mark.long
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_other_arms_equal_a_fresh_engine_after_an_update(
    precision: str, tmp_path: Path
) -> None:
    answers = []
    for folder, seeds in (("updated", (1, FINAL)), ("fresh", (FINAL,))):
        with RolloutEngine(helpers.settings(precision), tmp_path / folder) as engine:
            with Publisher(engine.settings.plan(), engine) as publisher:
                for version, seed in enumerate(seeds):
                    publisher.publish(helpers.source(seed), version=version, kv_scales=None)
                    last = engine.generate(PROMPTS, version=version, sampling=SAMPLING, seed=11)
            answers.append(words(last))
    assert answers[0] == answers[1]


def test_a_dead_engine_is_reported_at_once_with_its_log(tmp_path: Path) -> None:
    with RolloutEngine(helpers.settings(), tmp_path) as engine:
        engine.wait_ready()
        os.kill(engine.pid, signal.SIGKILL)
        began = time.perf_counter()
        with pytest.raises(EngineDiedError) as died:
            engine.generate(PROMPTS, version=0, sampling=SAMPLING, seed=0)
        assert time.perf_counter() - began < 5
    assert "exit code -9" in str(died.value)
    assert engine.log_path.read_text().splitlines()[-1] in str(died.value)


def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    settings = helpers.settings(max_model_len=100_000)  # the model has 512 positions
    with RolloutEngine(settings, tmp_path) as engine, pytest.raises(EngineDiedError) as died:
        engine.wait_ready()
    assert "max_model_len" in str(died.value)
