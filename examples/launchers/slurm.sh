#!/usr/bin/env bash
# Slurm: sbatch examples/launchers/slurm.sh retool.sft data.train_files=/data/train.parquet …
# Ten minutes before the time is up Slurm signals this script: the run saves, and the job queues again.
#SBATCH --job-name=retool
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

queue_again() {
    scancel --signal=USR1 "$SLURM_JOB_ID" # to every torchrun, not to this script
    wait "$run"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap queue_again USR1

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540 # for a step and a save

# The node's own variables are read on each node, so the quotes are single
srun --kill-on-bad-exit=1 bash -c 'exec torchrun \
    --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" --node_rank="$SLURM_NODEID" \
    --master_addr="$MASTER_ADDR" --master_port=29500 \
    --signals-to-handle=SIGTERM,SIGUSR1 \
    -m "$@"' torchrun "$@" &
run=$!
wait "$run"
