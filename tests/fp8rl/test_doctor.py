"""The doctor: a run that cannot work here is refused, and every missing thing has its price."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
import torch

from fp8rl.config.rollout import Precision
from fp8rl.config.run import RunConfig
from fp8rl.doctor.engine import examine_engine
from fp8rl.doctor.machine import MODULES, Finding, Machine, check_machine, examine
from fp8rl.engine.settings import EngineSettings
from fp8rl.errors import ConfigError, EngineDiedError, EngineError
from fp8rl.sync.segment import Segment

ALL_MODULES = frozenset(MODULES)
NONE = {"avx512": False, "avx512_bf16": False, "amx_tile": False}
AMX_CPU = dict.fromkeys(NONE, True)
BF16_CPU = AMX_CPU | {"amx_tile": False}
AVX512_CPU = NONE | {"avx512": True}
AMX_ALONE = NONE | {"amx_tile": True}
OLD_CPU = NONE


def machine(
    features: dict[str, bool] = AMX_CPU,
    *,
    gpus: tuple[tuple[int, int], ...] = (),
    modules: frozenset[str] = ALL_MODULES,
) -> Machine:
    return Machine(features, gpus, modules)


def config(precision: Precision) -> RunConfig:
    return RunConfig.model_validate({"rollout": {"precision": precision}})


def row(findings: list[Finding], name: str) -> Finding:
    [found] = [finding for finding in findings if finding.name == name]
    return found


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("gpus", [(), ((8, 9),), ((9, 0), (10, 0))])
def test_a_full_machine_runs_every_arm(
    precision: Precision, gpus: tuple[tuple[int, int], ...]
) -> None:
    check_machine(config(precision), machine(AMX_CPU, gpus=gpus))


@pytest.mark.parametrize(
    ("precision", "features", "message"),
    [
        ("fp8-kv", AMX_ALONE, "AVX-512 .*--precision fp8 or bf16"),
        ("fp8-kv", AVX512_CPU, "AMX tiles or AVX-512 BF16 .*--precision bf16"),
        ("fp8-kv", OLD_CPU, "AMX tiles.*; .*AVX-512"),
        ("fp8", OLD_CPU, "precision is fp8, .*AMX tiles"),
        ("kv-only", AMX_ALONE, "precision is kv-only, .*AVX-512"),
    ],
)
def test_a_processor_without_the_kernels_is_refused(
    precision: Precision, features: dict[str, bool], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_machine(config(precision), machine(features))


def test_bf16_runs_on_any_processor() -> None:
    check_machine(config("bf16"), machine(OLD_CPU))


@pytest.mark.parametrize("precision", get_args(Precision))
def test_avx512_bf16_does_in_place_of_amx(precision: Precision) -> None:
    check_machine(config(precision), machine(BF16_CPU))


def test_fp8_activations_need_no_amx_but_for_experts() -> None:
    rollout = {"precision": "fp8", "activations": "fp8"}
    check_machine(RunConfig.model_validate({"rollout": rollout}), machine(AVX512_CPU))
    experts = {"num_experts": 4, "experts_per_token": 2, "moe_ffn_hidden_size": 128}
    model = {"family": "qwen3_moe", **experts}
    moe = RunConfig.model_validate({"rollout": rollout, "model": model})
    with pytest.raises(ConfigError, match="no AMX tiles"):
        check_machine(moe, machine(AVX512_CPU))


def test_fp8_weights_alone_need_no_avx512() -> None:
    check_machine(config("fp8"), machine(AMX_ALONE))


def test_an_fp8_cache_alone_needs_no_amx() -> None:
    check_machine(config("kv-only"), machine(AVX512_CPU))


def test_the_processor_does_not_matter_where_a_gpu_is() -> None:
    check_machine(config("fp8-kv"), machine(OLD_CPU, gpus=((9, 0),)))


def test_an_older_gpu_is_refused_for_fp8_and_named() -> None:
    with pytest.raises(ConfigError, match=r"CUDA device 1 has compute capability 8\.0.*8\.9"):
        check_machine(config("fp8"), machine(gpus=((9, 0), (8, 0))))
    check_machine(config("bf16"), machine(gpus=((8, 0),)))


@pytest.mark.parametrize("absent", sorted(MODULES))
@pytest.mark.parametrize("precision", ["bf16", "fp8-kv"])
def test_a_missing_package_is_refused_with_what_to_install(
    absent: str, precision: Precision
) -> None:
    with pytest.raises(ConfigError, match=f"{absent} is not installed.*make setup.*pip install"):
        check_machine(config(precision), machine(modules=ALL_MODULES - {absent}))


def test_everything_missing_is_said_in_one_message() -> None:
    with pytest.raises(ConfigError) as error:
        check_machine(config("fp8-kv"), machine(OLD_CPU, modules=frozenset()))
    for name in (*MODULES, "AVX-512", "AMX tiles"):
        assert name in str(error.value)


def test_a_full_machine_misses_nothing() -> None:
    assert [finding for finding in examine(machine()) if finding.state == "missing"] == []


def test_every_absence_has_a_price_and_nothing_present_has_one() -> None:
    findings = examine(machine(OLD_CPU, modules=frozenset()))
    assert all(bool(finding.cost) == (finding.state != "ok") for finding in findings)
    missing = {finding.name for finding in findings if finding.state == "missing"}
    assert missing == {*MODULES, "AVX-512", "AMX tiles or AVX-512 BF16"}


def test_processor_features_are_optional_where_a_gpu_is() -> None:
    findings = examine(machine(OLD_CPU, gpus=((9, 0),)))
    assert row(findings, "AMX tiles or AVX-512 BF16").state == "optional"
    assert row(findings, "GPU 0").state == "ok"


def test_an_older_gpu_is_missing_for_the_default_arm() -> None:
    found = row(examine(machine(gpus=((8, 0),))), "GPU 0")
    assert (found.state, found.found) == ("missing", "compute capability 8.0")


def test_the_plugin_entry_point_of_this_installation_is_registered() -> None:
    assert row(examine(machine()), "vLLM plugin entry point").state == "ok"


def test_this_machine_has_what_the_requirements_install() -> None:
    assert Machine.here().modules == ALL_MODULES


class StubEngine:
    """Stands in for ``RolloutEngine``; ``backends`` are those of its workers.

    It takes whatever is published, but for the scales in ``loses``, of which it keeps 1.0.
    """

    backends: tuple[str, ...] = ()
    loses: tuple[str, ...] = ()
    refuses = False
    started: ClassVar[list[EngineSettings]]

    def __init__(self, settings: EngineSettings, folder: Path) -> None:
        self.settings = settings
        self.started.append(settings)

    def __enter__(self) -> StubEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def worker_report(self) -> list[dict[str, Any]]:
        if not self.backends:
            raise EngineDiedError("the rollout engine ended: no memory")
        return [{"backend": name, "activations": {"linear": "fp8"}} for name in self.backends]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        transport = init_info["transport"]
        self.segment = Segment.attach(transport["path"], transport["nbytes"])

    def start_weight_update(self) -> None:
        if self.refuses:
            raise EngineError("not now")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if "manifest" not in update_info:  # the one stage begins where the ring does
            return
        self.scales: dict[str, dict[str, list[float]]] = {}
        for record in update_info["manifest"]["tensors"]:
            if record["name"].endswith(("q_scale", "k_scale", "v_scale")):
                held = self.segment.view(record["parcel"]["offset"], 4).view(torch.float32).item()
                layer, _, name = record["name"].rpartition(".")
                copies = [held, 1.0 if record["name"] in self.loses else held]
                self.scales.setdefault(layer, {})[name[0]] = copies
        self.segment.close()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass

    def kv_state(self) -> list[dict[str, Any]]:
        return [self.scales]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[StubEngine]:
    class Stub(StubEngine):
        started: ClassVar[list[EngineSettings]] = []

    monkeypatch.setattr("fp8rl.doctor.engine.RolloutEngine", Stub)
    return Stub


def test_a_worker_without_our_backend_is_named(stub: type[StubEngine]) -> None:
    stub.backends = ("Receiver", "NoneType")
    findings = examine_engine(machine())
    assert row(findings, "worker 0 plugin").state == "ok"
    broken = row(findings, "worker 1 plugin")
    assert (broken.state, broken.found, bool(broken.cost)) == ("missing", "NoneType", True)


def test_an_engine_that_does_not_start_is_missing_and_says_why(stub: type[StubEngine]) -> None:
    [finding] = examine_engine(machine())
    assert (finding.state, "no memory" in finding.found) == ("missing", True)


@pytest.mark.parametrize(
    ("features", "precision"),
    [(AMX_CPU, "fp8-kv"), (AVX512_CPU, "kv-only"), (OLD_CPU, "bf16"), (AMX_ALONE, "bf16")],
)
def test_the_engine_is_started_in_an_arm_that_the_processor_has(
    stub: type[StubEngine], features: dict[str, bool], precision: Precision
) -> None:
    stub.backends = ("Receiver",)
    examine_engine(machine(features))
    assert [settings.precision for settings in stub.started] == [precision]


def test_scales_that_do_not_arrive_are_named(stub: type[StubEngine]) -> None:
    stub.backends = ("Receiver",)
    assert row(examine_engine(machine()), "KV scales").found == "6 published, 6 proven"
    stub.loses = ("model.layers.1.self_attn.attn.k_scale",)
    found = row(examine_engine(machine()), "KV scales")
    assert found.state == "missing" and "no FP8 KV cache" in found.cost
    assert found.found == f"6 published, 5 proven; not as sent: {stub.loses[0]}"
    stub.refuses = True
    found = row(examine_engine(machine()), "KV scales")
    assert (found.state, "not now" in found.found) == ("missing", True)


def test_an_engine_with_a_bf16_cache_is_asked_for_no_scales(stub: type[StubEngine]) -> None:
    stub.backends = ("Receiver",)
    names = [finding.name for finding in examine_engine(machine(OLD_CPU))]
    assert names == ["engine", "worker 0 plugin"]


def test_no_engine_is_started_without_vllm(stub: type[StubEngine]) -> None:
    [finding] = examine_engine(machine(modules=ALL_MODULES - {"vllm"}))
    assert (finding.state, stub.started) == ("missing", [])


@pytest.mark.slow
def test_our_backend_is_live_in_a_real_engine_and_takes_kv_scales() -> None:
    findings = examine_engine()
    assert row(findings, "worker 0 plugin").found == "Receiver"
    assert row(findings, "KV scales").found == "6 published, 6 proven"
    assert row(findings, "FP8 activations").found == "W8A8 in 8 of 8 FP8 layers"
    assert [finding for finding in findings if finding.state != "ok"] == []
