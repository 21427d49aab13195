"""fp8rl's policy losses under names that veRL knows: `actor.policy_loss.loss_mode=fp8rl_gspo`.

    fp8rl_ppo_clip, fp8rl_gspo, fp8rl_cispo, fp8rl_reinforce
    bypass_mode                       veRL's name for the loss of bypass mode, served by ours

Settings are those of veRL's actor: clip_ratio, clip_ratio_low, clip_ratio_high, clip_ratio_c,
loss_agg_mode, loss_scale_factor; in bypass mode also policy_loss.rollout_correction.

Decoupled mode: veRL shows its losses no `rollout_log_probs`, and they need none. What these say is
in `rollout_is_weights` = pi_old / pi_rollout, which the correction has put into the batch, and in
`response_mask`, from which it took what it rejected. Denominators are over all ranks and
micro-batches, as `denominators.py` has counted them.

Bypass mode: weights and rejection are those of pi / pi_rollout, known only in the forward of each
micro-batch. How many tokens of the whole mini-batch are rejected is then unknown until the last of
them, and veRL divides by a count that has them all. So rejection, and normalization over a batch,
are served where one micro-batch on one rank is the mini-batch, and else refused by name.
veRL's v1 trainer does not hand the settings over: with `loss_mode=bypass_mode` say also, in single
quotes, for the shell must not take the `$`,
`'+actor_rollout_ref.actor.policy_loss.rollout_correction=${algorithm.rollout_correction}'`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final

import torch
from pydantic import TypeAdapter
from torch import Tensor

from fp8rl.correction import (
    BatchNormalize,
    Correction,
    Counts,
    LossConfig,
    LossOutput,
    correct,
    policy_loss,
)
from fp8rl.correction.stages import Rejection
from fp8rl.integrations.verl.correction import stages_of
from fp8rl.integrations.verl.places import missing, refusing

KINDS: Final = ("ppo_clip", "gspo", "cispo", "reinforce")
BYPASS: Final = "bypass_mode"
CORRECTION_KEYS: Final = (
    "rollout_is",
    "rollout_is_threshold",
    "rollout_is_batch_normalize",
    "rollout_rs",
    "rollout_rs_threshold",
)
CORRELATION: Final = "training/rollout_actor_probs_pearson_corr"
_CONFIG: TypeAdapter[LossConfig] = TypeAdapter(LossConfig)

Result = tuple[Tensor, dict[str, float]]


class BypassRejectionError(ValueError):
    """Bypass mode cannot know in time how much of a mini-batch it rejects."""


def loss_config(kind: str, loss_agg_mode: str, actor: Any) -> LossConfig:
    """Our loss's settings from veRL's actor config.

    Raises:
        ValueError: token-sum, an aggregation that fp8rl has not, clip bounds that exclude each
            other, or `seq-mean-token-sum-norm` without `loss_scale_factor`: the width of a batch,
            which veRL would take, changes with its padding.
    """
    if loss_agg_mode == "token-sum":
        raise ValueError(
            "actor.loss_agg_mode is token-sum, a sum that grows with the batch, which fp8rl's "
            "losses have not; use token-mean, or seq-mean-token-sum-norm, which has a constant"
        )
    settings: dict[str, Any] = {"kind": kind, "aggregation": loss_agg_mode}
    if loss_agg_mode == "seq-mean-token-sum-norm":
        settings["max_tokens"] = actor.loss_scale_factor
        if settings["max_tokens"] is None:
            raise ValueError(
                "actor.loss_scale_factor is not set, which seq-mean-token-sum-norm divides by; "
                "set it to data.max_response_length"
            )
    if kind != "reinforce":
        for ours, veRLs in (("clip_low", "clip_ratio_low"), ("clip_high", "clip_ratio_high")):
            bound = getattr(actor, veRLs)
            settings[ours] = actor.clip_ratio if bound is None else bound
    if kind == "ppo_clip":
        settings["dual_clip"] = actor.get("clip_ratio_c", 3.0)
    return _CONFIG.validate_python(settings)


def weighted_loss(
    kind: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    actor: Any,
    rollout_is_weights: Tensor | None,
    given: Mapping[str, Any],
) -> Result:
    """One micro-batch's share of the loss, as veRL wants it: times the data-parallel size.

    Args:
        kind: of `KINDS`. actor: veRL's ActorConfig. given: veRL's `global_batch_info`, what the
            loss is divided by; counted here where it is not said. The others are veRL's,
            [batch, tokens].

    Returns:
        the loss, and means over this micro-batch's tokens by name.

    Raises:
        ValueError: as `loss_config` and `fp8rl.correction.policy_loss`.
    """
    kept = response_mask.bool()
    counts = Counts(
        _given(given, "batch_num_tokens", kept.sum()),
        _given(given, "global_batch_size", kept.any(dim=-1).sum()),
    )
    weights = torch.ones_like(log_prob) if rollout_is_weights is None else rollout_is_weights
    out = policy_loss(
        loss_config(kind, loss_agg_mode, actor),
        log_prob,
        old_log_prob,
        advantages,
        weights,
        kept,
        counts=counts,
    )
    return out.loss * given.get("dp_size", 1), _own_means(out, counts)


def bypass_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Result:
    """The loss of bypass mode: `old_log_prob` is the rollout's.

    Weights of `policy_loss.rollout_correction` go into REINFORCE (loss_type=reinforce); with
    loss_type=ppo_clip the ratio pi / pi_rollout is the correction, and they are only measured.

    Raises:
        BypassRejectionError: rejection or normalization over more than this micro-batch.
        ValueError: another loss_type; else as `weighted_loss`.
    """
    settings = config.policy_loss.get("rollout_correction", None)
    if settings is None:
        raise ValueError(
            "policy_loss.rollout_correction is not set, which loss_mode=bypass_mode takes its "
            "settings from; set actor.policy_loss.rollout_correction as algorithm's"
        )
    loss_type = settings.get("loss_type", "ppo_clip")
    if loss_type not in ("ppo_clip", "reinforce"):
        raise ValueError(f"loss_type={loss_type!r} is not one of ppo_clip, reinforce")
    stages = stages_of(**{key: settings.get(key) for key in CORRECTION_KEYS if key in settings})
    whole = _is_whole(response_mask, config.global_batch_info)
    if not whole:
        for stage in stages:
            if isinstance(stage, Rejection | BatchNormalize):
                raise BypassRejectionError(
                    f"bypass_mode with {stage.kind}: a mini-batch of several micro-batches or "
                    "ranks cannot know in time what all of them reject, so its loss would be "
                    "divided by a wrong count. Use algorithm.rollout_correction.bypass_mode=false, "
                    "or leave rollout_rs and rollout_is_batch_normalize out"
                )
    found = correct(stages, log_prob.detach(), old_log_prob, response_mask.bool())
    loss, metrics = weighted_loss(
        loss_type,
        old_log_prob,
        log_prob,
        advantages,
        found.kept,
        loss_agg_mode,
        config,
        found.weights if loss_type == "reinforce" else None,
        {} if whole else config.global_batch_info,
    )
    return loss, metrics | _measured(found)


class _Named:
    """One of our losses as veRL calls it."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __call__(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> Result:
        """As `weighted_loss`."""
        tensors = (old_log_prob, log_prob, advantages, response_mask)
        given = config.global_batch_info
        return weighted_loss(self._kind, *tensors, loss_agg_mode, config, rollout_is_weights, given)


