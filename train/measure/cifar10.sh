#!/usr/bin/env bash
# Measures everything about CIFAR-10 on a GPU.
#
#     train/measure/cifar10.sh DATA_DIR docs/results/cifar10/gpu
#
# It can be stopped at any time, for example by `timeout 570`: the same command resumes.
# A finished part is not repeated. Logs are beside the results. PYTHON=... chooses the
# interpreter; SEEDS=1 is quicker.
set -uo pipefail
data=$(realpath "${1:?the folder with CIFAR-10}")
mkdir -p "${2:?the folder for the results}"
out=$(realpath "$2")
cd "$(dirname "$0")/../.."
. train/measure/part.sh

named() { # named NAME COMMAND [OPTIONS]
  part "$@" --out "$out" --name "$1"
}

# The most important first. An interrupted benchmark starts again.
named fast cifar10_fast --data-dir "$data" --seeds "${SEEDS:-10}"
named bench-wrn22 bench cifar10 --overwrite
named adamw-18-tta cifar10 --data-dir "$data" --recipe adamw-18-tta --seeds "${SEEDS:-5}"
named adamw-30 cifar10 --data-dir "$data" --recipe adamw-30 --seeds "${SEEDS:-5}"
for recipe in adam-l2-30 sgd-30 amsgrad-30 amsgrad-l2-30 adamw-30-wd0.3; do
  named "$recipe" cifar10 --data-dir "$data" --recipe "$recipe" --seeds "${SEEDS:-3}"
done
named fast-200 cifar10_fast --data-dir "$data" --seeds "${SEEDS:-200}" --first-seed 1000
exit $failed
