"""The engine's process as the trainer meets it: tickets, updates between them, sleep, its end."""

from __future__ import annotations

import dataclasses
import itertools
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import torch

from fp8rl.engine.process import Lines
from fp8rl.engine.rollout import RolloutEngine, Sampling
from fp8rl.errors import EngineError, StaleWeightsError
from fp8rl.quant import KVScaleError, KVScales
from fp8rl.quant.kv_observation import KVObservation
from fp8rl.sync.publisher import Publisher
from tests import helpers

pytestmark = pytest.mark.slow  # two real engines

PROMPTS = [[2 + (i * k) % 60 for i in range(30)] for k in (1, 3, 7)]


@dataclass(frozen=True)
class Endless(Sampling):
    """Sampling that nothing ends early, so that an answer is as long as it is said to be."""

    def parameters(self) -> dict[str, Any]:
        return super().parameters() | {"stop_token_ids": [], "ignore_eos": True}


SHORT = Endless(max_tokens=8, stop_token=helpers.EOS, samples=2)
LONG = Endless(max_tokens=480, stop_token=helpers.EOS, samples=4)  # two seconds on an idle machine
WORK = Endless(
    max_tokens=480, stop_token=helpers.EOS, samples=64
)  # half a minute: is never collected


@dataclass
class Live:
    """A live engine and the way to it."""

    engine: RolloutEngine
    publisher: Publisher
    version: int = -1

    def publish(self, seed: int = 0, kv_scales: Any = None) -> int:
        self.version += 1
        scales = kv_scales or helpers.scales(self.version)
        self.publisher.publish(helpers.source(seed), version=self.version, kv_scales=scales)
        return self.version

    def submit(self, sampling: Sampling, seed: int = 5) -> int:
        return self.engine.submit(PROMPTS, version=self.version, sampling=sampling, seed=seed)

    def break_an_update(self, kv_scales: Any = None) -> None:
        """An update whose weights are applied, and whose scales are those of other weights."""
        self.version += 1
        other = helpers.scales(self.version + 1)
        with pytest.raises(KVScaleError, match="measured on version"):
            self.publisher.publish(
                helpers.source(9), version=self.version, kv_scales=kv_scales or (lambda: other)
            )
        self.version -= 1


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RolloutEngine]]:
    """An engine with an FP8 cache and one with a BF16 cache, started beside each other."""
    started = {
        precision: RolloutEngine(helpers.settings(precision), tmp_path_factory.mktemp(precision))
        for precision in ("fp8-kv", "fp8")
    }
    yield started
    for engine in started.values():
        engine.close()


@pytest.fixture(scope="module")
def live(engines: dict[str, RolloutEngine]) -> Iterator[Live]:
    """The one with an FP8 cache, with weights."""
    engine = engines["fp8-kv"]
    with Publisher(engine.settings.plan(), engine, kv_layers=helpers.LAYERS) as publisher:
        live = Live(engine, publisher)
        live.publish()
        yield live


def test_tickets_are_collected_in_any_order_and_are_what_generate_gives(live: Live) -> None:
    longer = dataclasses.replace(SHORT, max_tokens=40)
    first, second = live.submit(longer, seed=1), live.submit(SHORT, seed=2)
    answers = {second: live.engine.collect(second), first: live.engine.collect(first)}
    for ticket, sampling, seed in ((first, longer, 1), (second, SHORT, 2)):
        alone = live.engine.generate(PROMPTS, version=live.version, sampling=sampling, seed=seed)
        assert answers[ticket] == alone
    with pytest.raises(EngineError, match=f"ticket {first} was never given, or has been collected"):
        live.engine.collect(first)


def test_more_prompts_than_one_forward_takes_are_sampled_with_their_seeds(live: Live) -> None:
    """vLLM would cut a prompt, and turn the generator of its request back: a CPU's cannot be."""
    version = live.publish()
    prompts = [[2 + (i * k) % 60 for i in range(400)] for k in range(1, 25)]
    ask = dataclasses.replace(SHORT, max_tokens=2, samples=1)
    groups = live.engine.generate(prompts, version=version, sampling=ask, seed=5)
    assert [len(group[0].tokens) for group in groups] == [2] * 24


def test_a_request_that_vllm_refuses_is_an_error_and_the_engine_serves_on(live: Live) -> None:
    before = live.engine.collect(live.submit(SHORT))
    plain = Sampling(max_tokens=8, stop_token=helpers.EOS)
    for prompts, sampling, said in (
        (PROMPTS, dataclasses.replace(plain, stop_token=10**6), "refused a request: .*1000000"),
        ([*PROMPTS, [2] * 4000], plain, "refused a request: .*4000"),  # the others are taken back
        ([*PROMPTS, [3, 10**6]], plain, "prompt 3 has token 1000000, and the model's go from 0 to"),
    ):
        with pytest.raises(EngineError, match=said):
            live.engine.generate(prompts, version=live.version, sampling=sampling, seed=5)
    assert live.engine.collect(live.submit(SHORT)) == before