def install(core_algos: ModuleType) -> None:
    """Put the losses into veRL's registry; bypass mode is only replaced where there is one."""
    losses: dict[str, Any] = {f"fp8rl_{kind}": _Named(kind) for kind in KINDS}
    losses[BYPASS] = bypass_loss
    registry = getattr(core_algos, "POLICY_LOSS_REGISTRY", None)
    if registry is None:
        missing(f"{core_algos.__name__}.POLICY_LOSS_REGISTRY")
        return
    if BYPASS not in registry:
        losses[BYPASS] = refusing(missing(f"loss {BYPASS} in {core_algos.__name__}"))
    registry.update(losses)


def _is_whole(response_mask: Tensor, given: Mapping[str, Any]) -> bool:
    """Whether these tokens are all that the loss is divided by."""
    if (given.get("dp_size") or 1) > 1:
        return False
    tokens, sequences = given.get("batch_num_tokens"), given.get("global_batch_size")
    rows = int(response_mask.any(dim=-1).sum())
    return tokens in (None, int(response_mask.sum())) and sequences in (None, rows)


def _given(given: Mapping[str, Any], key: str, here: Tensor) -> Tensor | float:
    found = given.get(key)
    return here if found is None else float(found)


def _own_means(out: LossOutput, counts: Counts) -> dict[str, float]:
    """Metrics as means over the tokens here, of which veRL takes the mean; so no maxima."""
    named = {name: value for name, value in out.metrics.items() if not name.endswith("_max")}
    device = out.loss.device
    numbers = [out.counts.tokens, counts.tokens, *named.values()]
    together = torch.stack([torch.as_tensor(n, device=device).double() for n in numbers])
    own, total, *values = together.tolist()
    share = total / own if own else 0.0
    return {name: value * share for name, value in zip(named, values, strict=True)}


def _measured(found: Correction) -> dict[str, float]:
    """The correction's metrics, the same names whatever the micro-batch holds.

    veRL refuses to average over ranks what not every micro-batch of each has. So one without
    tokens counts as a token of equal policies; the correlation, which one token has not, is left
    out.
    """
    if not found.statistics.sum("tokens"):
        same = torch.zeros(1, 1, device=found.kept.device)
        found = correct(found.stages, same, same, torch.ones_like(same, dtype=torch.bool))
    metrics = found.metrics()
    metrics.pop(CORRELATION, None)
    return metrics
