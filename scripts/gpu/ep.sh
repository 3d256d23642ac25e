#!/usr/bin/env bash
# Expert parallelism on a machine with several devices: whether it conforms, how fast it is, whether rows keep their order.
#
#   scripts/gpu/ep.sh [--backend NAME] [--ranks N] [--wheels DIR] [--limit SECONDS] [--quick] OUT [STAGE...]
#
# Stages, all of them where none is named: install doctor link conform groups bench graph stress lose. Each has a time limit of
# its own, under ten minutes and at most --limit, and writes OUT/STAGE*.log; one that fails does not stop the next.
# OUT/verdict.txt has a line for each.
# N ranks, one a device (default: all devices there are). The suite has groups of one to four in "conform", of N in "groups".
# A stress run that the limit cut off goes on where it was when its stage is asked for again, until 10,000 rounds are done.
# Wheels are made with: pip wheel --no-deps --no-build-isolation -w DIR ./ ./backends/cuda ./conformance
set -uo pipefail
. "$(dirname "$0")/stages.sh"

ranks=""
stages=(install doctor link conform groups bench graph stress lose)
while [[ ${1:-} == --* ]]; do
  case $1 in
    --quick) quick=--quick; shift; continue ;;
    --ranks) [[ $# -ge 2 ]] || wrong "$1 needs a value"; ranks=$2 ;;
    *) option "$@" ;;
  esac
  shift 2
done
begin "$@"

# NVLink multicast stays off: a program that uses it can take the devices of a whole machine out of service.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
if [[ -z $ranks ]]; then
  # Of a machine with fewer than two: processes that share what there is.
  ranks=$("$PYTHON" -c 'import torch; print(max(2, torch.accelerator.device_count()))') || wrong "$PYTHON has no torch"
fi
[[ $ranks =~ ^[0-9]+$ && $ranks -ge 2 && $ranks -le 16 ]] || wrong "--ranks $ranks: 2 to 16"

stage_link() {
  if [[ $backend == cpu ]]; then say "link: not applicable to the cpu"; return; fi
  limited 60 link nvidia-smi topo -m
}

# Kernels are compiled on first use, which the suite's limits do not allow for.
conform() {
  local name=$1
  shift
  limited 570 "$name" "$PYTHON" -m hal conform --backend "$backend" --only E1 --only E2 $quick --patience 8 --out "$OUT/$name" "$@"
}

stage_conform() { conform conform; }

stage_groups() { conform "groups-$ranks" --ranks "$ranks"; }

stage_bench() {
  local seconds=20 budget=$((most < 570 ? most : 570))
  if [[ $backend == cpu || -n $quick ]]; then seconds=1; fi
  # What was measured is written at the end, which is to be before its limit.
  limited 570 "bench-$ranks" "$PYTHON" -m hal bench ep --backend "$backend" --ranks "$ranks" --published \
    --seconds $seconds --budget $((budget * 2 / 3)) --json "$OUT/bench-$ranks.json"
}

stage_graph() {
  if [[ $backend == cpu ]]; then say "graph: not applicable to the cpu"; return; fi
  limited 300 "graph-$ranks" "$PYTHON" "$ROOT/scripts/gpu/ep_graph.py" --ranks "$ranks"
}

stage_stress() {
  local rounds=10000 seconds=$((most < 570 ? most : 570))
  [[ -z $quick ]] || rounds=100
  # It ends by itself before its limit, for what it has done to count.
  limited 570 "stress-$ranks" "$PYTHON" "$ROOT/scripts/gpu/ep_stress.py" --ranks "$ranks" --rounds $rounds \
    --seconds $((seconds > 120 ? seconds - 60 : seconds / 2)) --progress "$OUT/stress-$ranks.json"
}

stage_lose() {
  local how
  for how in kill stop; do
    limited 200 "lose-$how-$ranks" "$PYTHON" "$ROOT/scripts/gpu/ep_stress.py" --ranks "$ranks" --lose $how
  done
}

all
