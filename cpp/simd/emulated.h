// The AVX-512 intrinsics that avx512.h uses, on any x86-64 with AVX2: SIMDe's, and ours for those
// that SIMDe 0.7 lacks or rounds otherwise. For tests alone (SPFMT_EMULATE=avx512,
// CONTRIBUTING.md): slow, but every lane holds what the instruction would give. An intrinsic that
// neither defines does not compile, as its instruction is not enabled.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cmath>
#include <cstdint>

namespace spfmt {
namespace {
namespace emulated {

typedef int32_t Int32s __attribute__((vector_size(64)));

inline __m512i cvtepu8_epi32(__m128i bytes) noexcept {
  uint8_t from[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(from), bytes);
  Int32s to;
  for (int i = 0; i < 16; ++i) to[i] = from[i];
  return reinterpret_cast<__m512i>(to);
}

// Lanes that the mask leaves out are neither read nor written: they may lie on no page at all.
inline __m512 maskz_loadu_ps(__mmask16 mask, const void* p) noexcept {
  __m512 v = _mm512_setzero_ps();
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) v[i] = static_cast<const float*>(p)[i];
  }
  return v;
}
inline void mask_storeu_ps(void* p, __mmask16 mask, __m512 v) noexcept {
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) static_cast<float*>(p)[i] = v[i];
  }
}

// No instruction but a sequence: halves, quarters, pairs, as GCC and Clang add them.
inline float reduce_add_ps(__m512 v) noexcept {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

inline __mmask16 testn_epi32_mask(__m512i a, __m512i b) noexcept {
  const Int32s both = reinterpret_cast<Int32s>(a) & reinterpret_cast<Int32s>(b);
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= unsigned{both[i] == 0} << i;
  return static_cast<__mmask16>(mask);
}

// SIMDe compares with zero, so that -0 and negative NaNs keep their sign.
inline __m512 abs_ps(__m512 v) noexcept {
  return reinterpret_cast<__m512>(reinterpret_cast<Int32s>(v) & 0x7fffffff);
}

// a * 2^floor(b), rounded once. SIMDe flushes subnormal numbers. Infinite b is not special here.
inline __m512 scalef_ps(__m512 a, __m512 b) noexcept {
  for (int i = 0; i < 16; ++i) {
    const float n = std::floor(std::fmin(std::fmax(b[i], -400.0f), 400.0f));
    a[i] = std::isnan(b[i]) ? b[i] : std::ldexp(a[i], static_cast<int>(n));
  }
  return a;
}

// Within each four lanes: lane i is the one that bits 2 i and 2 i + 1 of `order` name.
inline __m512 permute_ps(__m512 v, int order) noexcept {
  const __m512 from = v;
  for (int i = 0; i < 16; ++i) v[i] = from[i / 4 * 4 + (order >> i % 4 * 2 & 3)];
  return v;
}

}  // namespace emulated
}  // namespace
}  // namespace spfmt

#undef _mm512_cvtepu8_epi32
#undef _mm512_maskz_loadu_ps
#undef _mm512_mask_storeu_ps
#undef _mm512_reduce_add_ps
#undef _mm512_testn_epi32_mask
#undef _mm512_abs_ps
#undef _mm512_scalef_ps
#undef _mm512_permute_ps
#undef _mm512_shuffle_f32x4
#define _mm512_cvtepu8_epi32 ::spfmt::emulated::cvtepu8_epi32
#define _mm512_maskz_loadu_ps ::spfmt::emulated::maskz_loadu_ps
#define _mm512_mask_storeu_ps ::spfmt::emulated::mask_storeu_ps
#define _mm512_reduce_add_ps ::spfmt::emulated::reduce_add_ps
#define _mm512_testn_epi32_mask ::spfmt::emulated::testn_epi32_mask
#define _mm512_abs_ps ::spfmt::emulated::abs_ps
#define _mm512_scalef_ps ::spfmt::emulated::scalef_ps
#define _mm512_permute_ps ::spfmt::emulated::permute_ps
#define _mm512_shuffle_f32x4 simde_mm512_shuffle_f32x4  // SIMDe 0.7 has it, but for its alias
