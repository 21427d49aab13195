"""The configuration of the correction, and veRL's presets of it by their names.

    decoupled   three policies: the loss's ratio is pi / pi_old, its weights are pi_old / pi_rollout
    bypass      two policies: pi_old = pi_rollout, so that the loss's ratio is pi / pi_rollout;
                stages look at pi / pi_rollout, of the policy being stepped

In bypass mode a clipped loss takes no weights, for its ratio is the correction already, and what
is corrected are micro-batches, so that no stage can take a batch's mean; `check_bypass` refuses
both.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import model_validator

from fp8rl.correction.losses_config import LossConfig
from fp8rl.correction.stages import (
    TIS,
    Frozen,
    IcePop,
    Reject,
    Rescaling,
    Stage,
    Weighting,
    check_stages,
)

Mode = Literal["decoupled", "bypass"]


class CorrectionConfig(Frozen):
    """What is done about the difference between sampler and trainer; default token-level TIS.

    `preset` is a name of `PRESETS` and stands for mode and stages; give one or the other.
    """

    mode: Mode = "decoupled"
    stages: tuple[Stage, ...] = (TIS(),)

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "preset" not in value:
            return value
        name = value["preset"]
        if len(value) > 1:
            other = ", ".join(sorted(set(value) - {"preset"}))
            raise ValueError(f"preset {name!r} stands for mode and stages; leave out {other}")
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
        return PRESETS[name].model_dump()

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        check_stages(self.stages)
        return self


def check_bypass(correction: CorrectionConfig, loss: LossConfig) -> None:
    """Refuse, in bypass mode, weights beside a ratio that corrects already, and batch means.

    Raises:
        ValueError: a stage that gives weights, and a loss other than reinforce; or a stage that
            rescales.
    """
    if correction.mode != "bypass":
        return
    for stage in correction.stages:
        if isinstance(stage, Rescaling):
            raise ValueError(
                f"correction.mode is bypass: {stage.kind} needs the mean of a whole batch, and "
                "bypass corrects its micro-batches; use mode=decoupled, or leave it out"
            )
        if isinstance(stage, Weighting) and loss.kind != "reinforce":
            raise ValueError(
                f"correction.mode is bypass and loss.kind is {loss.kind}, whose ratio is "
                f"pi / pi_rollout already: the weights of {stage.kind} would correct twice; use "
                "loss.kind=reinforce, mode=decoupled, or only reject and veto"
            )


def _decoupled(*stages: Stage) -> CorrectionConfig:
    return CorrectionConfig(mode="decoupled", stages=stages)


def _bypass(*stages: Stage) -> CorrectionConfig:
    return CorrectionConfig(mode="bypass", stages=stages)


_TOKEN, _SEQUENCE = TIS(level="token", cap=2.0), TIS(level="sequence", cap=2.0)
_ICEPOP = IcePop(level="token", low=0.5, high=5.0)
_GEO = Reject(divergence="k1", level="seq_mean", low=0.999, high=1.001)
_K3 = Reject(divergence="k3", level="seq_mean", high=0.01)

# Names and values of veRL's RolloutCorrectionConfig. `bypass_pg_*` go with loss.kind=reinforce.
PRESETS: Mapping[str, CorrectionConfig] = MappingProxyType(
    {
        "disabled": _decoupled(),
        "decoupled_token_is": _decoupled(_TOKEN),
        "decoupled_seq_is": _decoupled(_SEQUENCE),
        "decoupled_token_icepop": _decoupled(_ICEPOP),
        "decoupled_seq_is_rs": _decoupled(
            Reject(divergence="k1", level="seq_sum", low=0.5, high=2.0), _SEQUENCE
        ),
        "decoupled_geo_rs": _decoupled(_GEO),
        "decoupled_geo_rs_seq_tis": _decoupled(_GEO, _SEQUENCE),
        "decoupled_geo_rs_token_tis": _decoupled(_GEO, _TOKEN),
        "decoupled_k3_rs": _decoupled(_K3),
        "decoupled_k3_rs_seq_tis": _decoupled(_K3, _SEQUENCE),
        "decoupled_k3_rs_token_tis": _decoupled(_K3, _TOKEN),
        "bypass_ppo_clip": _bypass(),
        "bypass_ppo_clip_geo_rs": _bypass(_GEO),
        "bypass_ppo_clip_k3_rs": _bypass(_K3),
        "bypass_pg_is": _bypass(_SEQUENCE),
        "bypass_pg_token_icepop": _bypass(_ICEPOP),
        "bypass_pg_geo_rs": _bypass(_GEO),
        "bypass_pg_geo_rs_seq_tis": _bypass(_GEO, _SEQUENCE),
        "bypass_pg_geo_rs_token_tis": _bypass(_GEO, _TOKEN),
    }
)
