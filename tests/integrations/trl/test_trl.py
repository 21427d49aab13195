"""A real GRPOTrainer on a real tiny model: one step is the gradient of our loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl import GRPOConfig

from fp8rl.correction import TIS, PPOClip, Reinforce, Reject, correct, policy_loss
from fp8rl.integrations.trl import CorrectedGRPOTrainer, UnsupportedTRLError

WORDS = [f"w{i}" for i in range(30)]
STAGES = [TIS(cap=1.2), Reject(divergence="k2", high=0.08)]
COMPLETION = 6


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *WORDS])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")


def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).float()


def rollout(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
    """Random words, of different lengths, with log-probs of a policy that is not the trainer's."""
    generator = torch.Generator().manual_seed(len(prompts))
    found: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    for row, prompt in enumerate(prompts):
        ids = trainer.processing_class(prompt)["input_ids"]
        n = 2 + row % (COMPLETION - 1)
        completion = torch.randint(2, 32, (n,), generator=generator)
        with torch.no_grad():
            logits = trainer.model(torch.tensor([[*ids, *completion.tolist()]])).logits[0]
        logps = logits.log_softmax(-1)[len(ids) - 1 : -1].gather(1, completion[:, None])[:, 0]
        other = logps + 0.4 * torch.randn(n, generator=generator)
        found["prompt_ids"].append(ids)
        found["completion_ids"].append(completion.tolist())
        found["logprobs"].append(other.clamp(max=-0.01).tolist())
    return found


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 7) for text in completions]


def trainer(
    folder: Path,
    loss: Any = None,
    stages: Any = STAGES,
    sampler: Any = rollout,
    policy: Any = None,
    **settings: Any,
) -> CorrectedGRPOTrainer:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": COMPLETION,
        "max_steps": 1,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "temperature": 1.0,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "vllm_importance_sampling_correction": False,
    }
    return CorrectedGRPOTrainer(
        policy or model(),
        reward,
        args=GRPOConfig(**(defaults | settings)),
        train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(8)]}),
        processing_class=tokenizer(),
        rollout_func=sampler,
        correction=stages,
        policy_loss=loss or PPOClip(),
    )


def joined(batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The micro-batches of a step as one batch."""
    names = [name for name, value in batches[0].items() if torch.is_tensor(value) and value.ndim]
    return {name: torch.cat([batch[name] for batch in batches]) for name in names}


@pytest.mark.parametrize(
    "loss",
    [PPOClip(), Reinforce(aggregation="seq-mean-token-mean")],
    ids=["ppo_clip", "reinforce"],
)
def test_a_step_is_the_gradient_of_our_loss_over_the_whole_batch(tmp_path: Path, loss: Any) -> None:
    made = trainer(tmp_path, loss)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    moved = {name: before[name] - p.detach() for name, p in made.model.named_parameters()}

    batch = joined(made._buffered_inputs)
    with torch.no_grad():
        for name, p in made.model.named_parameters():
            p.copy_(before[name])
    made.model.zero_grad()
    logprobs = made._logprobs(made.model, batch)
    mask = batch["completion_mask"].bool()
    found = correct(STAGES, logprobs, batch["sampling_per_token_logps"], mask)
    assert 0 < found.kept.sum() < mask.sum()
    out = policy_loss(
        loss, logprobs, logprobs.detach(), batch["advantages"], found.weights, found.kept
    )
    out.loss.backward()
    for name, p in made.model.named_parameters():
        torch.testing.assert_close(moved[name], p.grad, atol=1e-6, rtol=1e-4)
    assert any(bool(p.grad.any()) for p in made.model.parameters())


def test_what_was_corrected_is_in_the_log(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.train()
    log = made.state.log_history[0]
    assert log["rollout_corr/k3_kl"] > 0
    assert 0 < log["rollout_corr/rollout_rs_masked_fraction"] < 1
    assert log["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)


def test_without_stages_the_weights_are_ones(tmp_path: Path) -> None:
    made = trainer(tmp_path, stages=[])
    made.train()
    batch = joined(made._buffered_inputs)
    assert torch.equal(batch["fp8rl_weights"], batch["completion_mask"].float())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"entropy_coef": 0.01}, "entropy_coef is 0.01"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy is True"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level is sequence"),
        ({"delta": 4.0}, "delta is 4.0: not part of fp8rl's loss; leave it None"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile is 0.5"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold is 0.5"),
        (
            {"steps_per_generation": 3},
            "steps_per_generation is 3 and gradient_accumulation_steps 2: .* make the first",
        ),
        (
            {"steps_per_generation": 1},
            "steps_per_generation is 1 and gradient_accumulation_steps 2: .* make the first",
        ),
    ],
    ids=str,
)
def test_what_the_loss_has_not_is_refused(
    tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(UnsupportedTRLError, match=told):
        trainer(tmp_path, **settings)


def test_the_auxiliary_loss_of_experts_is_refused_by_its_setting(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, moe_intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=2, num_experts_per_tok=1, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    experts = Qwen3MoeForCausalLM(config)
    with pytest.raises(UnsupportedTRLError, match=r"router_aux_loss_coef=0\.0"):
        trainer(tmp_path, policy=experts)
    trainer(tmp_path, policy=experts, router_aux_loss_coef=0.0)


def test_a_generation_is_scored_a_micro_batch_at_a_time(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    rows: list[int] = []
    made.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])) if kwargs else None,
        with_kwargs=True,
    )
    made.train()
    assert max(rows) == 4 < len(joined(made._buffered_inputs)["completion_ids"])


def test_completions_that_are_all_truncated_are_a_step_of_nothing(tmp_path: Path) -> None:
    made = trainer(tmp_path, mask_truncated_completions=True)  # no word is the end
    before = [p.detach().clone() for p in made.model.parameters()]
    made.train()
    assert not joined(made._buffered_inputs)["fp8rl_kept"].any()
    assert all(map(torch.equal, before, made.model.parameters()))
    assert "rollout_corr/k3_kl" not in made.state.log_history[0]


def partly_scored(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
    """The same, but vLLM could not score the first token of each."""
    found = rollout(prompts, trainer)
    for logprobs in found["logprobs"]:
        logprobs[0] = float("nan")
    return found


def test_tokens_that_vLLM_could_not_score_leave_the_loss(tmp_path: Path) -> None:
    made = trainer(tmp_path, stages=[TIS(cap=1.2)], sampler=partly_scored)
    made.train()
    batch = joined(made._buffered_inputs)
    expected = batch["completion_mask"].bool()
    expected[:, 0] = False
    assert torch.equal(batch["fp8rl_kept"], expected)
    assert all(bool(p.isfinite().all()) for p in made.model.parameters())


def test_a_generation_without_logprobs_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.rollout_func = None
    with pytest.raises(UnsupportedTRLError, match="without log-probs"):
        made.train()
