/* What the structure search does with keys, in C: loops that the compiler vectorises. */
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__)
/* One function, compiled for several levels; the loader of glibc picks one. */
#define SPFMT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SPFMT_CLONES
#endif

/* Selection works on keys: integers in the order of the scores, where -0 equals 0. Loops over
   integers vectorise, and of 64 keys a word of bits tells the few that are kept. */
static inline int64_t spfmt_key(double score) {
  int64_t bits;
  score += 0.0; /* -0 becomes 0 */
  memcpy(&bits, &score, sizeof bits);
  return bits ^ ((bits >> 63) & INT64_MAX);
}
SPFMT_CLONES static void spfmt_keys_float(const float* scores, int64_t n, int64_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = spfmt_key(scores[i]);
}
SPFMT_CLONES static void spfmt_keys_double(const double* scores, int64_t n, int64_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = spfmt_key(scores[i]);
}

SPFMT_CLONES static int64_t spfmt_count(const int64_t* keys, int64_t n, int64_t bound) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += keys[i] >= bound;
  return count;
}

/* Of up to 64 keys, a bit for each that is from low to high. */
static inline uint64_t spfmt_bits(const int64_t* keys, int64_t n, int64_t low, int64_t high) {
  uint64_t bits = 0;
  if (n == 64) { /* a count that the compiler knows */
    for (int64_t i = 0; i < 64; ++i) bits |= (uint64_t)((keys[i] >= low) & (keys[i] <= high)) << i;
  } else {
    for (int64_t i = 0; i < n; ++i) bits |= (uint64_t)((keys[i] >= low) & (keys[i] <= high)) << i;
  }
  return bits;
}

/* The keys from low to high; returns how many, and how many are larger. */
SPFMT_CLONES static int64_t spfmt_between(const int64_t* keys, int64_t n, int64_t low, int64_t high,
                                          int64_t* above, int64_t* out) {
  int64_t at = 0, larger = 0;
  for (int64_t i = 0; i < n; i += 64) {
    uint64_t bits = spfmt_bits(keys + i, n - i < 64 ? n - i : 64, low, high);
    for (; bits; bits &= bits - 1) out[at++] = keys[i + __builtin_ctzll(bits)];
    for (int64_t j = i; j < (n - i < 64 ? n : i + 64); ++j) larger += keys[j] > high;
  }
  *above = larger;
  return at;
}

/* Indices of the keys above bound and of the first `ties` equal to it, which are counted down. */
SPFMT_CLONES static int64_t spfmt_emit(const int64_t* keys, int64_t n, int64_t bound, int64_t* ties,
                                       int32_t first, int32_t* out) {
  int64_t at = 0, left = *ties;
  for (int64_t i = 0; i < n; i += 64) {
    uint64_t bits = spfmt_bits(keys + i, n - i < 64 ? n - i : 64, bound + !left, INT64_MAX);
    for (; bits; bits &= bits - 1) {
      int64_t place = i + __builtin_ctzll(bits);
      int64_t tie = keys[place] == bound;
      if (tie && left == 0) continue;
      left -= tie;
      out[at++] = first + (int32_t)place;
    }
  }
  *ties = left;
  return at;
}

/* Indices of the n largest of m keys whose n-th largest is bound, or above bound where ties leave
   none; `out` has room for m. */
static inline int64_t spfmt_largest(const int64_t* keys, int64_t m, int64_t n, int64_t bound,
                                    int32_t first, int32_t* out) {
  int64_t ties = 0;
  int64_t reached = spfmt_emit(keys, m, bound - 1, &ties, first, out);
  if (reached == n) return n;
  ties = n;
  for (int64_t i = 0; i < m; ++i) ties -= keys[i] > bound;
  return spfmt_emit(keys, m, bound, &ties, first, out);
}

SPFMT_CLONES static void spfmt_mark(const int64_t* keys, int64_t n, int64_t bound, uint8_t* keep) {
  for (int64_t i = 0; i < n; ++i) keep[i] = keys[i] > bound;
}

