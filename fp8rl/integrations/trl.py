"""TRL's GRPOTrainer with fp8rl's correction and loss.

    trainer = CorrectedGRPOTrainer(
        model, reward_funcs, args=GRPOConfig(..., vllm_importance_sampling_correction=False),
        train_dataset=dataset, correction=[TIS(cap=2.0)], policy_loss=PPOClip(),
    )

After every generation the trainer's own log-probs are set against those that were sampled with,
from TRL's vLLM or from a `rollout_func`; weights and kept tokens go with the batch, and the loss is
fp8rl's, divided by what is kept in the window of micro-batches of one optimizer step, over all
processes. Everything else is TRL's: generation, rewards, advantages, the optimizer. A token that
vLLM could not score (its log-prob is NaN) leaves the loss, where TRL takes it with a ratio of 1.

Left out, and refused by name: beta (KL to a reference), entropy bonus, `top_entropy_quantile`,
`off_policy_mask_threshold`, `importance_sampling_level` and `delta`, which the loss's own settings
stand for, MoE auxiliary loss, images, and optimizer steps that reach over two generations. Written
for TRL 1.16, whose private methods `_generate_and_score_completions` and `_compute_loss` it
overrides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from trl import GRPOTrainer

from fp8rl.correction import Counts, LossConfig, Stage, correct, count
from fp8rl.correction import policy_loss as corrected_loss

WEIGHTS: Final = "fp8rl_weights"
KEPT: Final = "fp8rl_kept"
OVERRIDDEN: Final = ("_generate_and_score_completions", "_compute_loss")

# setting of GRPOConfig -> the only value that this loss has; absent ones are as good
LEFT_OUT: Final = {
    "beta": 0.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "importance_sampling_level": "token",
    "delta": None,
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
        self._refuse_what_is_left_out()
        self._stages, self._loss_config = tuple(correction), policy_loss

    def _refuse_what_is_left_out(self) -> None:
        for name, expected in LEFT_OUT.items():
            found = getattr(self.args, name, expected)
            if found != expected:
                raise UnsupportedTRLError(
                    f"{name} is {found}: not part of fp8rl's loss; leave it {expected}"
                )
        if getattr(self, "aux_loss_enabled", False):
            raise UnsupportedTRLError(
                "the model's MoE auxiliary loss is not part of fp8rl's; set "
                "router_aux_loss_coef=0.0"
            )
        if self.use_vllm and self.vllm_importance_sampling_correction:
            raise UnsupportedTRLError(
                "vllm_importance_sampling_correction=True would correct beside fp8rl; set it False"
            )
        generated, accumulated = (
            self.args.steps_per_generation,
            self.args.gradient_accumulation_steps,
        )
        if generated % accumulated:
            raise UnsupportedTRLError(
                f"steps_per_generation is {generated} and gradient_accumulation_steps "
                f"{accumulated}: an optimizer step would reach over two generations, whose kept "
                "tokens are not known together; make the first a multiple of the second"
            )

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
        mask = _mask(batch) & ~sampled.isnan()
        group = dist.group.WORLD if self.accelerator.num_processes > 1 else None
        old = batch["old_per_token_logps"]
        found = correct(self._stages, old, sampled, mask, group=group)
        batch |= {WEIGHTS: found.weights, KEPT: found.kept}
        everywhere = replace(found, statistics=found.statistics.reduced(group))
        if everywhere.statistics.sum("tokens") > 0:  # all may be truncated, and masked for it
            for name, value in everywhere.metrics().items():
                self._metrics[self._mode()][name].append(value)
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
        mode = self._mode()
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
        """The model's log-probs of the completions, [batch, tokens]; a micro-batch at a time."""
        args = self.args
        train = self.model.training
        rows = args.per_device_train_batch_size if train else args.per_device_eval_batch_size
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        found: Tensor = self._get_per_token_logps_and_entropies(
            model, ids, mask, batch["completion_ids"].size(1), batch_size=rows
        )[0]
        return found

    def _mode(self) -> str:
        """TRL's name of what is going on."""
        return "train" if self.model.training else "eval"


def _mask(batch: dict[str, Any]) -> Tensor:
    """Tokens that the policy sampled, bool [batch, tokens]."""
    mask: Tensor = batch["completion_mask"]
    sampled: Tensor = batch.get("tool_mask", mask)
    return mask.bool() & sampled.bool()
