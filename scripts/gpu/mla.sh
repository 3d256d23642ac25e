#!/usr/bin/env bash
# MLA decode on a machine with a device: what is there, whether it conforms, whether it reads out of bounds, how fast it is.
#
#   scripts/gpu/mla.sh [--backend NAME] [--wheels DIR] [--tiers "A B"] [--limit SECONDS] [--quick] OUT [STAGE...]
#
# Stages, all of them where none is named: install doctor conform graph overhead sanitize bench. Each has a time limit of its own,
# at most --limit, and writes OUT/STAGE*.log; one that fails does not stop the next. OUT/verdict.txt has a line for each.
# Wheels are made with: pip wheel --no-deps --no-build-isolation -w DIR ./ ./backends/cuda ./conformance
set -uo pipefail
. "$(dirname "$0")/stages.sh"

tiers=""
stages=(install doctor conform graph overhead sanitize bench)
while [[ ${1:-} == --* ]]; do
  case $1 in
    --quick) quick=--quick; shift; continue ;;
    --tiers) [[ $# -ge 2 ]] || wrong "$1 needs a value"; tiers=$2 ;;
    *) option "$@" ;;
  esac
  shift 2
done
begin "$@"

# What to judge: the tiers as users get them (auto: the best that takes a call), then the one that takes every call alone.
usable_tiers() {
  if [[ -n $tiers ]]; then echo "$tiers"; elif [[ $backend == cuda ]]; then echo "auto triton portable"; else echo auto; fi
}

stage_conform() {
  # All tiers at once: most of the time goes into the reference on the host and into compilers. Kernels are compiled on
  # first use, which the suite's limits do not allow for.
  local tier running=()
  for tier in $(usable_tiers); do
    (
      [[ $tier == auto ]] || export HAL_CUDA_TIER=$tier
      limited 1500 "conform-$tier" "$PYTHON" -m hal conform --backend "$backend" $quick --patience 8 --out "$OUT/conform-$tier"
    ) &
    running+=($!)
  done
  for tier in "${running[@]}"; do wait "$tier" || failed=1; done
}

stage_graph() {
  local tier
  if [[ $backend == cpu ]]; then say "graph: not applicable to the cpu"; return; fi
  for tier in $(usable_tiers); do
    [[ $tier == auto ]] || export HAL_CUDA_TIER=$tier
    limited 200 "graph-$tier" "$PYTHON" "$ROOT/scripts/gpu/graph.py"
    unset HAL_CUDA_TIER
  done
}

stage_overhead() {
  if [[ $backend == cpu ]]; then say "overhead: not applicable to the cpu, see hal bench overhead"; return; fi
  limited 100 overhead "$PYTHON" "$ROOT/scripts/gpu/overhead.py"
}

stage_sanitize() {
  local tier tool=${SANITIZER:-compute-sanitizer}
  if [[ $backend == cpu ]]; then say "sanitize: not applicable to the cpu"; return; fi
  if ! command -v "$tool" >/dev/null; then say "sanitize: FAIL, $tool is not installed"; failed=1; return; fi
  for tier in $(usable_tiers); do
    [[ $tier == auto ]] || export HAL_CUDA_TIER=$tier
    limited 420 "sanitize-$tier" "$tool" --tool memcheck --error-exitcode 9 "$PYTHON" "$ROOT/scripts/gpu/small_set.py"
    limited 420 "racecheck-$tier" "$tool" --tool racecheck --num-cuda-barriers 64 --error-exitcode 9 "$PYTHON" "$ROOT/scripts/gpu/small_set.py" --few
    unset HAL_CUDA_TIER
  done
}

stage_bench() {
  local tier h s q cases=() lengths="4096 8192 16384 32768" heads="16 64 128" queries="1 2" b=128 rounds=15
  if [[ $backend == cpu || -n $quick ]]; then lengths=256 heads="16 128" b=2 rounds=3; fi
  for s in $lengths; do for h in $heads; do for q in $queries; do
    if [[ $q == 1 ]]; then cases+=(--case "b${b}_h${h}_s${s}"); else cases+=(--case "b${b}_h${h}_s${s}_q${q}_causal"); fi
  done; done; done
  for tier in $(usable_tiers); do
    [[ $tier == auto ]] || export HAL_CUDA_TIER=$tier
    limited 1200 "bench-$tier" "$PYTHON" -m hal bench mla --backend "$backend" --peer flash_mla "${cases[@]}" \
      --rounds $rounds --json "$OUT/bench-$tier.json" --record "$OUT/bench-$tier-samples.json"
    unset HAL_CUDA_TIER
  done
}

all
