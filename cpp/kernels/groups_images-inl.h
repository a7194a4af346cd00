// Convolutions of groups (groups/images.h). Included once per ISA level.
#pragma once

#include "../groups/images.h"

namespace spfmt {
namespace {

// One load of weights serves all outputs of a tile; their numbers come by broadcasts.
template <class S, int R, int W, bool kWhole, class T = typename S::T>
inline void band_tile(const BandOutputs<T>& o) noexcept {
  typename S::V acc[R * W];
  SPFMT_UNROLL
  for (int i = 0; i < R * W; ++i) {
    acc[i] = S::load(o.start ? o.start : o.sums + i / W * o.sums_row + i % W * kLanes);
  }
  const T* w = o.values;
  const int64_t step = kWhole ? kLanes : o.rows;
  for (int64_t j = 0; j < o.cols; ++j, w += step) {
    const auto weights = S::keep(kWhole ? S::load(w) : S::load(w, o.rows));
    const T* x = o.x + o.offset[j];
    SPFMT_UNROLL
    for (int r = 0; r < R; ++r, x += o.row_stride) {
      if (R > 1) x = opaque(x);
      SPFMT_UNROLL
      for (int i = 0; i < W; ++i) {
        acc[r * W + i] = S::fma(weights, S::set1(x[i]), acc[r * W + i]);
      }
    }
  }
  SPFMT_UNROLL
  for (int i = 0; i < R * W; ++i) S::store(o.sums + i / W * o.sums_row + i % W * kLanes, acc[i]);
}

template <class S, int R, int W, class T = typename S::T>
__attribute__((noinline)) void groups_image(const BandOutputs<T>& o) noexcept {
  o.rows == kLanes ? band_tile<S, R, W, true>(o) : band_tile<S, R, W, false>(o);
}

// Sums of products with the rows of a band, of R x W outputs of one channel.
template <class S, int R, int W, class T = typename S::T>
__attribute__((noinline)) void groups_image_t(const TurnedOutputs<T>& o) noexcept {
  typename S::Dot acc[R * W];
  SPFMT_UNROLL
  for (auto& a : acc) a = S::dot_zero();
  for (const TurnedEntry* e = o.entry; e < o.end; ++e) {
    const T* w = o.values + e->value;
    const auto weights = e->rows == kLanes ? S::load(w) : S::load(w, e->rows);
    const T* dy = o.dy + e->offset;
    SPFMT_UNROLL
    for (int r = 0; r < R; ++r, dy += o.row_stride) {
      if (R > 1) dy = opaque(dy);
      SPFMT_UNROLL
      for (int i = 0; i < W; ++i) {
        const auto rows = S::load(dy + i * kLanes);
        acc[r * W + i] = S::dot(weights, rows, acc[r * W + i]);
      }
    }
  }
  typename S::Quad quad[4];
  SPFMT_UNROLL
  for (int q = 0; q < 4; ++q) {
    constexpr int kQuads = R * W / 4;
    const int k = q < kQuads ? 4 * q : 0;
    quad[q] = S::quad(acc[k], acc[k + 1], acc[k + 2], acc[k + 3]);
  }
  T sums[kLanes];
  const auto joined = S::join(quad[0], quad[1], quad[2], quad[3]);
  if (R == 1 && o.out_step == 1) return S::store(o.out, joined, o.width);
  S::store(sums, joined);
  for (int r = 0; r < o.height; ++r) {
    T* out = o.out + r * o.out_row;
    for (int i = 0; i < o.width; ++i) out[i * o.out_step] = sums[r * W + i];
  }
}

// K columns of a band: one load of dY's rows serves all of them. Sums of a few outputs are added to
// the gradient, not each output: long sums of float32 would lose digits.
template <class S, int K, class T = typename S::T>
inline void gradient_columns(const BandGradient<T>& g, int64_t first) noexcept {
  typename S::V acc[K];
  const T* x[K];
  SPFMT_UNROLL
  for (int k = 0; k < K; ++k) {
    acc[k] = S::zero();
    x[k] = g.x + g.offset[first + k];
  }
  const T* dy = g.dy;
  const auto add = [&](const T* rows, int64_t at) {
    const auto v = S::load(rows);
    SPFMT_UNROLL
    for (int k = 0; k < K; ++k) acc[k] = S::fma(v, S::set1(x[k][at]), acc[k]);
  };
  for (int m = 0; m < g.images; ++m) {
    for (int64_t y = 0; y < g.height; ++y) {
      const T* rows = dy + m * g.dy_image + y * g.dy_row;
      int64_t at = m * g.x_image + y * g.x_row;
      int64_t i = 0;
      for (; i + 4 <= g.width; i += 4, rows += 4 * kLanes, at += 4) {
        SPFMT_UNROLL
        for (int p = 0; p < 4; ++p) add(rows + p * kLanes, at + p);
      }
      for (; i < g.width; ++i, rows += kLanes, ++at) add(rows, at);
    }
  }
  for (int k = 0; k < K; ++k) {
    T* to = g.gradient + (first + k) * g.rows;
    S::store(to, S::add(acc[k], S::load(to, g.rows)), g.rows);
  }
}

template <class S, int K, class T = typename S::T>
__attribute__((noinline)) void gradient_part(const BandGradient<T>& g, int64_t first,
                                             int n) noexcept {
  if constexpr (K > 1) {
    if (n < K) return gradient_part<S, K - 1>(g, first, n);
  }
  gradient_columns<S, K>(g, first);
}

template <class S, class T = typename S::T>
void groups_image_gradient(const BandGradient<T>& g) noexcept {
  for_parts(g.cols, S::kGradientColumns,
            [&](int64_t first, int n) { gradient_part<S, S::kGradientColumns>(g, first, n); });
}

// Shapes of up to S::kImageOutputs outputs. Wide maps take rows of 28 or 16, and 7 x 7 or 4 x 4 of
// the last layers fill a tile too.
template <class S, class T = typename S::T>
constexpr Tiles<BandOutputs<T>> image_tiles() {
  Tiles<BandOutputs<T>> t{{}, 0, S::kTileCost};
#define SPFMT_TILE(R, W) \
  if constexpr (R * W <= S::kImageOutputs) t.tile[t.count++] = {R, W, groups_image<S, R, W>};
  SPFMT_TILE(1, 28)
  SPFMT_TILE(1, 24)
  SPFMT_TILE(1, 20)
  SPFMT_TILE(1, 16)
  SPFMT_TILE(1, 12)
  SPFMT_TILE(1, 8)
  SPFMT_TILE(1, 6)
  SPFMT_TILE(1, 5)
  SPFMT_TILE(1, 4)
  SPFMT_TILE(2, 14)
  SPFMT_TILE(2, 12)
  SPFMT_TILE(2, 10)
  SPFMT_TILE(2, 8)
  SPFMT_TILE(2, 3)
  SPFMT_TILE(2, 2)
  SPFMT_TILE(4, 7)
  SPFMT_TILE(4, 6)
  SPFMT_TILE(4, 5)
  SPFMT_TILE(4, 4)
#undef SPFMT_TILE
  return t;
}

template <class S, class T = typename S::T>
constexpr Tiles<TurnedOutputs<T>> turned_tiles() {
  constexpr int kOutputs = S::kTurnedOutputs;
  return {{{1, kOutputs, groups_image_t<S, 1, kOutputs>},
           {2, kOutputs / 2, groups_image_t<S, 2, kOutputs / 2>},
           {4, kOutputs / 4, groups_image_t<S, 4, kOutputs / 4>}},
          3,
          1.0};
}

template <class S>
constexpr Tiles<BandOutputs<typename S::T>> kImageTiles = image_tiles<S>();
template <class S>
constexpr Tiles<TurnedOutputs<typename S::T>> kTurnedTiles = turned_tiles<S>();

template <class S>
constexpr GroupImageBodies<typename S::T> group_image_bodies() {
  return {S::kImageColumns, &kImageTiles<S>, &kTurnedTiles<S>, groups_image_gradient<S>};
}

}  // namespace
}  // namespace spfmt
