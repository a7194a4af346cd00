#!/usr/bin/env bash
# Tests with emulated AVX-512 kernels, on any CPU with AVX2: tests/emulated.sh [pytest arguments].
# Needs what a build needs, pytest, and SIMDe's headers; ccache (CC, CXX) makes repeats quick.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! echo '#include <simde/x86/avx512.h>' | ${CXX:-g++} -E -x c++ - >/dev/null 2>&1; then
  echo "SIMDe's headers are missing: install them (Debian, Ubuntu: libsimde-dev)" >&2
  exit 1
fi
log=build/emulated.log
mkdir -p build
if ! SPFMT_EMULATE=avx512 python setup.py -q build --build-lib build/emulated \
  --build-temp build/emulated-objects >"$log" 2>&1; then
  tail -n 30 "$log" >&2
  exit 1
fi
kernel_tests=(tests/test_{kernels,convolution,ops,activations,calls,dispatch}.py)
PYTHONPATH=build/emulated env -u CC -u CXX pytest -q -n 2 -p no:cacheprovider "${@:-${kernel_tests[@]}}"
