// What device.h names, for compilers that know no CUDA.
#pragma once

#include "launch.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__

#define threadIdx (::emulation::block->current->index)
#define blockIdx (::emulation::block->index)
#define blockDim (::emulation::block->threads)
#define gridDim (::emulation::block->grid)
#define __syncthreads() ::emulation::barrier()
#define __syncwarp() \
  ::emulation::meet(~0u, nullptr, ::emulation::Where::current(), [](void**, uint32_t) {})

namespace emulation {

template <class To, class From>
To same_bits(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float float_of_bf16(uint16_t bits) { return same_bits<float>(uint32_t{bits} << 16); }

inline float float_of_half(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, rest = bits & 0x3ffu;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(rest) * 0x1p-24f;
  const uint32_t wide = exponent == 31 ? 255u : exponent + 112u;
  return same_bits<float>(sign | wide << 23 | rest << 13);
}

// To nearest, ties to even.
inline uint16_t half_of_float(float f) {
  const uint32_t u = same_bits<uint32_t>(f);
  const auto sign = static_cast<uint16_t>(u >> 16 & 0x8000u);
  const float size = same_bits<float>(u & 0x7fffffffu);
  if (size != size) return sign | 0x7fffu;
  if (size >= 65520.0f) return sign | 0x7c00u;
  if (size < 0x1p-14f) {  // a sum that has no bits below 2^-24 rounds for us
    return sign | static_cast<uint16_t>(same_bits<uint32_t>(size + 0.5f) & 0x7ffu);
  }
  const uint32_t bits = u & 0x7fffffffu, rounded = bits + 0xfffu + (bits >> 13 & 1u);
  return sign | static_cast<uint16_t>((rounded >> 13) - (112u << 10));
}

// Ten bits of mantissa, to nearest, ties away from zero.
inline uint32_t tf32_of_float(float f) {
  const uint32_t u = same_bits<uint32_t>(f);
  return f != f ? 0x7fffffffu : (u + 0x1000u) & ~0x1fffu;
}

template <float (*to_float)(uint16_t)>
struct Unpack16 {
  void operator()(const uint32_t* from_a, const uint32_t* from_b, int g, int t, float (&a)[16][16],
                  float (&b)[16][8]) const {
    for (int h = 0; h < 2; ++h) {  // the low and the high half of every register
      const auto number = [&](uint32_t r) { return to_float(static_cast<uint16_t>(r >> 16 * h)); };
      for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][2 * t + h + 8 * (i / 2)] = number(from_a[i]);
      for (int i = 0; i < 2; ++i) b[2 * t + h + 8 * i][g] = number(from_b[i]);
    }
  }
};

// The hardware ignores the low bits of what was not rounded to tf32.
struct UnpackTf32 {
  void operator()(const uint32_t* from_a, const uint32_t* from_b, int g, int t, float (&a)[16][8],
                  float (&b)[8][8]) const {
    const auto number = [](uint32_t r) { return same_bits<float>(r & ~0x1fffu); };
    for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = number(from_a[i]);
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = number(from_b[i]);
  }
};

}  // namespace emulation
