"""FP8 rollouts for a trainer of your own: here plain PyTorch and a Hugging Face model.

    python examples/own_trainer.py [FOLDER]

The model is small and random; its reward is the share of even tokens in a response, which it
learns to raise. What fp8rl does is in ``main`` and ``kv_scales``; the rest stands for your trainer.
"""

import sys
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from fp8rl.correction import TIS, PPOClip, correct, group_advantages, policy_loss
from fp8rl.engine.rollout import RolloutEngine, Sample, Sampling
from fp8rl.engine.settings import EngineSettings
from fp8rl.quant import KVCalibrator, KVScaleRule, KVScales
from fp8rl.sync import HuggingFaceQKV, IterableSource, Publisher

STEPS, GROUP, TOKENS, EOS = 12, 8, 16, 1
PROMPTS = [[2 + i, 3 + i, 4 + i] for i in range(16)]


def main(folder: Path) -> None:
    """Run RL: publish, roll out, correct, learn."""
    config = tiny_qwen3()
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = EngineSettings(
        hf_config=config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]},
        precision="fp8-kv",
        max_model_len=64,
        max_num_seqs=128,
        kv_cache_bytes=2**26,
    )
    sampling = Sampling(max_tokens=TOKENS, stop_token=EOS, samples=GROUP)
    qkv = HuggingFaceQKV(model)
    calibrator = KVCalibrator(KVScaleRule(), qkv.shape)
    tokens = torch.tensor(PROMPTS)
    real = torch.ones_like(tokens, dtype=torch.bool)
    with (
        RolloutEngine(settings, folder) as engine,
        Publisher(settings.plan(), engine, kv_layers=qkv.shape.layers) as publisher,
    ):
        for version in range(STEPS):
            scales = kv_scales(model, qkv, calibrator, version, tokens, real)
            source = IterableSource(model.state_dict())
            sync = publisher.publish(source, version=version, kv_scales=scales)  # proven on return
            groups = engine.generate(PROMPTS, version=version, sampling=sampling, seed=version)
            tokens, mask, behaviour, rewards = to_tensors(groups)
            real = mask | (torch.arange(tokens.shape[1]) < len(PROMPTS[0]))
            with torch.no_grad():
                old = log_probs(model, tokens, mask)
            fix = correct([TIS(cap=2.0)], old, behaviour, mask)
            advantages = group_advantages(rewards, GROUP)
            new = log_probs(model, tokens, mask)
            policy_loss(PPOClip(), new, old, advantages, fix.weights, fix.kept).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"version {version}: reward {rewards.mean():.3f}, {sync.nbytes} bytes published")


def kv_scales(
    model: Qwen3ForCausalLM,
    qkv: HuggingFaceQKV,
    calibrator: KVCalibrator,
    version: int,
    tokens: torch.Tensor,
    real: torch.Tensor,
) -> KVScales:
    """Measure the scales of this version on the batch just trained, [B, S]; padding is not real."""
    observer = calibrator.observer()
    with qkv.watch(observer) as watch, torch.no_grad():
        watch.token_mask = real
        model(tokens)
    return calibrator.scales(observer.observation(), version)  # of ranks: .reduced()


def tiny_qwen3() -> Qwen3Config:
    """A 2-layer Qwen3; widths are multiples of 128, as FP8 blocks ask."""
    return Qwen3Config(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )


def to_tensors(groups: list[list[Sample]]) -> tuple[torch.Tensor, ...]:
    """Tokens [B, S], response mask [B, S], behaviour log-probs [B, S] and rewards [B]."""
    rows = [(p, s) for p, group in zip(PROMPTS, groups, strict=True) for s in group]
    shape = (len(rows), len(PROMPTS[0]) + TOKENS)
    tokens, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    behaviour, rewards = torch.zeros(shape), torch.zeros(len(rows))
    for row, (prompt, sample) in enumerate(rows):
        part = slice(len(prompt), len(prompt) + len(sample.tokens))
        tokens[row, : part.stop] = torch.tensor([*prompt, *sample.tokens])
        mask[row, part] = True
        behaviour[row, part] = torch.tensor(sample.logprobs)
        rewards[row] = sum(token % 2 == 0 for token in sample.tokens) / len(sample.tokens)
    return tokens, mask, behaviour, rewards


def log_probs(model: Qwen3ForCausalLM, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-probs [B, S] of the tokens that were sampled, 0 elsewhere."""
    logits = model(tokens[:, :-1]).logits.float()
    chosen = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return torch.where(mask, torch.nn.functional.pad(chosen, (1, 0)), 0.0)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_trainer"))
