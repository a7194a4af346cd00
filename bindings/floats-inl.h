/* Loops over scores in float32, compiled once for every level; see floats.h. A mask of bits is
   and-ed to every score: it makes magnitudes of them. */

/* Of up to 32 scores, a bit for each that reaches bound, or exceeds it. */
SPFMT_INLINE uint32_t SPFMT_LEVEL(reach)(const float* scores, int64_t n, float bound, int exceeds,
                                         uint32_t mask) {
  uint32_t bits = 0;
#ifdef __AVX2__
  if (n >= 32) {
    const __m256 b = _mm256_set1_ps(bound), m = _mm256_castsi256_ps(_mm256_set1_epi32((int)mask));
    for (int k = 0; k < 4; ++k) {
      const __m256 v = _mm256_and_ps(_mm256_loadu_ps(scores + 8 * k), m);
      const __m256 more =
          exceeds ? _mm256_cmp_ps(v, b, _CMP_GT_OQ) : _mm256_cmp_ps(v, b, _CMP_GE_OQ);
      bits |= (uint32_t)_mm256_movemask_ps(more) << 8 * k;
    }
    return bits;
  }
#endif
  for (int64_t i = 0; i < n && i < 32; ++i) {
    const float v = spfmt_masked(scores[i], mask);
    bits |= (uint32_t)(exceeds ? v > bound : v >= bound) << i;
  }
  return bits;
}

static int64_t SPFMT_LEVEL(count)(const float* scores, int64_t n, float bound, int exceeds) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 4096) { /* 32-bit lanes hold so many */
    int32_t part = 0;
    int64_t stop = n - i < 4096 ? n : i + 4096;
    if (exceeds)
      for (int64_t j = i; j < stop; ++j) part += scores[j] > bound;
    else
      for (int64_t j = i; j < stop; ++j) part += scores[j] >= bound;
    count += part;
  }
  return count;
}

/* The scores that reach low and not high, most often few: two of 32 are written without a branch.
   Returns how many, and how many reach high; `out` has room for two more. */
static int64_t SPFMT_LEVEL(between)(const float* scores, int64_t n, uint32_t mask, float low,
                                    float high, int64_t* above, float* out) {
  int64_t at = 0, larger = 0;
  for (int64_t i = 0; i < n; i += 32) {
    const uint32_t top = SPFMT_LEVEL(reach)(scores + i, n - i, high, 0, mask);
    uint32_t bits = SPFMT_LEVEL(reach)(scores + i, n - i, low, 0, mask) & ~top;
    const uint32_t last = 1U << (n - i < 32 ? n - i - 1 : 31); /* a place that can be read */
    const int64_t count = __builtin_popcount(bits);
    larger += __builtin_popcount(top);
    out[at] = spfmt_masked(scores[i + __builtin_ctz(bits | last)], mask);
    bits &= bits - 1;
    out[at + 1] = spfmt_masked(scores[i + __builtin_ctz(bits | last)], mask);
    for (int64_t k = 2; k < count; ++k) {
      bits &= bits - 1;
      out[at + k] = spfmt_masked(scores[i + __builtin_ctz(bits)], mask);
    }
    at += count;
  }
  *above = larger;
  return at;
}

/* Indices of the scores that reach bound, of those equal to it the first `ties`, counted down; -1
   ties are all. `out` has room for `room`: no more are written, even if scores change meanwhile. */
static int64_t SPFMT_LEVEL(emit)(const float* scores, int64_t n, uint32_t mask, float bound,
                                 int64_t* ties, int32_t* out, int64_t room) {
  int64_t at = 0, left = *ties;
  for (int64_t i = 0; i < n; i += 32) {
    uint32_t bits = left < 0 ? SPFMT_LEVEL(reach)(scores + i, n - i, bound, 0, mask)
                             : SPFMT_LEVEL(reach)(scores + i, n - i, bound, 1, mask);
    if (left > 0) {
      uint32_t equal = SPFMT_LEVEL(reach)(scores + i, n - i, bound, 0, mask) & ~bits;
      for (; equal && left; equal &= equal - 1, --left) bits |= equal & (0 - equal);
    }
    const int64_t found = __builtin_popcount(bits), count = found < room - at ? found : room - at;
    int32_t* to = out + at;
    int64_t k = 0;
    if (at + 8 <= room) { /* so many without a branch on each */
      for (; k < 4; ++k, bits &= bits - 1) to[k] = (int32_t)i + __builtin_ctz(bits | 1U << 31);
      if (count > 4) {
        for (; k < 8; ++k, bits &= bits - 1) to[k] = (int32_t)i + __builtin_ctz(bits | 1U << 31);
      }
    }
    for (; k < count; ++k, bits &= bits - 1) to[k] = (int32_t)i + __builtin_ctz(bits);
    at += count;
  }
  *ties = left;
  return at;
}

