#!/bin/sh
# Your own data: look at the plan, look for the learning rate, fine-tune, label new sentences.
# In the repository's folder, after `pip install -r requirements.txt`:
#   sh recipes/own-data.sh my-train.txt my-dev.txt sentences.txt
# The first two files are tables (CSV, TSV, JSON lines, Parquet) or have one `label ||| sentence` a line, the third has
# one sentence a line; docs/data.md says more. Without a file for dev, leave --dev out below: a tenth is held out.
# Windows PowerShell: type the commands below one after the other, each in one line, with your files in the place of
# "$train", "$dev", "$sentences" and "$@".
#
# The result depends on your files. On 400 and 60 sentences of movies, drawn with
#   shuf -n 400 --random-source=data/movies-train.txt data/movies-train.txt > my-train.txt
#   shuf -n 60 --random-source=data/movies-dev.txt data/movies-dev.txt > my-dev.txt
# with smollm2-135m, on one thread of an AMD EPYC (AVX512_BF16, in bfloat16), other work running beside it, all four
# commands took 2.9 minutes together and gave:
#   lr range :: 2.7e-04 to 2.7e-03, steepest 2.7e-03
#   dev acc :: 0.433    (majority 0.233, tf-idf + logistic regression 0.333)
set -eu
if [ $# -ne 3 ]; then
    echo "usage: sh recipes/own-data.sh TRAIN DEV SENTENCES" >&2
    exit 2
fi
train=$1 dev=$2 sentences=$3
set -- --n_layers 4 --attention bidirectional --pooling mean --batch_size 32

python run_llama.py --option finetune --plan --train "$train" --dev "$dev" "$@" --lr 5e-4 --epochs 3 --output_dir runs/own-plan
python run_llama.py --option lr_find --train "$train" --dev "$dev" "$@" --lr_max 1e-1 --output_dir runs/own-lr
# A rate inside the range that lr_find printed goes into --lr here:
python run_llama.py --option finetune --train "$train" --dev "$dev" "$@" --lr 5e-4 --epochs 3 --output_dir runs/own
python run_llama.py --option predict --run runs/own --input "$sentences" > runs/own/labels.tsv
