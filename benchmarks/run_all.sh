#!/usr/bin/env bash
# The tables of this machine's GPUs: benchmarks/run_all.sh OUT [PART…]. Parts, the most telling first, each within ten minutes on two GPUs:
#   0  the headline: SFT, sampling beside transformers (and vLLM, where Python finds it), a GRPO step; beside TRL and verl where TRL=… and VERL=…
#     say where they are (the Python of an environment, or folders for PYTHONPATH), or Python finds TRL. `make bench` runs this part.
#   1  rollout beside transformers, attention, the vocabulary head; a GRPO step beside TRL (installed, or TRL=its folder),
#     (the same TRL) with a random 0.5B or RL_MODEL=Hugging Face folder
#   2  long sequences: 0.5B up to a million tokens, 8B
#   3  sequence parallelism, what sharding hides, SFT, checkpoints, memory
#   4  MODEL=Hugging Face folder, DATA=folder of gsm8k-tool-sft, PROMPTS=parquet with a column prompt: parity on real weights, learning
#   5  SFT of TRL and verl, where TRL=… and VERL=… say (benchmarks/peers.py); BOUND=script: the lean loop beside ours
#   7  QUESTIONS=parquet, EVAL=parquet, TOKENIZER=folder: the published DAPO command, two steps
#   6  the code interpreter, packing, rendering (with MODEL and DATA as in 4): no GPU needed
# NAME.log and NAME.json in OUT have every row as soon as it is measured; what takes too long is stopped and keeps what it had.
# Without a GPU tiny shapes run, to see whether everything would.
set -u
out=$(mkdir -p "${1:?usage: run_all.sh OUT [PART…]}" && cd "$1" && pwd); shift; cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
gpus=$($python -c 'import torch; print(torch.cuda.device_count())')
table() { # NAME SECONDS COMMAND…: run, keep everything, show the rows
  local name=$1 limit=$2 start=$SECONDS status; shift 2
  timeout -k 20 "$limit" "$@" --json "$out/$name.json" >"$out/$name.log" 2>&1; status=$?
  echo; echo "== $name: exit status $status, $((SECONDS - start)) s"; grep -E '^\||torch [0-9]|^weight sync|tok/s' "$out/$name.log"
}
# NAME[-variant] SECONDS arguments…, on all GPUs or on one
many() { local name=$1 limit=$2; shift 2; table "$name" "$limit" $python -m torch.distributed.run --standalone --nproc_per_node=$((gpus ? gpus : 2)) "benchmarks/${name%%-*}.py" "$@"; }
one() { local name=$1 limit=$2; shift 2; table "$name" "$limit" $python "benchmarks/${name%%-*}.py" "$@"; }
on() { local gpu=$1; shift; ((gpus)) && export CUDA_VISIBLE_DEVICES=$((gpu < gpus ? gpu : 0)); "$@"; }
has() { $python -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; } # whether Python finds it
trl_ways() { if [ -n "${TRL:-}" ]; then echo generate; elif has trl; then echo "generate$(has vllm && echo ,vllm)"; fi; } # empty: no TRL here
tiny() { ((gpus)) || echo "$@"; } # only without a GPU

part0() {
  many sft 150 --rows full,mixed --repeats 2 $(tiny --shape tiny --scale 1024)
  on 0 one rollout 300 --peers "generate_batch$(has vllm && echo ,vllm)" $(tiny --shape tiny --sequences 4 --prompt 12 --new 6)
  one rl_step 300 --timeout 140 --logs "$out/rl_step" --ways "$(trl_ways)" ${TRL:+--trl "$TRL"} \
    $(tiny --shape tiny --gpus 2 --device cpu --prompts 2 --samples 2 --prompt 64 --response 8 --warm-up 1 --repeats 1 --trl-repeats 1)
  rm -rf "$out/rl_step/model"
  [ -z "$(trl_ways)${VERL:-}" ] || part5
}
part1() {
  (on 0 one rollout 130 --peer-seconds 45 $(tiny --shape tiny --sequences 4 --prompt 12 --new 6)
   on 0 one rollout-long 100 --prompt 512 --new 1024 --peers generate_batch --peer-seconds 70 $(tiny --shape tiny --sequences 4 --prompt 12 --new 6)
   on 0 one rollout-groups 80 --group 8 --peers generate_batch --peer-seconds 45 $(tiny --shape tiny --sequences 4 --prompt 12 --new 6)) & ((gpus > 1)) || wait
  (on 1 one logprobs 60 $(tiny --tokens 512 --vocab 4096 --dim 32); on 1 one attention 190 $(tiny --heads 4/2x16)) & wait
  one rl_step 260 --timeout 120 --logs "$out/rl_step" ${TRL:+--trl "$TRL"} ${RL_MODEL:+--model "$RL_MODEL"} \
    $(tiny --shape tiny --prompts 2 --samples 2 --prompt 64 --response 8 --repeats 1 --trl-repeats 1)
}
part2() {
  many long_context 370 --budget 340 $( ((gpus)) && echo --lengths 65536,262144,1048576)
  many long_context-8b 170 --budget 150 $( ((gpus)) && echo --shape llama3-8b --lengths 65536,262144)
}
part3() {
  many ulysses 110 $(tiny --repeats 2)
  many fsdp_overlap 80 $(tiny --scale 1024)
  many sft 150 --rows full,mixed,full-recompute $(tiny --shape tiny --scale 1024 --repeats 1)
  many checkpoint 60 --repeats 2 --rows 0 1 4
  many memory 140 $(tiny --shape tiny --scale 1024 --rows 0.5b-none,0.5b-full)
}
part4() {
  one parity 60 --model "$MODEL" --data "$PROMPTS" $(tiny --prompts 2 --new 8)
  one learn 480 --model "$MODEL" --data "$DATA" --out "$out/learn" --seconds 470 $(tiny --gpus 1 --questions 2 --response 48 --sequences 4 \
    --sft-steps 1 --sft-batch 2 --tokens 2048 --rl-steps 1 --prompts 2 --samples 2 --updates 1)
}
part5() { # what sft.py has measured already isn't measured again
  mkdir -p "$out/peers"; [ ! -f "$out/sft.json" ] || cp "$out/sft.json" "$out/peers/retool.json"
  timeout 560 $python benchmarks/peers.py "$out/peers" --only "$([ -z "$(trl_ways)" ] || echo trl)${VERL:+,verl}${BOUND:+,bound}" ${TRL:+--trl "$TRL"} ${VERL:+--verl "$VERL"} ${BOUND:+--bound "$BOUND"} \
    --gpus "$((gpus ? gpus : 2))" $(tiny --shape tiny --scale 1024) 2>&1 | tee "$out/peers.log"
}
part7() { one published 300 --dapo "$QUESTIONS" "$EVAL" --tokenizer "$TOKENIZER" --timeout 280 --logs "$out/published" $(tiny --shape tiny --gpus 1 --questions 2 --samples 2 --response 16); }
part6() { one sandbox 200 --seconds 1 --callers 1,8,64; one packing 60; [ -z "${DATA:-}" ] || one rendering 120 "$DATA/train.parquet" "$MODEL"; }

for part in ${@:-1 2 3 6}; do "part$part"; done
