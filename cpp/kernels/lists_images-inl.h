// Convolutions of lists (lists/images.h). Included once per ISA level.
#pragma once

#include "../lists/images.h"

namespace spfmt {
namespace {

// N pieces of equal length against a tile of R x W vectors. Weights are loaded four at a time and
// spread inside the register, so that the numbers of images have the load units to themselves.
template <class S, int R, int W, int N, bool kFirst, class T = typename S::T>
inline void image_pieces(const ImagePiece* piece, const int32_t* offsets,
                         const ListOutputs<T>& o) noexcept {
  typename S::V acc[N][R * W];
  const T* weight[N];
  const int32_t* offset[N];
  const auto place = [&](int i, int r, int v) {
    return o.y + piece[i].row * o.plane + r * o.y_row + v * kLanes;
  };
  SPFMT_UNROLL
  for (int i = 0; i < N; ++i) {
    weight[i] = o.values + piece[i].start;
    offset[i] = offsets + piece[i].first;
    const auto start = S::set1(kFirst && o.bias ? o.bias[piece[i].row] : T(0));
    SPFMT_UNROLL
    for (int v = 0; v < R * W; ++v) acc[i][v] = kFirst ? start : S::load(place(i, v / W, v % W));
  }
  const auto add = [&](int i, int64_t k, typename S::V w) {
    const T* x = o.x + offset[i][k];
    SPFMT_UNROLL
    for (int r = 0; r < R; ++r, x += o.x_row) {
      if (R > 1) x = opaque(x);
      SPFMT_UNROLL
      for (int v = 0; v < W; ++v) {
        acc[i][r * W + v] = S::fma(w, S::load(x + v * kLanes), acc[i][r * W + v]);
      }
    }
  };
  const int64_t count = piece->count;
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    SPFMT_UNROLL
    for (int i = 0; i < N; ++i) {
      const auto four = S::repeat4(weight[i] + k);
      add(i, k, S::template each<0>(four));
      add(i, k + 1, S::template each<1>(four));
      add(i, k + 2, S::template each<2>(four));
      add(i, k + 3, S::template each<3>(four));
    }
  }
  for (; k < count; ++k) {
    SPFMT_UNROLL
    for (int i = 0; i < N; ++i) add(i, k, S::set1(weight[i][k]));
  }
  SPFMT_UNROLL
  for (int i = 0; i < N; ++i) {
    SPFMT_UNROLL
    for (int v = 0; v < R * W; ++v) S::store(place(i, v / W, v % W), acc[i][v]);
  }
}

// Pieces sorted by length, as many of one length side by side as fit registers.
template <class S, int R, int W, bool kFirst, class T = typename S::T>
void image_block(const ImagePieces& a, const ImagePiece* piece, const ImagePiece* end,
                 const ListOutputs<T>& o) noexcept {
  constexpr int kFit = S::kImageVectors / (R * W), kMost = kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  while (piece < end) {
    const auto equal = [&](int n) {
      return n <= kMost && end - piece >= n && piece[n - 1].count == piece->count;
    };
    const int n = equal(4) ? 4 : equal(2) ? 2 : 1;
    if constexpr (kMost >= 4) {
      if (n == 4) image_pieces<S, R, W, 4, kFirst>(piece, a.offset, o);
    }
    if constexpr (kMost >= 2) {
      if (n == 2) image_pieces<S, R, W, 2, kFirst>(piece, a.offset, o);
    }
    if (n == 1) image_pieces<S, R, W, 1, kFirst>(piece, a.offset, o);
    piece += n;
  }
}

template <class S, int R, int W, class T = typename S::T>
__attribute__((noinline)) void image_tile(const ImagePieces& a, const ListOutputs<T>& o) noexcept {
  // One (block, chunk) after the other: only inside of one do lengths never rise.
  for (int64_t block = 0; block < a.blocks; ++block) {
    for (int64_t chunk = o.chunk; chunk < o.chunk_end; ++chunk) {
      const int64_t* at = a.piece_ptr + block * a.chunks + chunk;
      const ImagePiece *piece = a.piece + at[0], *end = a.piece + at[1];
      block == 0 ? image_block<S, R, W, true>(a, piece, end, o)
                 : image_block<S, R, W, false>(a, piece, end, o);
    }
  }
}

template <class S, int R, int W, class T = typename S::T>
void image_tile_of(const ImagePieces& a, const ListOutputs<T>& o) noexcept {
  if constexpr (W > 1) {
    if (o.across < W) return image_tile_of<S, R, W - 1>(a, o);
  }
  image_tile<S, R, W>(a, o);
}

template <class S, class T = typename S::T>
void lists_image(const ImagePieces& a, const ListOutputs<T>& o) noexcept {
  o.down == 2 ? image_tile_of<S, 2, S::kImageVectors / 2>(a, o)
              : image_tile_of<S, 1, S::kImageVectors>(a, o);
}

// Lane k < 4 Q of the result: the dot product of d with column k. Places behind the n-th repeat the
// last column.
template <class S, int R, int W, int Q, class T = typename S::T>
inline typename S::V image_dots(const typename S::V* d, const T* x, int64_t x_row,
                                const int32_t* offset, int n) noexcept {
  typename S::Quad quad[4];
  SPFMT_UNROLL
  for (int q = 0; q < Q; ++q) {
    typename S::Dot acc[4];
    SPFMT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int k = 4 * q + i;
      const T* xk = x + offset[q < Q - 1 || k < n ? k : n - 1];
      acc[i] = S::dot_of(S::mul(d[0], S::load(xk)));
      SPFMT_UNROLL
      for (int v = 1; v < R * W; ++v) {
        acc[i] = S::dot(d[v], S::load(xk + v / W * x_row + v % W * kLanes), acc[i]);
      }
    }
    quad[q] = S::quad(acc[0], acc[1], acc[2], acc[3]);
  }
  for (int q = Q; q < 4; ++q) quad[q] = quad[0];
  return S::join(quad[0], quad[1], quad[2], quad[3]);
}