def test_an_update_under_way_holds_a_ticket_between_two_tokens(live: Live) -> None:
    old = live.version
    ticket = live.submit(LONG)
    live.engine.collect(live.submit(SHORT))  # so that the long one has as many tokens at least

    def measure() -> KVScales:
        with pytest.raises(StaleWeightsError, match=f"ticket {ticket} is held by an update"):
            live.engine.collect(ticket)
        with pytest.raises(StaleWeightsError, match="was applied and not committed"):
            live.submit(SHORT)
        return helpers.scales(live.version)

    new = live.publish(seed=1, kv_scales=measure)
    for sample in itertools.chain(*live.engine.collect(ticket)):
        assert set(sample.versions) == {old, new}
        assert list(sample.versions) == sorted(sample.versions)


def test_the_engine_serves_on_while_the_bytes_of_an_update_come(live: Live) -> None:
    before = live.engine.collect(live.submit(SHORT))
    live.engine.start_weight_update()
    assert live.engine.collect(live.submit(SHORT)) == before
    live.publish(seed=1)  # the update that was begun is given up


def test_an_update_that_fails_is_undone_and_what_is_in_flight_goes_on(live: Live) -> None:
    version = live.version
    alone = live.engine.collect(live.submit(LONG))
    ticket = live.submit(LONG)
    live.break_an_update()
    answers = live.engine.collect(ticket)
    assert answers == alone
    assert {v for group in answers for sample in group for v in sample.versions} == {version}


def test_an_update_that_cannot_be_undone_aborts_what_was_in_flight_and_spares_what_had_ended(
    live: Live,
) -> None:
    plan = live.engine.settings.plan()
    live.break_an_update()  # after which its publisher introduces itself anew
    with Publisher(plan, live.engine, kv_layers=helpers.LAYERS, mirror=False) as forgetful:
        keeps, live.publisher = live.publisher, forgetful
        live.publish()  # from here on the engine keeps no mirror
        ended = live.submit(SHORT)
        answers = live.engine.collect(live.submit(SHORT))  # the same, and takes as long
        aborted = live.submit(WORK)
        live.break_an_update()
        with pytest.raises(StaleWeightsError, match=r"in flight when an update failed"):
            live.engine.collect(aborted)
        assert live.engine.collect(ended) == answers
        with pytest.raises(StaleWeightsError, match="serves nothing until a good update lands"):
            live.submit(SHORT)
        live.version += 1
        live.publisher = keeps
    live.publish(seed=2)
    assert len(live.engine.collect(live.submit(SHORT))) == len(PROMPTS)


def test_the_engine_measures_the_weights_of_an_update_under_way(live: Live) -> None:
    prompts = [[2 + (i * k) % 60 for i in range(300)] for k in (1, 3)]  # longer than a block
    seen: list[KVObservation] = []

    def measure() -> KVScales:
        for _ in range(2):  # the second time no prefix is skipped
            seen.append(live.engine.observe_kv(prompts, histogram=False))
        return helpers.scales(live.version)

    live.publish(seed=3, kv_scales=measure)
    assert [o.tokens for o in seen] == [sum(map(len, prompts))] * 2
    assert len(live.engine.collect(live.submit(SHORT))) == len(PROMPTS)


def test_scales_that_clip_do_not_spoil_what_is_measured_under_them(live: Live) -> None:
    seen: list[KVObservation] = []

    def measure() -> KVScales:
        seen.append(live.engine.observe_kv(PROMPTS, histogram=False))
        return helpers.scales(live.version)

    for factor in (1e-3, 1.0):
        live.publish(seed=3, kv_scales=helpers.scales(live.version + 1, factor))
        live.publish(seed=3, kv_scales=measure)
    assert torch.allclose(seen[0].amax(), seen[1].amax(), rtol=0.02)


def test_the_engine_does_not_measure_outside_an_update_or_beside_requests(live: Live) -> None:
    with pytest.raises(EngineError, match="for an update under way"):
        live.engine.observe_kv(PROMPTS, histogram=False)
    ticket, version = live.submit(LONG), live.version
    with pytest.raises(EngineError, match=rf"ticket\(s\) \[{ticket}\] are in flight; collect"):
        live.publish(kv_scales=lambda: live.engine.observe_kv(PROMPTS, histogram=False))
    [first, *_] = live.engine.collect(ticket)  # the update was undone, the requests went on
    assert set(first[0].versions) == {version}
    live.publish()


def test_an_engine_does_not_sleep_over_requests_or_an_update(live: Live) -> None:
    ticket = live.submit(LONG)
    with pytest.raises(EngineError, match=rf"ticket\(s\) \[{ticket}\] are in flight; collect"):
        live.engine.sleep()
    live.engine.collect(ticket)
    live.engine.start_weight_update()
    for change in (live.engine.sleep, live.engine.wake_up):
        with pytest.raises(EngineError, match="an update is under way"):
            change()
    live.publish()


