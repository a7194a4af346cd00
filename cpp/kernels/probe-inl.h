// Ceilings of one ISA level, for one SIMD interface. Included once per level.
#pragma once

#include "../core/probe.h"

namespace spfmt {
namespace {

template <class S>
constexpr int64_t kVectorLanes = sizeof(typename S::V) / sizeof(typename S::T);

// kChains vectors are twelve registers: more than any core's latency (4 to 5 cycles) times
// throughput (2 per cycle) asks for, and with the constant few enough for sixteen registers.
template <class S, int kChains>
float probe_fma(int64_t steps) noexcept {
  // x / 2 + 1/2 has the fixed point 1: chains stay normal numbers however long they run.
  const auto half = S::set1(0.5f);
  typename S::V chain[kChains];
  for (int c = 0; c < kChains; ++c) chain[c] = S::set1(static_cast<float>(c));
  for (int64_t i = 0; i < steps; ++i) {
    for (int c = 0; c < kChains; ++c) chain[c] = S::fma(chain[c], half, half);
  }
  for (int c = 1; c < kChains; ++c) chain[0] = S::add(chain[0], chain[c]);
  return S::sum(chain[0]);
}

template <class S, int kChains>
float probe_load(const float* data, int64_t n, int64_t rounds) noexcept {
  typename S::V chain[kChains];
  for (int c = 0; c < kChains; ++c) chain[c] = S::zero();
  for (int64_t round = 0; round < rounds; ++round) {
    for (int64_t i = 0; i < n; i += kChains * kVectorLanes<S>) {
      for (int c = 0; c < kChains; ++c) {
        chain[c] = S::add(chain[c], S::load(data + i + c * kVectorLanes<S>));
      }
    }
  }
  for (int c = 1; c < kChains; ++c) chain[0] = S::add(chain[0], chain[c]);
  return S::sum(chain[0]);
}

// Chains are counted in vectors, which are one register or (AVX2) two.
template <class S, int kFmaChains, int kLoadChains>
const Probe& probe_of() noexcept {
  static constexpr Probe kProbe = {2 * kFmaChains * kVectorLanes<S>, kLoadChains * kVectorLanes<S>,
                                   probe_fma<S, kFmaChains>, probe_load<S, kLoadChains>};
  return kProbe;
}

}  // namespace
}  // namespace spfmt
