# What mla.sh and ep.sh have in common: options of both, stages with time limits, and what is written of them.
# Sourced by them. What they are told of folders is meant from where their caller stands, so nobody changes folder.
ROOT=$(realpath "$(dirname "$0")/../..")
NAME=$(basename "$0")
backend=cuda wheels="" quick="" most=100000

wrong() { echo "$NAME: $*" >&2; exit 2; }

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$ROOT/scripts/gpu/$NAME"; }

# option NAME [VALUE]: one of both; with whatever else was given behind it.
option() {
  case $1 in
    --help) usage; exit ;;
    --backend | --wheels | --limit) [[ $# -ge 2 ]] || wrong "$1 needs a value" ;;&
    --backend) backend=$2 ;;
    --wheels) wheels=$2 ;;
    --limit) most=$2 ;;
    *) wrong "what is $1?" ;;
  esac
}

# begin OUT STAGE...: look at what was asked for, all of it before the first stage runs, and make the folder. A typo in
# the last stage would be found half an hour later.
begin() {
  local stage out
  [[ $most =~ ^[1-9][0-9]*$ ]] || wrong "--limit $most: a number of seconds, 1 or more"
  if [[ -n $wheels ]]; then
    compgen -G "$wheels/*.whl" >/dev/null || wrong "--wheels $wheels: a folder with wheels"
    wheels=$(realpath "$wheels")
  fi
  [[ $# -ge 1 ]] || { usage >&2; exit 2; }
  out=$1; shift
  for stage in "$@"; do
    [[ " ${stages[*]} " == *" $stage "* ]] || wrong "no stage is called $stage; there are: ${stages[*]}"
  done
  [[ $# -eq 0 ]] || stages=("$@")
  mkdir -p "$out" || wrong "$out: no folder to write to"
  OUT=$(realpath "$out")
  PYTHON=${PYTHON:-python3}
  # Stages run elsewhere. Not resolved further: what a link into a virtual environment is called decides what it imports.
  [[ $PYTHON != */* || $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON
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
  for stage in "${stages[@]}"; do "stage_$stage"; done
  exit $failed
}
