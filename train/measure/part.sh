# Sourced by the scripts beside it, after they have changed to the root of the repository
# and set `out`, the folder of the results. `failed` is 1 once a part has failed.
trap 'trap - TERM INT; kill 0' TERM INT # stops the running part as well
python=${PYTHON:-python}
failed=0

part() { # part NAME COMMAND [OPTIONS]
  local name=$1 command=$2
  shift 2
  if [ "$(cat "$out/$name.done" 2>/dev/null)" = "$*" ]; then
    echo "$name: already done"
    return
  fi
  echo "== $name: python -m train.$command $*"
  if PYTHONUNBUFFERED=1 "$python" -m "train.$command" "$@" 2>&1 |
    tee -a "$out/$name.log"; then
    echo "$*" >"$out/$name.done"
  else
    failed=1 # go on with the others
  fi
}
