#!/bin/sh
# SST-5 with SmolLM2-135M: all 30 layers, three epochs.
# After `pip install -r requirements.txt`: sh recipes/sst5-smollm2.sh
# Windows PowerShell: type the commands below one after the other; a command that ends with \ goes on in the next line,
# so type it as one.
#
# Result of this exact command: not run yet.
set -eu
cd "$(dirname "$0")/.."

python data/prepare.py sst smollm2-135m
python run_llama.py --option finetune --dataset sst --pretrained_model_path smollm2-135m \
    --lr 2e-5 --batch_size 32 --epochs 3 --output_dir runs/sst5-smollm2
