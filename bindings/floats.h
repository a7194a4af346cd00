/* What the structure search does with scores in float32, compared as they are: -0 equals 0.

   No keys are made of them, as selection.h does of others: half of the memory traffic, and eight at
   a time. Numbers of scores and their indices come from the same comparisons, never from the next
   larger float: where the processor takes denormal numbers for zero, that is no larger. */
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "selection.h"

#define SPFMT_INLINE static inline __attribute__((always_inline))

typedef int32_t spfmt_ints4 __attribute__((vector_size(16)));

/* The places of the bits of a number. */
static const int32_t spfmt_places_of[16][4] = {
    {0}, {0},    {1},    {0, 1},    {2},    {0, 2},    {1, 2},    {0, 1, 2},
    {3}, {0, 3}, {1, 3}, {0, 1, 3}, {2, 3}, {0, 2, 3}, {1, 2, 3}, {0, 1, 2, 3}};

SPFMT_INLINE float spfmt_masked(float score, uint32_t mask) {
  uint32_t bits;
  memcpy(&bits, &score, sizeof bits);
  bits &= mask;
  memcpy(&score, &bits, sizeof bits);
  return score;
}

/* Keys of floats in the order of the floats, and back. */
static inline int64_t spfmt_float_key(float score) {
  int32_t bits;
  memcpy(&bits, &score, sizeof bits);
  return bits ^ ((bits >> 31) & INT32_MAX);
}
static inline float spfmt_key_float(int64_t key) {
  int32_t bits = (int32_t)key ^ (((int32_t)key >> 31) & INT32_MAX);
  float score;
  memcpy(&score, &bits, sizeof score);
  return score;
}

#define SPFMT_LEVEL(name) spfmt_##name##_plain
#include "floats-inl.h"
#undef SPFMT_LEVEL

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,bmi,popcnt")
#define SPFMT_LEVEL(name) spfmt_##name##_avx2
#include "floats-inl.h"
#undef SPFMT_LEVEL
#pragma GCC pop_options
#define SPFMT_CALL(name, ...)                                      \
  (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") \
       ? spfmt_##name##_avx2(__VA_ARGS__)                          \
       : spfmt_##name##_plain(__VA_ARGS__))
#else
#define SPFMT_CALL(name, ...) spfmt_##name##_plain(__VA_ARGS__)
#endif

static int64_t spfmt_count_floats(const float* scores, int64_t n, float bound, int exceeds) {
  return SPFMT_CALL(count, scores, n, bound, exceeds);
}
static int64_t spfmt_between_floats(const float* scores, int64_t n, uint32_t mask, float low,
                                    float high, int64_t* above, float* out) {
  return SPFMT_CALL(between, scores, n, mask, low, high, above, out);
}
static int64_t spfmt_emit_floats(const float* scores, int64_t n, uint32_t mask, float bound,
                                 int64_t* ties, int32_t* out, int64_t room) {
  return SPFMT_CALL(emit, scores, n, mask, bound, ties, out, room);
}
static void spfmt_fours_floats(const float* scores, int64_t cols, int64_t n, uint32_t mask,
                               int32_t* out) {
  SPFMT_CALL(fours, scores, cols, n, mask, out);
}

/* A bound that k of n scores reach, or the k-th largest where ties leave none: by bisection between
   two scores. Counting is vectorised and moves nothing. */
static float spfmt_bound_floats(const float* scores, int64_t n, int64_t k, float from, float to) {
  int64_t low = spfmt_float_key(from), high = spfmt_float_key(to);
  while (low < high) {
    int64_t middle = low + (high - low) / 2 + 1;
    int64_t count = spfmt_count_floats(scores, n, spfmt_key_float(middle), 0);
    if (count == k) return spfmt_key_float(middle);
    if (count > k)
      low = middle;
    else
      high = middle - 1;
  }
  return spfmt_key_float(low);
}
