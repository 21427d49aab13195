"""The rule from observations to scales: statistic, memory over versions, margin, provenance."""

import pytest
import torch
from pydantic import ValidationError

from fp8rl.quant import (
    EMA,
    AttentionShape,
    KVCalibrator,
    KVObservation,
    KVScaleError,
    KVScaleRule,
    Percentile,
    RunningMax,
)

SHAPE = AttentionShape(layers=2, q_heads=2, kv_heads=1)


def calibrator(**rule) -> KVCalibrator:
    return KVCalibrator(KVScaleRule(**rule), SHAPE)


def observed(made: KVCalibrator, size: float, tokens: int = 10) -> KVObservation:
    """A batch whose elements are at most `size`, in q, k and v of every layer."""
    observer = made.observer()
    for layer in range(SHAPE.layers):
        parts = [
            torch.linspace(0, 1, tokens * heads * 4).view(tokens, heads, 4) for heads in (2, 1, 1)
        ]
        observer.observe(layer, *(size * part for part in parts))
    return observer.observation()


def magnitudes(made: KVCalibrator, *sizes: float) -> list[float]:
    """What the scales of successive versions cover."""
    return [
        made.scales(observed(made, size), version).layers[1].k.magnitude
        for version, size in enumerate(sizes)
    ]


def test_the_default_is_amax_of_this_version_alone_rounded_up_to_a_power_of_two():
    made = calibrator()
    scales = made.scales(observed(made, 3.0), 5)
    assert (scales.version, scales.observer, scales.tokens, scales.margin) == (5, "amax", 10, 1.0)
    assert scales.layers[0].v.magnitude == 3.0
    assert scales.layers[0].v.scale == 2.0**-7  # 3 / 448 = 2^-7.2
    assert scales.layers[0].q.head_amax == observed(made, 3.0).head_amax(0, "q")
    assert magnitudes(made, 3.0, 1.0, 2.0) == [3.0, 1.0, 2.0]


def test_margin_and_fp32_scales():
    made = calibrator(margin=1.5, scale_format="fp32")
    scale = made.scales(observed(made, 3.0), 0).layers[0].k.scale
    assert scale == pytest.approx(4.5 / 448, rel=1e-6)


def test_a_running_maximum_covers_the_last_versions_and_forgets_older_ones():
    made = calibrator(over_steps=RunningMax(steps=3))
    assert magnitudes(made, 1.0, 8.0, 2.0, 4.0, 1.0, 1.0, 1.0) == [
        1.0,
        8.0,
        8.0,
        8.0,
        4.0,
        4.0,
        1.0,
    ]


def test_a_moving_average_starts_at_the_first_version():
    assert magnitudes(calibrator(over_steps=EMA(decay=0.75)), 8.0, 4.0, 4.0) == [8.0, 7.0, 6.25]


def test_a_percentile_leaves_the_largest_elements_out():
    made = calibrator(observer=Percentile(percent=90.0))
    scales = made.scales(observed(made, 1.0, tokens=1000), 0)
    assert 0.9 <= scales.layers[0].k.magnitude <= 0.9 * (1 + 2.0**-5)
    assert max(scales.layers[0].k.head_amax) == 1.0
    assert scales.observer == "percentile 90"


def test_provenance_names_the_memory():
    assert KVScaleRule(over_steps=RunningMax(steps=4)).name == "amax, running maximum of 4 versions"
    assert KVScaleRule(over_steps=EMA()).name == "amax, moving average with decay 0.9"


def test_a_percentile_that_falls_on_zeros_is_refused_by_layer():
    made = calibrator(observer=Percentile(percent=50.0))
    observer = made.observer()
    for layer in range(SHAPE.layers):
        q, k, v = (torch.ones(10, heads, 4) for heads in (2, 1, 1))
        v[: 6 if layer == 1 else 4] = 0
        observer.observe(layer, q, k, v)
    with pytest.raises(KVScaleError, match=r"only zeros were observed in layer 1 v \(1 in all\)"):
        made.scales(observer.observation(), 0)


@pytest.mark.parametrize("over_steps", [RunningMax(steps=3), EMA(decay=0.5)])
def test_a_resumed_calibrator_goes_on_as_the_unbroken_one(over_steps):
    unbroken, resumed = calibrator(over_steps=over_steps), calibrator(over_steps=over_steps)
    magnitudes(unbroken, 8.0, 2.0)
    resumed.load_state(unbroken.state())
    assert magnitudes(resumed, 1.0, 3.0) == magnitudes(unbroken, 1.0, 3.0)


def test_a_failed_observation_leaves_the_memory_as_it_was():
    made = calibrator(over_steps=RunningMax(steps=3))
    magnitudes(made, 2.0)
    before = made.state()["history"]
    for bad in (0.0, float("nan")):
        with pytest.raises(KVScaleError):
            made.scales(observed(made, bad), 1)
    assert torch.equal(made.state()["history"], before)


def test_the_state_of_another_model_is_refused():
    with pytest.raises(KVScaleError, match=r"history is \[1, 9, 3\], expected \[versions, 2, 3\]"):
        calibrator().load_state({"history": torch.zeros(1, 9, 3)})


@pytest.mark.parametrize(
    "wrong",
    [
        {"margin": 0.5},
        {"observer": {"kind": "percentile", "percent": 0}},
        {"observer": {"kind": "mean"}},
        {"over_steps": {"kind": "ema", "decay": 1.0}},
        {"over_steps": {"kind": "running_max", "steps": 0}},
        {"scale_format": "e8m0"},
        {"window": 3},
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValidationError):
        KVScaleRule.model_validate(wrong)
