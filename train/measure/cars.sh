#!/usr/bin/env bash
# Measures everything about Stanford Cars.
#
#     train/measure/cars.sh docs/results/cars/gpu CARS_DIR CIFAR10_DIR [WEIGHTS]
#     NETWORK="--architecture resnet18 --width 16" SIZE=64 EPOCHS=12 SEEDS=2 STEPS=8 \
#         train/measure/cars.sh docs/results/cars/cpu CARS_DIR CIFAR10_DIR    # on a CPU
#
# From scratch, and with a body pretrained on CIFAR-10; with WEIGHTS, a file of ImageNet
# weights, the article's own run as well. It can be stopped at any time, for example by
# `timeout 570`: the same command resumes. A finished part is not repeated. Logs are
# beside the results. PYTHON=... chooses the interpreter.
set -uo pipefail
mkdir -p "${1:?the folder for the results}"
out=$(realpath "$1")
cars=$(realpath "${2:?the folder with Stanford Cars}")
cifar=$(realpath "${3:?the folder with CIFAR-10}")
weights=${4:+$(realpath "$4")}
cd "$(dirname "$0")/../.."
. train/measure/part.sh
read -ra network <<<"${NETWORK:-}"
size=${SIZE:-128} epochs=${EPOCHS:-40} frozen=${FROZEN:-5} seeds=${SEEDS:-3}

named() { # named NAME COMMAND [OPTIONS]
  part "$@" --out "$out" --name "$1"
}

train() { # train NAME [OPTIONS]
  named "$1" cars ${network[@]+"${network[@]}"} "${@:2}"
}

for recipe in adam-l2 adamw; do
  train "scratch-$recipe" --epochs "$epochs" --seeds "$seeds" --data-dir "$cars" \
    --size "$size" --recipe "$recipe"
done

# CIFAR-10 as a folder per class; it is read at 64 pixels, since the network divides by 32.
if [ ! -e "$out/cifar10-images/done" ]; then
  "$python" - "$cifar" "$out/cifar10-images" <<'EOF' || exit 1
import sys
from pathlib import Path
from PIL import Image
from train.data.cifar10 import read_cifar10

for split, images in zip(("train", "test"), read_cifar10(sys.argv[1])):
    for label in range(10):
        (Path(sys.argv[2]) / split / str(label)).mkdir(parents=True, exist_ok=True)
    for i, (x, label) in enumerate(zip(*images)):
        path = Path(sys.argv[2]) / split / str(label) / f"{i:05}.png"
        Image.fromarray(x).save(path, compress_level=1)
(Path(sys.argv[2]) / "done").touch()
EOF
fi
train cifar10-body --data-dir "$out/cifar10-images" --valid-folder test --size 64 \
  --epochs "${CIFAR10_EPOCHS:-20}" --recipe adamw
body=$out/cifar10-body/model-0.safetensors
for recipe in adam-l2 adamw; do
  train "cifar10-body-$recipe" --data-dir "$cars" --size "$size" \
    --weights "$body" --recipe "$recipe" --frozen-epochs "$frozen" \
    --epochs $((epochs - frozen)) --seeds "$seeds"
done

# Does the device wait for its images? An interrupted benchmark starts again.
named bench bench images ${network[@]+"${network[@]}"} --data-dir "$cars" \
  --size "$size" --steps "${STEPS:-100}" --overwrite
if [ -n "$weights" ]; then
  named bench-224 bench images --steps "${STEPS:-100}" --overwrite
  for recipe in adam-l2 adamw; do
    named "$recipe" cars --data-dir "$cars" --weights "$weights" --recipe "$recipe" \
      --seeds "$seeds"
  done
fi
exit $failed