template <class S, int R, int W, class T = typename S::T>
__attribute__((noinline)) void image_gradient(const ImagePieces& a, const ListGradient<T>& g,
                                              int64_t block, int64_t chunk) noexcept {
  const int64_t at = block * a.chunks + chunk;
  for (int64_t p = a.piece_ptr[at]; p < a.piece_ptr[at + 1]; ++p) {
    const ImagePiece& piece = a.piece[p];
    typename S::V d[R * W];
    SPFMT_UNROLL
    for (int v = 0; v < R * W; ++v) {
      d[v] = S::load(g.dy + piece.row * g.plane + v / W * g.dy_row + v % W * kLanes);
    }
    T* gradient = g.gradient + piece.start;
    const int32_t* offset = a.offset + piece.first;
    for (int k = 0; k < piece.count; k += kLanes) {
      const int n = piece.count - k < kLanes ? piece.count - k : kLanes;
      const auto dots = [&](auto body) { return body(d, g.x, g.x_row, offset + k, n); };
      const auto sum = n > 12  ? dots(image_dots<S, R, W, 4>)
                       : n > 8 ? dots(image_dots<S, R, W, 3>)
                       : n > 4 ? dots(image_dots<S, R, W, 2>)
                               : dots(image_dots<S, R, W, 1>);
      S::store(gradient + k, S::add(sum, S::load(gradient + k, n)), n);
    }
  }
}

template <class S, int R, int W, class T = typename S::T>
void image_gradient_of(const ImagePieces& a, const ListGradient<T>& g, int64_t block,
                       int64_t chunk) noexcept {
  if constexpr (W > 1) {
    if (g.across < W) return image_gradient_of<S, R, W - 1>(a, g, block, chunk);
  }
  image_gradient<S, R, W>(a, g, block, chunk);
}

template <class S, class T = typename S::T>
void lists_image_gradient(const ImagePieces& a, const ListGradient<T>& g, int64_t block,
                          int64_t chunk) noexcept {
  if constexpr (S::kHeldVectors >= 4) {
    if (g.down == 4) return image_gradient_of<S, 4, S::kHeldVectors / 4>(a, g, block, chunk);
  }
  g.down == 2 ? image_gradient_of<S, 2, S::kHeldVectors / 2>(a, g, block, chunk)
              : image_gradient_of<S, 1, S::kHeldVectors>(a, g, block, chunk);
}

template <class S>
constexpr ListImageBodies<typename S::T> list_image_bodies() {
  return {S::kImageVectors, S::kHeldVectors, lists_image<S>, lists_image_gradient<S>};
}

}  // namespace
}  // namespace spfmt
