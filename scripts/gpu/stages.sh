# What mla.sh and ep.sh have in common: options of both, stages with time limits, and what is written of them.
# Sourced by them, in the root of the checkout.
ROOT=$PWD
NAME=$(basename "$0")
backend=cuda wheels="" quick="" most=100000

wrong() { echo "$NAME: $*" >&2; exit 2; }

# option NAME VALUE: whether it is one of both.
option() {
  case $1 in
    --backend) backend=$2 ;;
    --wheels) wheels=$2 ;;
    --limit) most=$2 ;;
    *) wrong "what is $1?" ;;
  esac
}

# begin OUT STAGE...: look at the options and make the folder.
begin() {
  [[ $most =~ ^[0-9]+$ ]] || wrong "--limit $most: a number of seconds"
  if [[ -n $wheels ]]; then
    compgen -G "$wheels/*.whl" >/dev/null || wrong "--wheels $wheels: a folder with wheels"
    wheels=$(realpath "$wheels")
  fi
  [[ $# -ge 1 ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$ROOT/scripts/gpu/$NAME" >&2; exit 2; }
  mkdir -p "$1"
  OUT=$(realpath "$1"); shift
  [[ $# -eq 0 ]] || stages=("$@")
  PYTHON=${PYTHON:-python3}
  # Stages run elsewhere. Not resolved further: what a link into a virtual environment is called decides what it imports.
  [[ $PYTHON != */* || $PYTHON == /* ]] || PYTHON=$ROOT/$PYTHON
  export HAL_BACKEND=$backend PYTHONUNBUFFERED=1 COLUMNS=120
  failed=0
}

say() { echo "$*" | tee -a "$OUT/verdict.txt"; }

# limited SECONDS NAME COMMAND...: run, keep the output, print one line.
limited() {
  local seconds=$1 name=$2 start=$SECONDS code=0 verdict=PASS
  shift 2
  [[ $seconds -le $most ]] || seconds=$most
  # Not from the checkout: what is tested is what is installed.
  (cd "$OUT" && timeout --kill-after=10 "$seconds" "$@") >"$OUT/$name.log" 2>&1 || code=$?
  if [[ $code == 124 || $code == 137 ]]; then verdict="TIMEOUT after ${seconds} s"; elif [[ $code != 0 ]]; then verdict="FAIL, exit code $code"; fi
  [[ $code == 0 ]] || failed=1
  say "$name: $verdict ($((SECONDS - start)) s) $(grep -v '^[[:space:]]*$' "$OUT/$name.log" | tail -n 1 | cut -c1-160)"
  return "$code"
}

stage_install() {
  if [[ -z $wheels ]]; then say "install: not asked for (no --wheels)"; return; fi
  # Whatever was installed before is not what is to be judged.
  limited 300 install "$PYTHON" -m pip install --no-index --no-deps --force-reinstall "$wheels"/*.whl || exit 1
}

stage_doctor() { limited 300 doctor "$PYTHON" -m hal doctor "$backend"; }

# all: the stages that were asked for, one after the other. Runs of single stages add up to one list.
all() {
  local stage
  say "== $(date -u +'%F %H:%M UTC') $backend: ${stages[*]}"
  for stage in "${stages[@]}"; do
    if declare -F "stage_$stage" >/dev/null; then "stage_$stage"; else say "$stage: FAIL, no such stage"; failed=1; fi
  done
  exit $failed
}