/* The n best of four: an element is kept if fewer than n beat it. */
static inline int64_t spfmt_of_four(const int64_t* k, int64_t n, int32_t first, int32_t* out) {
  int a = k[0] >= k[1], b = k[0] >= k[2], c = k[0] >= k[3];
  int d = k[1] >= k[2], e = k[1] >= k[3], f = k[2] >= k[3];
  int64_t at = 0;
  out[at] = first, at += 3 - a - b - c < n;
  out[at] = first + 1, at += 2 + a - d - e < n;
  out[at] = first + 2, at += 1 + b + d - f < n;
  out[at] = first + 3, at += c + e + f < n;
  return at;
}

/* Indices of the n best of m, for small n: the maximum, the largest key below it, and so on. */
static inline int64_t spfmt_best(const int64_t* keys, int64_t m, int64_t n, int32_t first,
                                 int32_t* out) {
  int64_t bound = INT64_MAX;
  for (;;) {
    int64_t reached = 0;
    uint64_t gap = UINT64_MAX; /* from bound - 1 down; a key above it wraps around */
    for (int64_t i = 0; i < m; ++i) reached += keys[i] >= bound;
    if (reached >= n) return spfmt_largest(keys, m, n, bound, first, out);
    for (int64_t i = 0; i < m; ++i) {
      uint64_t below = (uint64_t)bound - 1 - (uint64_t)keys[i];
      gap = below < gap ? below : gap;
    }
    bound = (int64_t)((uint64_t)bound - 1 - gap);
  }
}

/* Columns of the best n of every m keys of a row, for small n; a short last group keeps
   min(n, its length). */
SPFMT_CLONES static void spfmt_groups(const int64_t* keys, int64_t cols, int64_t n, int64_t m,
                                      int32_t* out) {
  for (int64_t begin = 0, at = 0; begin < cols; begin += m) {
    int64_t length = cols - begin < m ? cols - begin : m;
    int32_t first = (int32_t)begin;
    if (length == 4)
      at += spfmt_of_four(keys + begin, n, first, out + at);
    else
      at += spfmt_best(keys + begin, length, n < length ? n : length, first, out + at);
  }
}

/* The largest magnitudes of columns, as bits, with one row more; NaN is the largest. */
SPFMT_CLONES static void spfmt_top_magnitudes(const float* row, int64_t n, int32_t* top) {
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    memcpy(&bits, row + i, sizeof bits);
    bits &= INT32_MAX;
    top[i] = bits > top[i] ? bits : top[i];
  }
}

/* Of 32 bytes: compilers take wider ones apart, element by element, where registers are no wider.
 */
typedef double spfmt_doubles __attribute__((vector_size(32)));
typedef int64_t spfmt_ints __attribute__((vector_size(32)));

/* The best pattern of each of eight 4 x 4 tiles, whose pairs of columns lie side by side. */
SPFMT_CLONES static void spfmt_best_patterns(const double* pairs, const int32_t* patterns,
                                             int64_t n, int64_t* which) {
  for (int first = 0; first < 8; first += 4) { /* four tiles at a time */
    spfmt_doubles pair[24], halves[2][36], best = {0};
    spfmt_ints chosen = {0};
    for (int i = 0; i < 24; ++i) memcpy(&pair[i], pairs + 8 * i + first, sizeof pair[i]);
    for (int i = 0; i < 36; ++i) {
      halves[0][i] = pair[i / 6] + pair[6 + i % 6];
      halves[1][i] = pair[12 + i / 6] + pair[18 + i % 6];
    }
    const int32_t* rows = patterns;
    for (int64_t p = 0; p < n; ++p, rows += 4) {
      spfmt_doubles total = halves[0][6 * rows[0] + rows[1]] + halves[1][6 * rows[2] + rows[3]];
      spfmt_ints better = p ? total > best : ~chosen;
      chosen = (chosen & ~better) | (better & p);
      best = (spfmt_doubles)(((spfmt_ints)best & ~better) | ((spfmt_ints)total & better));
    }
    memcpy(which + first, &chosen, sizeof chosen);
  }
}
static const uint8_t spfmt_pairs[6][4] = {{1, 1, 0, 0}, {1, 0, 1, 0}, {1, 0, 0, 1},
                                          {0, 1, 1, 0}, {0, 1, 0, 1}, {0, 0, 1, 1}};
