#!/bin/sh
# SST-5 with stories42M: all layers, five epochs.
# After `pip install -r requirements.txt`: sh recipes/sst5-stories42m.sh
# Windows PowerShell: type the commands below one after the other; a command that ends with \ goes on in the next line,
# so type it as one.
#
# Result of this exact command: not run yet.
set -eu
cd "$(dirname "$0")/.."

python data/prepare.py sst stories42M
python run_llama.py --option finetune --dataset sst --pretrained_model_path stories42M \
    --lr 2e-5 --batch_size 80 --epochs 5 --output_dir runs/sst5-stories42m
