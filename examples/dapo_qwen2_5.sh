#!/usr/bin/env bash
# DAPO with a code interpreter on two GPUs, from the export of an SFT run (examples/sft_qwen2_5.sh) or any model that calls tools.
#   MODEL_PATH=…/global_step_250/huggingface TRAIN=dapo_math_17k.parquet EVAL=aime24.parquet bash examples/dapo_qwen2_5.sh [key=value …]
# On several machines with a common SAVE_PATH, on each:  NNODES=2 PET_NODE_RANK=0 PET_MASTER_ADDR=its-first-machine bash examples/dapo_qwen2_5.sh …
# See the plan only:  bash examples/dapo_qwen2_5.sh --check
set -euo pipefail
here=$(dirname "$0")

TRAIN=${TRAIN:?the training questions, parquet or jsonl}
EVAL=${EVAL:?the validation questions}
MODEL_PATH=${MODEL_PATH:?a model folder, such as global_step_250/huggingface of the SFT run}
SAVE_PATH=${SAVE_PATH:-checkpoints/dapo-qwen2.5-0.5b}
GPUS=${GPUS:-2}
SP=${SP:-2}
TP=${TP:-1}

# exec: this process becomes torchrun, so that a signal to it reaches the run, which saves and ends.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
exec torchrun --nnodes="${NNODES:-1}" --nproc_per_node="$GPUS" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m retool.rl \
    algorithm.adv_estimator=grpo algorithm.use_kl_in_reward=False algorithm.kl_ctrl.kl_coef=0.0 \
    data.train_files="['$TRAIN']" data.val_files="['$EVAL']" data.return_raw_chat=True \
    data.train_batch_size=512 data.max_prompt_length=2048 data.max_response_length=16384 \
    data.filter_overlong_prompts=True data.truncation='error' \
    data.custom_cls.path="$here/retool_recipe.py" data.custom_cls.name=CustomRLHFDataset \
    custom_reward_function.path="$here/retool_recipe.py" custom_reward_function.name=compute_score \
    actor_rollout_ref.model.path="$MODEL_PATH" actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.use_kl_loss=False actor_rollout_ref.actor.kl_loss_coef=0.0 \
    actor_rollout_ref.actor.clip_ratio_low=0.2 actor_rollout_ref.actor.clip_ratio_high=0.28 actor_rollout_ref.actor.clip_ratio_c=10.0 \
    actor_rollout_ref.actor.optim.lr=1e-6 actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 actor_rollout_ref.actor.ppo_max_token_len_per_gpu=18432 \
    actor_rollout_ref.actor.ulysses_sequence_parallel_size="$SP" \
    actor_rollout_ref.actor.fsdp_config.param_offload=True actor_rollout_ref.actor.fsdp_config.optimizer_offload=True \
    actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=73728 \
    actor_rollout_ref.rollout.name=native actor_rollout_ref.rollout.mode=async \
    actor_rollout_ref.rollout.tensor_model_parallel_size="$TP" \
    actor_rollout_ref.rollout.multi_turn.enable=True actor_rollout_ref.rollout.multi_turn.max_user_turns=8 \
    actor_rollout_ref.rollout.multi_turn.max_assistant_turns=8 actor_rollout_ref.rollout.multi_turn.format=hermes \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.9 actor_rollout_ref.rollout.n=16 \
    actor_rollout_ref.rollout.val_kwargs.top_p=0.6 actor_rollout_ref.rollout.val_kwargs.temperature=1.0 \
    actor_rollout_ref.rollout.val_kwargs.n=30 \
    trainer.logger='["console"]' trainer.project_name=wuxibin_retool trainer.experiment_name=qwen2.5-05b_dapo \
    trainer.val_before_train=True trainer.log_val_generations=20 \
    trainer.save_freq=30 trainer.test_freq=5 trainer.default_local_dir="$SAVE_PATH" trainer.total_epochs=1 "$@"
