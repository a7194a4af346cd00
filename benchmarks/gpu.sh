#!/usr/bin/env bash
# Everything that only a GPU can show, in slices of eight minutes: builds the kernels for it, runs the tests
# that wait for one, looks for races and accesses out of bounds, and measures. What was done is not done
# again, so a run that was stopped goes on.
#
#     bash benchmarks/gpu.sh [FOLDER]
#
# Needs nvcc, g++ and a Python with torch for CUDA and the packages of pyproject.toml's "test". FOLDER
# (by default gpu) gets a log of each step and cuda.json, the record of benchmarks.cuda.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu}
mkdir -p "$out"
failed=0
limit=${LIMIT_SECONDS:-470}

within() { # seconds: prints how many of them are left of this call; fails, and says so, where none are
  local left=$((limit - SECONDS))
  if [ $left -lt 10 ]; then
    echo "== no time left for what follows: run again to go on" >&2
    return 1
  fi
  echo $((left < $1 ? left : $1))
}

commit=$(git rev-parse --short HEAD 2>/dev/null || echo none)
step() { # name, seconds, command: its log is in FOLDER; what this commit passed is left out
  local name=$1-$commit seconds=$2 code
  shift 2
  if [ -e "$out/$name.passed" ]; then
    echo "== $name: passed before"
    return
  fi
  seconds=$(within "$seconds") || return
  printf '== %s: ' "$name"
  local begin=$SECONDS
  if timeout "$seconds" "$@" >"$out/$name.log" 2>&1; then
    touch "$out/$name.passed"
    echo "passed in $((SECONDS - begin)) s"
  else
    code=$?
    failed=1
    echo "FAILED ($code; 124: not in time) after $((SECONDS - begin)) s, see $out/$name.log"
    tail -n 15 "$out/$name.log"
  fi
}

command -v nvidia-smi >/dev/null || { echo "there is no NVIDIA driver here (nvidia-smi)"; exit 2; }
export SPFMT_CUDA=1 SPFMT_NEEDS_CUDA=1 # without kernels or a device, tests fail instead of being skipped
SPFMT_CUDA_ARCHS=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
export SPFMT_CUDA_ARCHS

step build 240 python3 setup.py -q build_ext --inplace --parallel "$(nproc)"
step tests 150 python3 -m pytest -q -m cuda -p no:cacheprovider tests
# Each tool runs a part, both passes: they slow kernels down a hundredfold. Without torch's cache every
# tensor is an allocation of its own, with an end that can be found.
for tool in memcheck racecheck synccheck; do
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step $tool 90 compute-sanitizer --tool $tool --error-exitcode 9 \
    python3 -m pytest -q -x -m cuda -p no:cacheprovider tests/test_torch_cuda.py tests/test_torch_cuda_conv.py \
    -k "sanitized or wgmma"
done
measure() { # seconds, record
  local seconds
  seconds=$(within "$1") || return
  echo "== benchmark, $2"
  python3 -m benchmarks.cuda --json "$out/$2" --seconds $((seconds - 5)) || failed=1
}

measure 240 cuda.json
if [ "$SPFMT_CUDA_ARCHS" = 90 ]; then
  SPFMT_CUDA_WGMMA=1 measure 60 cuda-wgmma.json
fi
exit $failed
