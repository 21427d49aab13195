"""The numbers of a probe, and the watch that holds them against thresholds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.config.file import parse_config
from fp8rl.config.rollout import Precision, RolloutConfig
from fp8rl.config.run import RunConfig
from fp8rl.drift.answer import BOTH, blamed, fallen_back, tightened
from fp8rl.drift.parts import TRAINER, compare
from fp8rl.drift.watch import LIMITS, DriftWatch, FallBack, fallen_back_in
from fp8rl.errors import ConfigError
from fp8rl.quant import QuantPlan
from fp8rl.run_dir import Metrics
from fp8rl.sync.streams import StreamObservation
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron import MegatronTrainer
from fp8rl.trainer.megatron_model import hf_config

TOKENS, LAYERS, HIDDEN = 6, 2, 8
ALL = torch.ones(TOKENS, dtype=torch.bool)


def observation(
    seed: int, *, layers: int = LAYERS, routes: torch.Tensor | None = None
) -> StreamObservation:
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randn(TOKENS, layers + 1, HIDDEN, generator=generator).bfloat16()
    return StreamObservation(stream, torch.randn(TOKENS, generator=generator), routes)


def changed(
    one: StreamObservation, point: int, by: float, tokens: int = TOKENS
) -> StreamObservation:
    stream = one.stream.clone()
    stream[:tokens, point] += by
    return StreamObservation(stream, one.logprobs.clone(), one.routes)


def test_equal_engines_and_trainers_do_not_drift() -> None:
    one = observation(0)
    found = compare(one, one, {TRAINER: one, "weights": one}, ALL)
    assert found.pop("drift/tokens") == TOKENS
    assert set(found.values()) == {0.0}
    assert {f"drift/{n}/{x}" for n in range(LAYERS) for x in ("own", "total", "weights")} <= set(
        found
    )


@settings(deadline=None)
@given(st.integers(0, LAYERS), st.sampled_from([0.5, -2.0, 16.0]))
def test_a_difference_is_named_where_it_is_and_relative_to_what_the_layer_adds(
    point: int, by: float
) -> None:
    model = observation(1)
    engine = changed(model, point, by)
    found = compare(engine, model, {TRAINER: model}, ALL)
    if point == 0:
        assert float(found["drift/embedding"]) > 0.1
    else:
        layer = point - 1
        given_, output = model.stream[:, layer].float(), model.stream[:, point].float()
        moved = (engine.stream[:, point].float() - output).square().mean().sqrt()
        size = (output - given_).square().mean().sqrt()
        for name in ("own", "unexplained"):
            assert float(found[f"drift/{layer}/{name}"]) == pytest.approx(
                float(moved / size), rel=1e-4
            )
    others = [n for n in range(LAYERS) if n != point - 1]
    assert all(found[f"drift/{n}/unexplained"] == 0.0 for n in others)


def test_each_rounding_has_its_part_and_the_rest_is_unexplained() -> None:
    trainer = observation(2)
    weights = changed(trainer, 1, 1.0)
    cache = changed(weights, 1, 4.0)
    engine = changed(cache, 1, 0.25)
    models: Mapping[str, StreamObservation] = {
        TRAINER: trainer,
        "weights": weights,
        "cache": cache,
    }
    found = compare(engine, trainer, models, ALL)
    names = ("weights", "cache", "unexplained")
    parts = {name: float(found[f"drift/0/{name}"]) for name in names}
    assert parts["weights"] == pytest.approx(4 * parts["unexplained"], rel=0.05)
    assert parts["cache"] == pytest.approx(4 * parts["weights"], rel=0.05)
    assert float(found["drift/0/own"]) == pytest.approx(sum(parts.values()), rel=0.05)


def test_tokens_that_go_to_other_experts_are_the_routers_part() -> None:
    routes = torch.tensor([[[0, 1]]]).expand(TOKENS, 1, 2)
    other = routes.clone()
    other[:2, 0] = torch.tensor([0, 3])
    swapped = routes.clone()
    swapped[2] = swapped[2].flip(-1)  # the same experts in another order
    trainer = observation(3, layers=1, routes=routes)
    moved = changed(trainer, 1, 3.0, tokens=2)
    engine = StreamObservation(moved.stream, moved.logprobs, other)
    found = compare(engine, trainer, {TRAINER: trainer}, ALL)
    assert found["drift/0/unexplained"] == 0.0
    assert float(found["drift/0/router"]) == pytest.approx(float(found["drift/0/own"])) != 0.0
    assert float(found["drift/0/misrouted"]) == pytest.approx(2 / (2 * TOKENS))
    same = StreamObservation(moved.stream, moved.logprobs, swapped)
    found = compare(same, trainer, {TRAINER: trainer}, ALL)
    assert found["drift/0/router"] == found["drift/0/misrouted"] == 0.0


def test_log_probs_are_compared_at_responses_alone() -> None:
    free, forced, engine = observation(4), observation(5), observation(6)
    response = torch.arange(TOKENS) >= 2
    found = compare(engine, free, {TRAINER: observation(7), "cache": forced}, response)
    for name, model in (("logprob", free), ("head", forced)):
        wanted = (engine.logprobs - model.logprobs)[2:].abs().mean()
        assert float(found[f"drift/{name}"]) == pytest.approx(float(wanted))


def config(**drift: object) -> RunConfig:
    return parse_config({"model": {"num_layers": 1, "hidden_size": 128}, "drift": drift})


@pytest.fixture
def watch() -> Iterator[DriftWatch]:
    made = config(every=3)
    plan = QuantPlan.from_hf_config(hf_config(made.model, 64, 16))
    with init_distributed(made):
        yield DriftWatch(made, MegatronTrainer(made, 64), None, plan)


def test_probes_are_due_every_so_many_steps_and_without_a_number_never(watch: DriftWatch) -> None:
    assert [n for n in range(8) if watch.due(n)] == [0, 3, 6]
    assert config().drift.every is None


def test_a_threshold_that_is_passed_is_told_once_until_it_was_kept_again(
    watch: DriftWatch,
) -> None:
    bad = {"drift/0/cache": 0.5, "drift/1/cache": 0.6, "drift/logprob": float("nan")}
    cache, logprob = watch.warnings(bad)
    assert cache.startswith("warning: drift in layer 1: 0.6 of what the layer adds is lost in the")
    assert "(also in layers 0)" in cache and "drift.warn_rounding is 0.2" in cache
    assert logprob.startswith("warning: drift: nan nats between log-probs")
    assert watch.warnings(bad) == []
    [more] = watch.warnings(bad | {"drift/4/cache": 0.3})
    assert "in layer 4" in more and "also" not in more
    assert watch.warnings({"drift/0/cache": 0.1}) == []
    assert len(watch.warnings({"drift/0/cache": 0.5})) == 1


def test_a_layer_without_a_number_is_the_worst_wherever_it_stands(watch: DriftWatch) -> None:
    found = {"drift/0/cache": 0.5, "drift/1/cache": float("nan"), "drift/2/cache": 0.6}
    [told] = watch.warnings(found)
    assert "drift in layer 1: nan of what" in told and "(also in layers 0, 2)" in told


def test_what_was_told_is_not_told_again_after_a_resume(watch: DriftWatch) -> None:
    bad = {"drift/0/unexplained": 0.5}
    state = watch.state()
    assert len(watch.warnings(bad)) == 1
    told = watch.state()
    watch.load_state(state)
    assert len(watch.warnings(bad)) == 1
    watch.load_state(told)
    assert watch.warnings(bad) == []


def test_every_kind_of_threshold_is_a_field_that_can_be_set() -> None:
    named = {name for name, _, _ in LIMITS.values()}
    fields = {name for name in type(config().drift).model_fields if name.startswith("warn_")}
    assert named == fields


def test_a_probe_of_fp8_weights_needs_whole_blocks_on_every_rank() -> None:
    cut = {"trainer": {"tensor_parallel": 2}, "model": {"hidden_size": 128, "num_heads": 2}}
    parse_config(cut)
    with pytest.raises(ConfigError, match=r"drift\.every is set and trainer\.tensor_parallel is 2"):
        parse_config(cut | {"drift": {"every": 1}})
    parse_config(cut | {"drift": {"every": 1}, "rollout": {"precision": "kv-only"}})


def test_a_tightened_correction_has_the_square_roots_of_its_bounds() -> None:
    stages: list[dict[str, object]] = [
        {"kind": "reject", "divergence": "k1", "level": "seq_mean", "low": 0.81, "high": 1.44},
        {"kind": "reject", "divergence": "k3", "level": "seq_mean", "high": 0.01},
        {"kind": "mis", "low": 0.25, "high": 4.0},
    ]
    k1, k3, mis = tightened(parse_config({"correction": {"stages": stages}}).correction).stages
    assert (k1.low, k1.high) == pytest.approx((0.9, 1.2))  # type: ignore[union-attr]
    assert k3.high == 0.01  # type: ignore[union-attr]
    assert (mis.low, mis.high) == (0.5, 2.0)  # type: ignore[union-attr]
    [tis] = tightened(RunConfig().correction).stages
    assert tis.cap == pytest.approx(2**0.5)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"drift": {"answer": "tighten"}}, "no probe is due; set drift.every"),
        (
            {"drift": {"answer": "tighten", "every": 1}, "correction": {"stages": []}},
            "no bound on a ratio",
        ),
        (
            {"drift": {"answer": "recalibrate", "every": 1}, "rollout": {"precision": "fp8"}},
            "no KV scales to measure",
        ),
        (
            {"drift": {"answer": "recalibrate", "every": 1}, "kv_scales": {"recalibrate": "never"}},
            "no KV scales to measure",
        ),
        ({"drift": {"answer": "fall-back"}}, "no probe is due; set drift.every"),
        (
            {"drift": {"answer": "fall-back", "every": 1}, "rollout": {"precision": "bf16"}},
            "precision is bf16: nothing is FP8 that could become BF16",
        ),
        (
            {
                "drift": {"answer": "fall-back", "every": 1},
                "trainer": {"precision": "fp8-aligned"},
            },
            "fp8-aligned: the trainer computes with the FP8 weights",
        ),
    ],
)
def test_an_answer_that_could_not_be_given_is_refused(
    sections: dict[str, object], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_config(sections)


def test_the_answer_holds_until_a_probe_finds_nothing(watch: DriftWatch) -> None:
    for answer, key, recalibrates, tightens in (
        ("none", "drift/0/cache", False, False),
        ("recalibrate", "drift/0/cache", True, False),
        ("recalibrate", "drift/0/unexplained", False, False),
        ("tighten", "drift/0/unexplained", False, True),
    ):
        watch._config = config(every=1, answer=answer).drift
        watch.warnings({key: 0.5})
        assert (watch.recalibrates, watch.tightens) == (recalibrates, tightens)
        watch.warnings({key: 0.01})
        assert not watch.recalibrates and not watch.tightens


@pytest.mark.parametrize(
    ("before", "kinds", "after"),
    [
        ("fp8-kv", {"cache"}, "fp8"),
        ("kv-only", {"cache", "logprob"}, "bf16"),
        ("fp8-kv", {"unexplained"}, "kv-only"),
        ("fp8-kv", {"misrouted", "logprob"}, "kv-only"),
        ("fp8", {"weights"}, "bf16"),
        ("fp8", {"activations", "head"}, "bf16"),
        ("fp8-kv", {"cache", "embedding"}, "bf16"),
        ("fp8-kv", {"logprob"}, "bf16"),
        ("kv-only", {"unexplained"}, "bf16"),  # the cache is the last that is FP8
        ("bf16", {"unexplained"}, "bf16"),
    ],
)
def test_what_is_blamed_becomes_bf16(before: Precision, kinds: set[str], after: str) -> None:
    rollout = RolloutConfig(precision=before)
    found = fallen_back(rollout, blamed(rollout, kinds))
    assert found.precision == after
    assert fallen_back(found, BOTH).precision == "bf16"
    assert found.model_dump(exclude={"precision"}) == rollout.model_dump(exclude={"precision"})


def test_settings_of_fp8_weights_go_with_them_and_with_nothing_else() -> None:
    fp8 = RolloutConfig(activations="fp8", scale_format="fp32", router="fp8-rounded")
    cache = fallen_back(fp8, {"cache"})
    assert cache == fp8.model_copy(update={"precision": "fp8"})
    for parts in ({"weights"}, BOTH):
        plain = fallen_back(fp8, parts)
        assert (plain.activations, plain.scale_format, plain.router) == (None, "pow2", "bf16")
    rounded = RolloutConfig(precision="kv-only", activations="bf16", router="fp8-rounded")
    router = fallen_back(rounded, blamed(rounded, {"misrouted"}))
    assert router == rounded.model_copy(update={"router": "bf16"}), "weights that are left to blame"
    assert (
        "runs in kv-only with BF16 routers in place of kv-only"
        in FallBack(rounded, router, "0.1").line
    )
    assert fallen_back(router, blamed(router, {"misrouted"})).precision == "bf16"


def falling_back(precision: str) -> RunConfig:
    drift = {"every": 1, "answer": "fall-back"}
    return config(**drift).model_copy(update={"rollout": RolloutConfig(precision=precision)})


@pytest.fixture
def fall_back() -> Iterator[Callable[[str], DriftWatch]]:
    """Makes the watch of a run that falls back, in a precision."""
    made = falling_back("fp8-kv")
    plan = QuantPlan.from_hf_config(hf_config(made.model, 64, 16))
    with init_distributed(made):
        trainer = MegatronTrainer(made, 64)
        yield lambda precision: DriftWatch(falling_back(precision), trainer, None, plan)


def test_a_run_falls_back_part_by_part_and_says_once_when_nothing_is_left(
    fall_back: Callable[[str], DriftWatch],
) -> None:
    fault: Metrics = {"drift/0/unexplained": 0.5, "drift/1/unexplained": 0.6, "drift/tokens": 9}
    watch = fall_back("fp8-kv")
    assert watch.fall_back({"drift/0/unexplained": 0.01}) is None
    assert watch.rollout.precision == "fp8-kv"
    for before, after in (("fp8-kv", "kv-only"), ("kv-only", "bf16")):
        found = watch.fall_back(fault)
        assert found is not None and found.metrics == {
            "drift/fall_back": "0.6 of what the layer adds is unexplained in layer 1"
        }
        assert f"in {after} in place of {before}, for good: 0.6 of what" in found.line
        assert watch.rollout.precision == after
        state = watch.state()
        watch = fall_back(after)
        watch.load_state(state)
    end = watch.fall_back(fault)
    assert end is not None and end.metrics == {}
    assert end.line.startswith("drift: nothing is left to fall back to")
    assert watch.fall_back(fault) is None
    again = fall_back("bf16")
    again.load_state(watch.state())
    assert again.fall_back(fault) is None, "told before the resume"
    assert fallen_back_in(watch.state()) == BOTH


def test_only_the_answer_fall_back_falls_back(watch: DriftWatch) -> None:
    assert watch.fall_back({"drift/0/unexplained": 0.5}) is None
    assert watch.rollout == config().rollout
