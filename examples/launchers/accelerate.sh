#!/usr/bin/env bash
# accelerate launch, which starts torchrun; the machine's number and GPUs as options or from `accelerate config`:
#   examples/launchers/accelerate.sh --num_machines=2 --machine_rank=0 --main_process_ip=10.0.0.1 \
#       --main_process_port=29500 --num_processes=16 -m retool.sft data.train_files=/data/train.parquet …
# Mixed precision, FSDP and the rest of its configuration are other keys here: data types and sharding
# are retool's own (model.fsdp_config).
exec accelerate launch --multi_gpu --mixed_precision=no "$@"