/* Of the groups of four of 8 scores, a bit for each score that fewer than n of its group beat. */
SPFMT_INLINE uint32_t SPFMT_LEVEL(best_of_fours)(const float* scores, int32_t n, uint32_t mask) {
#ifdef __AVX2__
  const __m256 v =
      _mm256_and_ps(_mm256_loadu_ps(scores), _mm256_castsi256_ps(_mm256_set1_epi32((int)mask)));
  const __m256 a = _mm256_permute_ps(v, 0x39), b = _mm256_permute_ps(v, 0x4E),
               c = _mm256_permute_ps(v, 0x93); /* the next one, the one behind, the one before */
  /* One that comes before wins a tie; of each pair in turn, that is the last 1, 2 or 3 lanes. */
  const __m256 more_a =
      _mm256_blend_ps(_mm256_cmp_ps(a, v, _CMP_GT_OQ), _mm256_cmp_ps(a, v, _CMP_GE_OQ), 0x88);
  const __m256 more_b =
      _mm256_blend_ps(_mm256_cmp_ps(b, v, _CMP_GT_OQ), _mm256_cmp_ps(b, v, _CMP_GE_OQ), 0xCC);
  const __m256 more_c =
      _mm256_blend_ps(_mm256_cmp_ps(c, v, _CMP_GT_OQ), _mm256_cmp_ps(c, v, _CMP_GE_OQ), 0xEE);
  const __m256i rank =
      _mm256_add_epi32(_mm256_add_epi32(_mm256_castps_si256(more_a), _mm256_castps_si256(more_b)),
                       _mm256_castps_si256(more_c)); /* counted down from zero */
  const __m256i kept = _mm256_cmpgt_epi32(rank, _mm256_set1_epi32(-n));
  return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(kept));
#else
  uint32_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    const float v = spfmt_masked(scores[i], mask);
    int beaten = 0;
    for (int j = i & 4; j < (i & 4) + 4; ++j) {
      const float other = spfmt_masked(scores[j], mask);
      beaten += j < i ? other >= v : other > v;
    }
    bits |= (uint32_t)(beaten < n) << i;
  }
  return bits;
#endif
}

/* Columns of the best n of every four scores of a row, n <= 4; a short last group keeps
   min(n, its length). `out` has room for four more. */
static void SPFMT_LEVEL(fours)(const float* scores, int64_t cols, int64_t n, uint32_t mask,
                               int32_t* out) {
  int64_t at = 0, i = 0;
  for (; i + 8 <= cols; i += 8) {
    const uint32_t bits = SPFMT_LEVEL(best_of_fours)(scores + i, (int32_t)n, mask);
    for (int half = 0; half < 2; ++half, at += n) {
      spfmt_ints4 columns;
      memcpy(&columns, spfmt_places_of[bits >> 4 * half & 15], sizeof columns);
      columns += (int32_t)i + 4 * half;
      memcpy(out + at, &columns, sizeof columns);
    }
  }
  for (; i < cols; i += 4) {
    int64_t keys[4], length = cols - i < 4 ? cols - i : 4;
    for (int64_t j = 0; j < length; ++j) {
      keys[j] = spfmt_float_key(spfmt_masked(scores[i + j], mask) + 0.0f);
    }
    if (length == 4)
      at += spfmt_of_four(keys, n, (int32_t)i, out + at);
    else
      at += spfmt_best(keys, length, n < length ? n : length, (int32_t)i, out + at);
  }
}
