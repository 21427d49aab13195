"""TRL's GRPOTrainer with fp8rl's correction and loss.

    trainer = CorrectedGRPOTrainer(
        model, reward_funcs, args=GRPOConfig(..., vllm_importance_sampling_correction=False),
        train_dataset=dataset, correction=[TIS(cap=2.0)], policy_loss=PPOClip(),
    )

After every generation the trainer's own log-probs are set against those that were sampled with,
from TRL's vLLM or from a `rollout_func`; weights and kept tokens go with the batch, and the loss is
fp8rl's, divided by what is kept in the window of micro-batches of one optimizer step, over all
processes. Everything else is TRL's: generation, rewards, advantages, the optimizer.

Left out, and refused by name: beta (KL to a reference), entropy bonus, `top_entropy_quantile`,
`off_policy_mask_threshold`, MoE auxiliary loss, images. Written for TRL 1.16, whose private methods
`_generate_and_score_completions` and `_compute_loss` it overrides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from trl import GRPOTrainer

from fp8rl.correction import Counts, LossConfig, Stage, correct, count
from fp8rl.correction import policy_loss as corrected_loss

WEIGHTS: Final = "fp8rl_weights"
KEPT: Final = "fp8rl_kept"
OVERRIDDEN: Final = ("_generate_and_score_completions", "_compute_loss")

# TRL's attribute -> the only value that this loss has; absent ones are as good
LEFT_OUT: Final = {
    "beta": 0.0,
    "_entropy_bonus_enabled": False,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "aux_loss_enabled": False,
}


class UnsupportedTRLError(ValueError):
    """TRL is configured for, or is, what this adapter does not cover; names the setting."""


class CorrectedGRPOTrainer(GRPOTrainer):
    """GRPO whose loss is corrected for the policy that sampled."""

    def __init__(
        self, *args: Any, correction: Sequence[Stage], policy_loss: LossConfig, **kwargs: Any
    ) -> None:
        """As TRL's.

        Args:
            args, kwargs: of `GRPOTrainer`.
            correction: the stages of `fp8rl.correction`.
            policy_loss: which loss, and how it is averaged; TRL's `loss_type` and `epsilon` are
                not looked at.

        Raises:
            UnsupportedTRLError: a setting that this loss has not, or another TRL.
        """
        for name in OVERRIDDEN:
            if not hasattr(GRPOTrainer, name):
                raise UnsupportedTRLError(f"this TRL has no GRPOTrainer.{name}; known: TRL 1.16")
        super().__init__(*args, **kwargs)
        for name, expected in LEFT_OUT.items():
            found = getattr(self, name, expected)
            if found != expected:
                raise UnsupportedTRLError(
                    f"{name.strip('_')} is {found}: not part of fp8rl's loss; leave it {expected}"
                )
        if self.use_vllm and self.vllm_importance_sampling_correction:
            raise UnsupportedTRLError(
                "vllm_importance_sampling_correction=True would correct beside fp8rl; set it False"
            )
        self._stages, self._loss_config = tuple(correction), policy_loss

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's batch of one generation, with weights and kept tokens [batch, tokens]."""
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if "pixel_values" in batch:
            raise UnsupportedTRLError("images are not covered by this loss")
        sampled = batch.get("sampling_per_token_logps")
        if sampled is None:
            raise UnsupportedTRLError(
                "the generation came without log-probs, so there is nothing to correct by; use "
                "use_vllm=True or a rollout_func that returns logprobs"
            )
        if batch.get("old_per_token_logps") is None:
            with torch.no_grad():
                batch["old_per_token_logps"] = self._logprobs(self.model, batch)
        found = correct(self._stages, batch["old_per_token_logps"], sampled, _mask(batch))
        batch |= {WEIGHTS: found.weights, KEPT: found.kept}
        mode = "train" if self.model.training else "eval"
        for name, value in found.metrics().items():
            self._metrics[mode][name].append(value)
        return batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The share of one micro-batch in the loss of its optimizer step."""
        counts = self._counted(inputs)
        out = corrected_loss(
            self._loss_config,
            self._logprobs(model, inputs),
            inputs["old_per_token_logps"],
            inputs["advantages"],
            inputs[WEIGHTS],
            inputs[KEPT],
            counts=counts,
        )
        mode = "train" if self.model.training else "eval"
        tokens = out.counts.tokens
        share = counts.tokens / tokens if bool(tokens) else 0.0  # TRL logs means, ours add up
        for name, value in out.metrics.items():
            own = value if name.endswith("_max") else value * share
            self._metrics[mode][name].append(float(own))
        ranks: int = self.accelerator.num_processes  # which average their gradients
        return out.loss * ranks

    def _counted(self, inputs: dict[str, Any]) -> Counts:
        """What is kept in the window of micro-batches that this one belongs to, everywhere."""
        window = [inputs]
        if self.model.training:
            buffered, steps = self._buffered_inputs, self.current_gradient_accumulation_steps
            place = self._step % self.args.steps_per_generation
            first = place - place % steps
            window = buffered[first : first + steps]
        found = sum((count(each[KEPT]) for each in window[1:]), count(window[0][KEPT]))
        both = torch.stack([torch.as_tensor(found.tokens), torch.as_tensor(found.sequences)])
        everywhere = self.accelerator.reduce(both, reduction="sum")
        return Counts(everywhere[0], everywhere[1])

    def _logprobs(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """The model's log-probs of the completions, [batch, tokens]."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        found: Tensor = self._get_per_token_logps_and_entropies(
            model, ids, mask, batch["completion_ids"].size(1)
        )[0]
        return found


def _mask(batch: dict[str, Any]) -> Tensor:
    """Tokens that the policy sampled, bool [batch, tokens]."""
    mask: Tensor = batch["completion_mask"]
    sampled: Tensor = batch.get("tool_mask", mask)
    return mask.bool() & sampled.bool()
