// What the machine can do at best at one ISA level: the ceilings that kernels are held against.
// Like tile functions, probes are serial and hold no threads, no allocation and no checks.
#pragma once

#include <cstdint>

#include "spfmt.h"

namespace spfmt {

struct Probe {
  // Floating-point operations in one step of fma; elements that load takes at a time.
  int64_t flops_per_step, load_step;
  // Independent chains of multiply-adds in registers. The result only keeps them from being
  // dropped.
  float (*fma)(int64_t steps);
  // The sum of n elements, `rounds` times over; n is a multiple of load_step.
  float (*load)(const float* data, int64_t n, int64_t rounds);
};

const Probe& scalar_probe();
const Probe& avx2_probe();
const Probe& avx512_probe();

inline const Probe& probe(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return avx512_probe();
    case Isa::avx2:
      return avx2_probe();
    default:
      return scalar_probe();
  }
}

}  // namespace spfmt
