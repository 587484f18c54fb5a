#!/bin/sh
# The README's first command: movies, the first 4 layers of SmolLM2-135M, one epoch.
# In a fresh virtual environment: sh recipes/first-run.sh
# Windows PowerShell: type the two commands below, one after the other.
#
# Result, on two cores of an AMD EPYC (AVX2, no bfloat16 units: float32), torch 2.13.0:
#   epoch 0: train loss :: 1.083, train acc :: 0.750, dev acc :: 0.652, lr :: 2.00e-06
#   dev acc :: 0.652     (majority 0.364, tf-idf + logistic regression 0.560)
#   test acc :: 0.617    (majority 0.326, tf-idf + logistic regression 0.555)
# in 5.4 minutes, 4.3 of them training. With --n_layers 5: test acc 0.629 in 6.4 minutes, other work running beside it.
# (Timed before most of what docs/measurements.md lists under "What makes a run fast" was there.)
set -eu
cd "$(dirname "$0")/.."

pip install -r requirements.txt
python run_llama.py --option finetune --n_layers 4 --epochs 1
