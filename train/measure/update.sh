#!/usr/bin/env bash
# Measures everything about the cost of an update.
#
#     train/measure/update.sh docs/results/update/gpu
#     TRANSFORMER=0.15 train/measure/update.sh docs/results/update/cpu    # in 24 GB of memory
#
# Run nothing else meanwhile. It can be stopped at any time, for example by `timeout 570`:
# the same command resumes, and a finished part is not repeated. Logs are beside the
# results. PYTHON=... chooses the interpreter.
set -uo pipefail
mkdir -p "${1:?the folder for the results}"
out=$(realpath "$1")
cd "$(dirname "$0")/../.."
. train/measure/part.sh

update() { # update NAME [OPTIONS]
  part "$1" bench update --out "$out" --name "$1" --overwrite "${@:2}"
}

for step in adamw full; do
  update "resnet50-$step" --leaves resnet50 --step "$step"
  update "large-$step" --leaves large --step "$step" --calls 2
done
for leaves in resnet50 large; do
  update "$leaves-bfloat16" --leaves "$leaves" --dtype bfloat16 --calls 2
done
for dtype in float32 bfloat16; do
  update "transformer-$dtype" --leaves transformer --scale "${TRANSFORMER:-1}" \
    --dtype "$dtype" --calls 2 --turns 5
done
update tiny --leaves tiny
update tiny-bfloat16 --leaves tiny --dtype bfloat16
part packing bench packing --out "$out" --name packing --overwrite
part accumulation bench accumulation --out "$out" --name accumulation --overwrite
exit $failed
