#!/usr/bin/env bash
# Asynchronous RL of Qwen3-30B-A3B (mixture of experts): veRL 0.9.1, Megatron on two nodes, vLLM
# replicas on two others, with FP8 rollouts by fp8rl. Trainer rank 0 quantizes, and one NCCL
# broadcast brings the FP8 bytes to all replicas.
#
#   pip install verl==0.9.1 "fp8rl[vllm,megatron]" mbridge
#   ray start ...                                # four nodes of 8 GPUs
#   bash examples/verl/qwen3_30b_a3b_megatron.sh data.train_files=... data.val_files=...
#
# Not run on GPUs yet; that veRL knows every key is tested.
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen3-30B-A3B}
DATA=${DATA:-$HOME/data/dapo-math-17k}
ROLLOUT=actor_rollout_ref.rollout
SYNC=$ROLLOUT.checkpoint_engine
MEGATRON=actor_rollout_ref.actor.megatron

DATA_ARGS=(
    data.train_files="$DATA/train.parquet"
    data.val_files="$DATA/test.parquet"
    data.train_batch_size=128
    data.max_prompt_length=2048
    data.max_response_length=16384
    data.filter_overlong_prompts=True
)

# GSPO: one ratio a sequence, which a router that moves disturbs least
LOSS_ARGS=(
    algorithm.adv_estimator=grpo
    actor_rollout_ref.actor.policy_loss.loss_mode=fp8rl_gspo
    actor_rollout_ref.actor.clip_ratio_low=3e-4
    actor_rollout_ref.actor.clip_ratio_high=4e-4
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean
)

# token-level TIS: the ratio of a whole sequence is a product, which vanishes with its length. At
# 16,384 tokens and a KL of 1e-3 each, as of weights that are some steps old, half of the sequences
# would weigh less than 1e-6. Rejection bounds the mean over a sequence, which does not
CORRECTION_ARGS=(
    algorithm.rollout_correction.rollout_is=token
    algorithm.rollout_correction.rollout_is_threshold=2.0
    algorithm.rollout_correction.rollout_rs=seq_mean_k1
    algorithm.rollout_correction.rollout_rs_threshold=0.99_1.01
)

ACTOR_ARGS=(
    actor_rollout_ref.model.path="$MODEL"
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.ppo_mini_batch_size=32
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=20480
    $MEGATRON.tensor_model_parallel_size=4
    $MEGATRON.pipeline_model_parallel_size=2
    $MEGATRON.expert_model_parallel_size=8
    $MEGATRON.expert_tensor_parallel_size=1
    $MEGATRON.use_mbridge=True
    $MEGATRON.param_offload=True
    $MEGATRON.optimizer_offload=True
)

ROLLOUT_ARGS=(
    $ROLLOUT.name=vllm
    $ROLLOUT.n=16
    $ROLLOUT.nnodes=2
    $ROLLOUT.n_gpus_per_node=8
    $ROLLOUT.tensor_model_parallel_size=2
    $ROLLOUT.gpu_memory_utilization=0.8
    $ROLLOUT.calculate_log_probs=True
    $ROLLOUT.logprobs_mode=processed_logprobs
)

# blockwise FP8 weights, all experts and no router, quantized by trainer rank 0
FP8_ARGS=(
    $ROLLOUT.quantization=fp8
    +$ROLLOUT.engine_kwargs.vllm.worker_extension_cls=fp8rl.integrations.verl.worker_extension.WorkerExtension
    $SYNC.backend=fp8rl
    +$SYNC.engine_kwargs.fp8rl.model_path="$MODEL"
    +$SYNC.engine_kwargs.fp8rl.transport=nccl
)

TRAINER_ARGS=(
    trainer.v1.trainer_mode=separate_async
    trainer.v1.separate_async.parameter_sync_step=4
    trainer.n_gpus_per_node=8
    trainer.nnodes=2
    trainer.total_epochs=1
    trainer.save_freq=50
    trainer.test_freq=10
    trainer.project_name=fp8rl
    trainer.experiment_name=qwen3-30b-a3b-fp8
)

python3 -m verl.trainer.main_ppo model_engine=megatron \
    "${DATA_ARGS[@]}" "${LOSS_ARGS[@]}" "${CORRECTION_ARGS[@]}" "${ACTOR_ARGS[@]}" \
    "${ROLLOUT_ARGS[@]}" "${FP8_ARGS[@]}" "${TRAINER_ARGS[@]}" "$@"
