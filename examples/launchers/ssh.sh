#!/usr/bin/env bash
# Plain ssh, with keys; bash and the same paths on all machines:
#   HOSTS="10.0.0.1 10.0.0.2" GPUS=8 examples/launchers/ssh.sh retool.sft data.train_files=/data/train.parquet …
# Ctrl-C reaches all of them, and the run saves. The first that fails ends the others, and its status is
# this script's.

read -ra hosts <<<"$HOSTS"
note=/tmp/retool-$$-$RANDOM # and the rank: torchrun's process id, on its machine
status=0
stopping=no
running=()

stop() {
    stopping=yes
    for rank in "${!hosts[@]}"; do
        ssh "${hosts[rank]}" "kill -$1 \$(cat $note-$rank)" 2>/dev/null || true
    done
}
trap 'stop INT' INT
trap 'stop TERM' TERM

for rank in "${!hosts[@]}"; do
    command=(
        env TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540 # for a step and a save
        torchrun --nnodes="${#hosts[@]}" --nproc_per_node="${GPUS:-8}" --node_rank="$rank"
        --master_addr="${hosts[0]}" --master_port=29500 -m "$@"
    )
    run="(echo \$BASHPID >$note-$rank && exec $(printf '%q ' "${command[@]}"))"
    ssh "${hosts[rank]}" \
        "cd $(printf %q "$PWD") && $run; ended=\$?; rm -f $note-$rank; exit \$ended" &
    running[rank]=$!
done

# Each by its process: of two that end at once `wait -n` tells one, and forgets how the other ended
while ((${#running[@]} > 0)); do
    for rank in "${!running[@]}"; do
        kill -0 "${running[rank]}" 2>/dev/null && continue
        wait "${running[rank]}"
        ended=$?
        unset "running[rank]"
        # What was asked to stop may end with a signal's number
        if ((ended > 0)) && [ "$stopping" = no ]; then
            status=$ended
            stop TERM
        fi
    done
    sleep 0.2
done
exit "$status"
