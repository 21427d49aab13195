#!/usr/bin/env bash
# DAPO-style RL of Qwen3-8B on one node of 8 GPUs: veRL 0.9.1, FSDP2, vLLM beside the trainer, with
# FP8 rollouts by fp8rl. Each trainer rank quantizes what it brings to the vLLM worker on its GPU.
#
#   pip install verl==0.9.1 "fp8rl[vllm]"        # veRL finds the plugin by itself
#   bash examples/verl/qwen3_8b_fsdp.sh data.train_files=... data.val_files=...
#
# Not run on GPUs yet; that veRL knows every key is tested.
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen3-8B}
DATA=${DATA:-$HOME/data/dapo-math-17k}
ROLLOUT=actor_rollout_ref.rollout
SYNC=$ROLLOUT.checkpoint_engine

DATA_ARGS=(
    data.train_files="$DATA/train.parquet"
    data.val_files="$DATA/test.parquet"
    data.train_batch_size=512
    data.max_prompt_length=2048
    data.max_response_length=8192
    data.filter_overlong_prompts=True
)

# the loss is fp8rl's; its settings are veRL's. GRPO advantages, clip-higher, mean over tokens
LOSS_ARGS=(
    algorithm.adv_estimator=grpo
    actor_rollout_ref.actor.policy_loss.loss_mode=fp8rl_ppo_clip
    actor_rollout_ref.actor.clip_ratio_low=0.2
    actor_rollout_ref.actor.clip_ratio_high=0.28
    actor_rollout_ref.actor.loss_agg_mode=token-mean
)

# token-level TIS for the difference of FP8 rollout and BF16 trainer; sequences that drifted leave
CORRECTION_ARGS=(
    algorithm.rollout_correction.rollout_is=token
    algorithm.rollout_correction.rollout_is_threshold=2.0
    algorithm.rollout_correction.rollout_rs=seq_mean_k3
    algorithm.rollout_correction.rollout_rs_threshold=0.01
)

ACTOR_ARGS=(
    actor_rollout_ref.model.path="$MODEL"
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.model.enable_gradient_checkpointing=True
    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.ppo_mini_batch_size=32
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=20480
    actor_rollout_ref.actor.fsdp_config.param_offload=True
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=True
)

ROLLOUT_ARGS=(
    $ROLLOUT.name=vllm
    $ROLLOUT.n=16
    $ROLLOUT.tensor_model_parallel_size=1
    $ROLLOUT.gpu_memory_utilization=0.7
    $ROLLOUT.calculate_log_probs=True
    $ROLLOUT.logprobs_mode=processed_logprobs
)

# blockwise FP8 weights, quantized by the trainer, proven by the engine
FP8_ARGS=(
    $ROLLOUT.quantization=fp8
    +$ROLLOUT.engine_kwargs.vllm.worker_extension_cls=fp8rl.integrations.verl.worker_extension.WorkerExtension
    $SYNC.backend=fp8rl
    +$SYNC.engine_kwargs.fp8rl.model_path="$MODEL"
)

TRAINER_ARGS=(
    trainer.v1.trainer_mode=sync
    trainer.n_gpus_per_node=8
    trainer.nnodes=1
    trainer.total_epochs=1
    trainer.save_freq=50
    trainer.test_freq=10
    trainer.project_name=fp8rl
    trainer.experiment_name=qwen3-8b-fp8
)

python3 -m verl.trainer.main_ppo \
    "${DATA_ARGS[@]}" "${LOSS_ARGS[@]}" "${CORRECTION_ARGS[@]}" "${ACTOR_ARGS[@]}" \
    "${ROLLOUT_ARGS[@]}" "${FP8_ARGS[@]}" "${TRAINER_ARGS[@]}" "$@"
