#!/bin/sh
# Your own data: the best classifier that a search of an hour on two cores can find, and its labels for new sentences.
# In the repository's folder, after `pip install -r requirements.txt`:
#   sh recipes/tune-own-data.sh my-train.txt sentences.txt [my-dev.txt [my-test.txt]]
# The files have one `label ||| sentence` a line, or are tables (docs/data.md); sentences.txt has one sentence a line.
# Without a file for dev, a tenth of the first file is held out. `^C` or a crash loses nothing: type it again.
# MINUTES=20 sh recipes/tune-own-data.sh ...: another time than an hour.
# Windows PowerShell: type the commands below one after the other, each in one line, with your files in the place of "$@"
# and "$sentences", and 1800 in that of the calculation.
#
# Half of the time is for trials: three epochs, or 264 steps of 32 sentences where that is less, and an evaluation after
# each quarter of an epoch, where those that are behind the others end. The rest is for the best two again, with two new
# seeds each. With more cores or a GPU take more layers and steps; the same search in a second terminal helps too
# (docs/search.md).
#
# Result with MINUTES=20 on the data set movies (8,456 sentences, with its dev and test), smollm2-135m, two threads of an
# Intel Xeon (AVX512_BF16, in bfloat16) with so much other work beside it that two trials were all the time there was for;
# it took 24 minutes:
#   trials :: 2: 2 complete, 0 pruned, 0 failed
#   winner :: trial 0: dev_acc 0.654 +- 0.007, n_layers 8, lr 0.000913, hidden_dropout_prob 0.1, layerwise_lr_decay 0.87
#   dev baselines :: majority 0.364, tf-idf + logistic regression 0.560
#   test acc :: 0.623    (majority 0.326, tf-idf + logistic regression 0.555)
# A whole hour on a quiet machine was not tried yet.
set -eu
if [ $# -lt 2 ]; then
    echo "usage: sh recipes/tune-own-data.sh TRAIN SENTENCES [DEV [TEST]]" >&2
    exit 2
fi
train=$1 sentences=$2 dev=${3-} test=${4-}
set -- --train "$train"
[ -z "$dev" ] || set -- "$@" --dev "$dev"
[ -z "$test" ] || set -- "$@" --test "$test"

python run_llama.py --option search "$@" --epochs 3 --max_steps 264 --eval_every 0.25 \
    --space "n_layers=4|8 lr=log:3e-4..1.5e-3 hidden_dropout_prob=0.1|0.3 layerwise_lr_decay=0.8..1" \
    --trials 30 --timeout $((${MINUTES:-60} * 30)) --finalists 2 --final_seeds 2 --output_dir runs/tuned
python run_llama.py --option report --run runs/tuned
winner=$(python -c "import json; print(json.load(open('runs/tuned/search.json', encoding='utf-8'))['winner_run'])")
python run_llama.py --option predict --run "$winner" --input "$sentences" > runs/tuned/labels.tsv
