# For measure_*.sh, which go to the root of the repository and set `out`, the folder of
# the results, before they source this. `failed` is 1 once a part has failed.
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
  if PYTHONUNBUFFERED=1 "$python" -m "train.$module" "$@" 2>&1 |
    tee -a "$out/$name.log"; then
    echo "$*" >"$out/$name.done"
  else
    failed=1 # the others are worth having all the same
  fi
}