def test_waking_changes_nothing(live: Live) -> None:
    before = live.engine.generate(PROMPTS, version=live.version, sampling=SHORT, seed=1)
    live.engine.sleep()
    with pytest.raises(EngineError, match="sleeps already"):
        live.engine.sleep()
    with pytest.raises(StaleWeightsError, match="the engine sleeps"):
        live.submit(SHORT)
    with pytest.raises(EngineError, match="weights sleep"):
        live.engine.start_weight_update()
    with pytest.raises(EngineError, match="asleep are"):
        live.engine.wake_up(["disk"])
    live.engine.wake_up()
    assert live.engine.generate(PROMPTS, version=live.version, sampling=SHORT, seed=1) == before


def test_weights_that_were_slept_away_are_published_before_anything_is_served(live: Live) -> None:
    with pytest.raises(EngineError, match="sleep level 3"):
        live.engine.sleep(level=3)
    live.engine.sleep(level=2)
    live.engine.wake_up(["weights"])
    with pytest.raises(EngineError, match="KV cache sleeps"):
        live.publish(kv_scales=lambda: live.engine.observe_kv(PROMPTS, histogram=False))
    live.publish()  # as trainers do, before the cache takes its memory again
    live.engine.wake_up(["kv_cache"])
    assert len(live.engine.collect(live.submit(SHORT))) == len(PROMPTS)
    live.engine.sleep(level=2)
    live.engine.wake_up()
    with pytest.raises(StaleWeightsError, match="slept at level 2"):
        live.submit(SHORT)
    live.publish()


def test_an_engine_that_forgot_its_version_serves_another_run_from_the_first_on(live: Live) -> None:
    ticket = live.submit(LONG)
    with pytest.raises(EngineError, match=rf"ticket\(s\) \[{ticket}\] are in flight; collect"):
        live.engine.forget()
    live.engine.collect(ticket)
    before = live.engine.generate(PROMPTS, version=live.publish(), sampling=SHORT, seed=1)
    live.engine.forget()
    with pytest.raises(StaleWeightsError, match="no weights have been published yet"):
        live.submit(SHORT)
    live.version = -1
    again = live.engine.generate(PROMPTS, version=live.publish(), sampling=SHORT, seed=1)
    assert live.version == 0
    assert [[s.tokens for s in group] for group in again] == [[s.tokens for s in g] for g in before]
    assert {v for group in again for s in group for v in s.versions} == {0}


def test_the_engine_holds_the_scales_that_were_published(live: Live) -> None:
    scales = helpers.scales(live.version + 1, factor=2.0).tensors()
    live.publish(kv_scales=helpers.scales(live.version + 1, factor=2.0))
    [state] = live.engine.kv_state()
    held = {
        f"{layer}.{x}_scale": set(copies) for layer, of in state.items() for x, copies in of.items()
    }
    assert held == {name: {float(scale)} for name, scale in scales.items()}


def test_an_fp8_cache_holds_twice_the_tokens(engines: dict[str, RolloutEngine]) -> None:
    fp8, bf16 = engines["fp8-kv"].kv_cache_tokens, engines["fp8"].kv_cache_tokens
    assert fp8 == pytest.approx(2 * bf16, rel=0.05)


def test_an_engine_with_requests_in_flight_ends_with_its_socket(
    engines: dict[str, RolloutEngine],
) -> None:
    engine = engines["fp8"]
    with Publisher(engine.settings.plan(), engine) as publisher:
        publisher.publish(helpers.source(0), version=0, kv_scales=None)
        minutes = dataclasses.replace(WORK, samples=300)
        engine.submit(PROMPTS, version=0, sampling=minutes, seed=0)
    engine._channel._lines.close()
    engine._channel._socket.close()
    assert psutil.Process(engine.pid).wait(60) == 0  # 1 or 2 on an idle machine


class TestLines:
    @pytest.fixture
    def ends(self) -> Iterator[tuple[socket.socket, Lines]]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            yield ours, Lines(theirs)

    def test_a_line_that_came_with_another_is_found(self, ends: Any) -> None:
        ours, lines = ends
        ours.sendall(b"one\ntwo\n")
        assert lines.read(wait=True) == b"one\n"
        assert lines.read(wait=False) == b"two\n"  # it has left the socket, so select says nothing
        assert lines.read(wait=False) is None

    def test_half_a_line_is_not_one(self, ends: Any) -> None:
        ours, lines = ends
        ours.sendall(b"on")
        assert lines.read(wait=False) is None
        ours.sendall(b"e\n")
        assert lines.read(wait=False) == b"one\n"

    def test_a_closed_socket_ends_the_lines(self, ends: Any) -> None:
        ours, lines = ends
        ours.sendall(b"one\n")
        ours.close()
        assert [lines.read(wait=False) for _ in range(3)] == [b"one\n", b"", b""]
