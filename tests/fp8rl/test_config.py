"""The configuration: what is wrong is named with its key, what was found and what would do."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fp8rl.config.file import dump_config, load_config, parse_config
from fp8rl.config.run import RunConfig
from fp8rl.correction import MIS, PRESETS, TIS, CorrectionConfig, PPOClip, Reject
from fp8rl.errors import ConfigError


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("")
    return path


def test_an_empty_file_is_the_default_run(empty: Path) -> None:
    config = load_config(empty)
    assert config == RunConfig()
    assert config.rollout.precision == "fp8-kv"
    assert config.correction == CorrectionConfig(stages=(TIS(level="token", cap=2.0),))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["correction.stages=[{kind: mis, high: 3}]", "loss.preset=gspo", "seed=7"],
        ["correction.stages=[]", "task.operations=[sum]", "trainer.learning_rate=1e-4"],
    ],
)
def test_a_dumped_config_reads_back_the_same(
    empty: Path, tmp_path: Path, overrides: list[str]
) -> None:
    config = load_config(empty, overrides)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


def test_overrides_replace_the_values_of_the_file(empty: Path) -> None:
    empty.write_text("steps: 5\nmodel:\nloss: {kind: ppo_clip, clip_low: 0.25}\n")
    config = load_config(empty, ["steps=6", "model.num_layers=2", "loss.clip_high=0.4"])
    assert (config.steps, config.model.num_layers) == (6, 2)
    assert config.loss == PPOClip(clip_low=0.25, clip_high=0.4)


def test_the_stages_of_the_correction_are_told_apart_by_kind(empty: Path) -> None:
    stages = "[{kind: reject, level: token, divergence: k3, high: 0.1}, {kind: mis, low: 0.25}]"
    found = load_config(empty, [f"correction.stages={stages}"]).correction
    reject = Reject(level="token", divergence="k3", high=0.1)
    assert found == CorrectionConfig(stages=(reject, MIS(low=0.25)))
    assert load_config(empty, ["correction.stages=[]"]).correction.stages == ()


def test_a_preset_stands_for_mode_and_stages_and_a_loss_preset_takes_settings(empty: Path) -> None:
    chosen = ["correction.preset=bypass_ppo_clip_geo_rs", "loss.preset=dr_grpo"]
    config = load_config(empty, [*chosen, "loss.max_tokens=6", "loss.clip_low=0.1"])
    assert config.correction == PRESETS["bypass_ppo_clip_geo_rs"]
    assert config.loss == PPOClip(
        clip_low=0.1, clip_high=0.2, aggregation="seq-mean-token-sum-norm", max_tokens=6
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", "unknown key 'stepz'; did you mean 'steps'?"),
        ("modle.num_layers=3", "unknown key 'modle'; did you mean 'model'?"),
        ("rollout.temprature=1", "unknown key 'rollout.temprature'; did you mean 'temperature'?"),
        ("loss.clip_hihg=1", "unknown key 'loss.clip_hihg'; did you mean 'clip_high'?"),
        ("loss.kind=ppo", "loss: .*'ppo'.*'ppo_clip', 'gspo', 'cispo', 'reinforce'"),
        ("loss.preset=grp", "loss: preset 'grp' is not one of grpo, dapo"),
        ("loss.preset=dr_grpo", "loss: .*give max_tokens, the longest response"),
        ("correction.preset=tis", "correction: preset 'tis' is not one of disabled, decoupled_tok"),
        ("correction={preset: disabled, mode: bypass}", "stands for mode and stages; leave out mo"),
        ("correction.mode=bypass", "correction.mode is bypass and loss.kind is ppo_clip, whose"),
        ("correction.stages=[{kind: tsi}]", r"correction\.stages\.0: .*'tsi'.*'tis', 'mis', 'ice"),
        (
            "correction.stages=[{cap: 2}]",
            r"stages\.0: has no kind; set .*to one of tis, mis, icepo",
        ),
        ("correction.stages=[{kind: tis, cap: 0}]", r"^[^;]*correction\.stages\.0\.cap: .*found 0"),
        ("correction.stages=[{kind: tis}, {kind: mis}]", "tis and mis both give weights; keep one"),
        ("correction.stages=[{kind: batch_normalize}]", "batch_normalize rescales weights, but no"),
        ("correction.stages=[{kind: mis, low: 3}]", "low = 3.0 and high = 2.0: low must be below"),
        ("correction.stages=[{kind: reject, high: 2}]", "low is missing: k1 is bounded by low and"),
        ("model.hidden_size=200", "model: hidden_size is 200, not a multiple of 128.*use 256"),
        ("model.hidden_size=", "model.hidden_size: .*found None"),
        ("model.head_dim=96", "num_kv_heads x head_dim is 192"),
        ("model.num_kv_heads=3", "num_kv_heads"),
        ("model.family=qwen4", "model.family: .*'qwen3', 'qwen2' or 'qwen3_moe'.*found 'qwen4'"),
        ("model={family: qwen2, hidden_size: 128}", "is 256, which for family qwen2 must be .*128"),
        ("trainer.tensor_parallel=3", "trainer.tensor_parallel is 3"),
        ("trainer.pipeline_parallel=3", "trainer.pipeline_parallel is 3"),
        ("trainer.minibatches=3", "trainer.minibatches is 3"),
        ("rollout.precision=fp4", "rollout.precision: .*'fp8-kv'.*found 'fp4'"),
        ("kv_scales.observer.percent=99", "observer: has no kind; set .*to one of amax, percentil"),
        ("kv_scales.over_steps.kind=mean", "over_steps: .*'mean'.*'latest', 'running_max', 'ema'"),
        ("kv_scales.margin=0.9", "kv_scales.margin: .*found 0.9"),
        ("kv_scales.calibrate_on=test", "calibrate_on: .*'trained', 'prompts' or 'fixed'"),
        ("kv_scales.margn=2", "unknown key 'kv_scales.margn'; did you mean 'margin'?"),
        ("rollout.samples_per_prompt=1", "rollout.samples_per_prompt: .*found 1"),
        ("rollout.temperature=0", "rollout.temperature: .*found 0"),
        ("rollout.segment_tokens=0", "rollout.segment_tokens: .*found 0"),
        ("rollout.segment_tokens=1.5", "rollout.segment_tokens: .*found 1.5"),
        ("trainer.learning_rate=.inf", "trainer.learning_rate: .*finite"),
        ("trainer.learning_rate=.nan", "trainer.learning_rate: "),
        ("steps=many", "steps: .*found 'many'"),
        ("steps=0", "steps: .*found 0"),
        ("task.min_digits=9", "min_digits 9 > max_digits 5"),
        ("task.operations=[]", "task.operations: "),
        ("task.operations=[revers]", "task.operations.0: .*found 'revers'"),
        ("model=3", "model: .*found 3"),
        ("seed.x=1", "seed: "),
        ("seed", "not of the form a.b=c"),
        ("=1", "not of the form a.b=c"),
        ("seed=[1", "not YAML"),
    ],
)
def test_one_message_names_the_key_and_what_was_found(
    empty: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(empty, [override])


@pytest.mark.parametrize("kind", ["ppo_clip", "gspo", "cispo", "reinforce"])
def test_an_unknown_key_of_a_variant_is_named_without_its_tag(empty: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'loss\.knid'; did you mean 'kind'"):
        load_config(empty, [f"loss.kind={kind}", "loss.knid=1"])


def test_an_unknown_key_of_a_stage_is_named_by_its_place(empty: Path) -> None:
    stages = "correction.stages=[{kind: veto}, {kind: tis, level: token, cup: 3}]"
    with pytest.raises(ConfigError, match=r"unknown key 'correction\.stages\.1\.cup'.*'cap'"):
        load_config(empty, [stages])


def test_a_key_of_another_variant_is_unknown(empty: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'loss\.dual_clip'"):
        load_config(empty, ["loss.kind=gspo", "loss.dual_clip=3"])


def test_a_loss_without_a_kind_is_the_default_kind(empty: Path) -> None:
    assert load_config(empty, ["loss.dual_clip=3"]).loss == PPOClip(dual_clip=3)


@pytest.mark.parametrize("cap", ["0", "-1", ".inf"])
def test_a_cap_that_truncates_nothing_sensible_is_refused(empty: Path, cap: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^;]*correction\.stages\.0\.cap: "):
        load_config(empty, [f"correction.stages=[{{kind: tis, cap: {cap}}}]"])


def test_an_override_cannot_enter_a_value(empty: Path) -> None:
    empty.write_text("model: 3\n")
    with pytest.raises(ConfigError, match="'model' is a value, not a section"):
        load_config(empty, ["model.num_layers=2"])


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1, 2]", "holds a list"), ("a: [", "is not YAML"), ("1: 2", "unknown|string")],
)
def test_a_file_that_is_no_mapping_of_keys_is_refused(empty: Path, text: str, message: str) -> None:
    empty.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(empty)
    assert str(empty) in str(error.value)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(binary)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match=r"steps: .*; unknown key 'a'"):
        parse_config({"a": 1, "steps": 0})


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().steps = 3  # type: ignore[misc]


def test_every_example_is_a_valid_config() -> None:
    examples = sorted((Path(__file__).parents[2] / "examples").glob("grpo*.yaml"))
    for example in examples:
        assert load_config(example).steps > 0


def test_the_dump_names_every_value() -> None:
    dumped = yaml.safe_load(dump_config(RunConfig()))
    assert set(dumped) == set(RunConfig.model_fields)
    assert set(dumped["rollout"]) == set(type(RunConfig().rollout).model_fields)
