#!/bin/sh
# Training on a machine with GPUs: one process, then as many as there are GPUs, DDP and FSDP2, on the
# same examples. Prints tokens a second of the last half of each run, and the last losses.
#
#     benchmarks/gpu_train.sh BASE CHATS [STEPS]
#
# BASE: a model with a chat template; CHATS: a file of chats. Results stay in gpu-train/.
set -eu

base=$1
chats=$2
steps=${3:-40}
out=gpu-train
configs=$(dirname "$0")/../recipes/accelerate
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -gt 0 ] || { echo "no CUDA device here" >&2; exit 2; }

train() { # NAME, and the words before `train`
    name=$1
    shift
    "$@" train --base "$base" --data "$chats" --out "$out/$name" --overwrite \
        --max-steps "$steps" --batch-size $((8 * gpus)) --max-length 1024 --dropout 0
}

train one python -m taia
if [ "$gpus" -gt 1 ]; then
    for config in ddp fsdp2; do
        train "$config" accelerate launch --config_file "$configs/$config.yaml" \
            --num_processes "$gpus" -m taia
    done
fi

python - "$out" <<'PYTHON'
import json, statistics, sys
from pathlib import Path

for log in sorted(Path(sys.argv[1]).glob("*/log.jsonl")):
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines[len(lines) // 2 :]]
    print(f"{log.parent.name:6} {statistics.median(rates):10.0f} tokens/s  "
          f"last loss {lines[-1]['loss']:.4f}")
PYTHON
