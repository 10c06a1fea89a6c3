#!/usr/bin/env bash
# Everything about CIFAR-10 that is measured on a GPU, for the table in the README.
#
#     train/measure_cifar10.sh DATA_DIR results/cifar10/gpu
#
# Stop it whenever you like, or let `timeout 570` do so: the same command goes on where
# it was, since every part of it does. A part that is finished is not repeated. Logs are
# beside the results. PYTHON=... chooses the interpreter, SEEDS=1 a quicker look.
set -uo pipefail
data=$(realpath "${1:?the folder with CIFAR-10}")
mkdir -p "${2:?the folder for the results}"
out=$(realpath "$2")
cd "$(dirname "$0")/.."
trap 'trap - TERM INT; kill 0' TERM INT # also what is running
python=${PYTHON:-python}
failed=0

part() { # part NAME MODULE [OPTIONS]
  local name=$1 module=$2
  shift 2
  if [ "$(cat "$out/$name.done" 2>/dev/null)" = "$*" ]; then
    echo "$name: done already"
    return
  fi
  echo "== $name: python -m train.$module $*"
  if PYTHONUNBUFFERED=1 "$python" -m "train.$module" "$@" --out "$out" --name "$name" \
    2>&1 | tee -a "$out/$name.log"; then
    echo "$*" >"$out/$name.done"
  else
    failed=1 # the others are worth having all the same
  fi
}

# The most wanted first. A benchmark that was interrupted begins again.
part fast cifar10_fast --data-dir "$data" --seeds "${SEEDS:-10}"
part bench-wrn22 bench cifar10 --overwrite
part adamw-18-tta cifar10 --data-dir "$data" --recipe adamw-18-tta --seeds "${SEEDS:-5}"
part adamw-30 cifar10 --data-dir "$data" --recipe adamw-30 --seeds "${SEEDS:-5}"
for recipe in adam-l2-30 sgd-30 amsgrad-30 amsgrad-l2-30 adamw-30-wd0.3; do
  part "$recipe" cifar10 --data-dir "$data" --recipe "$recipe" --seeds "${SEEDS:-3}"
done
part fast-200 cifar10_fast --data-dir "$data" --seeds "${SEEDS:-200}" --first-seed 1000
exit $failed
