#!/usr/bin/env bash
# Measures everything about language models.
#
#     train/measure/language_model.sh docs/results/language_model/cpu             # a CPU
#     train/measure/language_model.sh docs/results/wikitext2/gpu DATA_DIR         # a GPU
#
# Without DATA_DIR: Python's documentation, small networks, three seeds. With it:
# WikiText-2 by the article's recipes, 90 epochs. It can be stopped at any time, for
# example by `timeout 570`: the same command resumes. Logs are beside the results.
# PYTHON=... chooses the interpreter; SEEDS=1 is quicker.
set -uo pipefail
mkdir -p "${1:?the folder for the results}"
out=$(realpath "$1")
options=()
if [ $# -gt 1 ]; then
  options=(--data-dir "$(realpath "$2")")
fi
cd "$(dirname "$0")/../.."
. train/measure/part.sh

run() { # run MODEL RECIPE SEEDS
  part "$1-$2" language_model "$1" --recipe "$2" --seeds "$3" --out "$out" \
    --name "$1-$2" ${options[@]+"${options[@]}"}
}

cache() { # cache MODEL RECIPE
  part "cache-$1-$2" tune_cache "$out/$1-$2" ${options[@]+"${options[@]}"}
}

# The most important first.
if [ $# -gt 1 ]; then
  for model in lstm qrnn; do
    run $model adam-l2 "${SEEDS:-1}"
    part "bench-$model" bench language_model --model $model --overwrite \
      --out "$out" --name "bench-$model"
  done
  part bench-cudnn bench language_model --cudnn --overwrite --out "$out" \
    --name bench-cudnn
  part bench-bfloat16 bench language_model --dtype bfloat16 --overwrite \
    --out "$out" --name bench-bfloat16
  for model in lstm qrnn; do
    cache $model adam-l2
    for recipe in adamw amsgrad-l2 amsgradw; do
      run $model $recipe "${SEEDS:-1}"
    done
  done
else
  for recipe in adam-l2 adamw amsgrad-l2 salesforce amsgradw; do
    for model in lstm qrnn; do
      run $model $recipe "${SEEDS:-3}"
    done
  done
  for model in lstm qrnn; do
    cache $model adam-l2
  done
  part lstm-adamw-bfloat16 language_model lstm --recipe adamw --dtype bfloat16 \
    --seeds "${SEEDS:-3}" --out "$out" --name lstm-adamw-bfloat16
fi
exit $failed
