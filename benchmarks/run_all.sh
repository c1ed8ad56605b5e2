#!/usr/bin/env bash
# Every table on this machine's GPUs: benchmarks/run_all.sh OUT [SECONDS]. Each benchmark gets at most SECONDS (300); its table and
# numbers land in OUT as soon as it has ended, so that a run cut short still leaves what it had.
set -u
out=${1:?usage: run_all.sh OUT [SECONDS]}; limit=${2:-300}; mkdir -p "$out"; cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} TOKENIZERS_PARALLELISM=false
gpus=$(python3 -c 'import torch; print(max(torch.cuda.device_count(), 1))')
table() { # NAME COMMAND…: run, keep everything, show the table
  local name=$1 start=$SECONDS; shift
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || echo "$name: exit status $? after $((SECONDS - start)) s, see $out/$name.log"
  grep -E '^\||^[0-9]×|NVIDIA|^[A-Z][a-z ]+$' "$out/$name.log" | tail -25
}
many() { local name=$1; shift; table "$name" torchrun --standalone --nproc_per_node="$gpus" "benchmarks/$name.py" "$@" --json "$out/$name.json"; }
one() { local name=$1; shift; table "$name" python3 "benchmarks/$name.py" "$@" --json "$out/$name.json"; }
many sft
many memory
many checkpoint --repeats 3
many fsdp_overlap
many ulysses
many long_context
one attention
one logprobs
one rollout
one rl_step
one sandbox --seconds 1 --callers 1,8,64
one packing
