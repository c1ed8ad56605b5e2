#!/usr/bin/env bash
# Plain ssh, keys and the same paths on all machines:
#   HOSTS="10.0.0.1 10.0.0.2" GPUS=8 examples/launchers/ssh.sh retool.sft data.train_files=/data/train.parquet …
# Ctrl-C reaches all of them (-tt), and the run saves. The first that fails ends the others.

read -ra hosts <<<"$HOSTS"
trap '' INT # ssh passes it on; this script waits for the save

for rank in "${!hosts[@]}"; do
    command=(
        torchrun --nnodes="${#hosts[@]}" --nproc_per_node="${GPUS:-8}" --node_rank="$rank"
        --master_addr="${hosts[0]}" --master_port=29500 -m "$@"
    )
    ssh -tt "${hosts[rank]}" "cd $(printf %q "$PWD") && exec $(printf '%q ' "${command[@]}")" &
done

status=0
for _ in "${hosts[@]}"; do
    wait -n || { status=$?; kill $(jobs -p) 2>/dev/null; }
done
exit "$status"
