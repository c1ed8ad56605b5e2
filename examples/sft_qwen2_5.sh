#!/usr/bin/env bash
# Multi-turn SFT of Qwen2.5-0.5B-Instruct on two GPUs, every sequence shared by both. Needs a parquet with `messages` and `tools`.
#   TRAIN=train.parquet EVAL=test.parquet bash examples/sft_qwen2_5.sh [key=value …]
# Look at the data first:  python -m retool.data audit "$TRAIN" --model "$MODEL_PATH" --max-length 16384
# On several machines with a common SAVE_PATH, on each:  NNODES=2 PET_NODE_RANK=0 PET_MASTER_ADDR=its-first-machine bash examples/sft_qwen2_5.sh …
# See the plan only:       bash examples/sft_qwen2_5.sh --check
set -euo pipefail

TRAIN=${TRAIN:?the training parquet or jsonl}
EVAL=${EVAL:?the validation parquet or jsonl}
MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-0.5B-Instruct}
SAVE_PATH=${SAVE_PATH:-checkpoints/multiturn-sft-Qwen2.5-0.5B-Instruct}
GPUS=${GPUS:-2}
SP=${SP:-2}

# When the machine is taken away (SIGTERM or SIGUSR1) the workers save, if they get the time; the same command then goes on.
# exec: this process becomes torchrun, so that a signal to it reaches the run.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
exec torchrun --nnodes="${NNODES:-1}" --nproc_per_node="$GPUS" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m retool.sft \
    data.train_files="$TRAIN" data.val_files="$EVAL" \
    data.max_length=16384 data.train_batch_size=16 \
    data.multiturn.enable=true data.multiturn.messages_key=messages data.multiturn.tools_key=tools \
    data.micro_batch_size_per_gpu=2 \
    model.partial_pretrain="$MODEL_PATH" model.strategy=fsdp \
    trainer.default_local_dir="$SAVE_PATH" trainer.project_name=wuxibin-multiturn-sft \
    trainer.experiment_name=multiturn-sft-Qwen2.5-0.5B-Instruct \
    trainer.logger='["console"]' trainer.total_epochs=2 \
    ulysses_sequence_parallel_size="$SP" use_remove_padding=true "$@"
