#include "octet_pack.h"

#include <algorithm>

#include "../core/threads.h"

namespace spfmt {
namespace {

// An octet of 768 columns is 24 KiB, which leaves room in L1 for what streams past it.
constexpr int64_t kTileCols = 768;
// Offsets are 16 bits wide.
constexpr int64_t kMostTileCols = UINT16_MAX / kOctet;
// Shorter pieces than this are mostly padding, and loading and storing of sums.
constexpr int64_t kLeastPerPiece = 16;
constexpr int kStep = kQuadRows * kStepTerms;

int64_t tile_count(const Lists& a) {
  const int64_t mean = a.rows > 0 ? a.indptr[a.rows] / a.rows : 0;
  const int64_t wanted = (a.cols + kTileCols - 1) / kTileCols;
  const int64_t least = (a.cols + kMostTileCols - 1) / kMostTileCols;
  return std::max<int64_t>({1, least, std::min(wanted, mean / kLeastPerPiece)});
}

int64_t steps_of(const OctetPiece& piece) {
  return (piece.stop - piece.start + kStepTerms - 1) / kStepTerms;
}

// The nonzeros of each row of a chunk in front of `column`; `at` moves behind them.
std::vector<OctetPiece> take_pieces(const Lists& a, int64_t first_row, int64_t column,
                                    std::vector<int64_t>& at) {
  std::vector<OctetPiece> pieces;
  for (size_t i = 0; i < at.size(); ++i) {
    const int64_t start = at[i];
    while (at[i] < a.indptr[first_row + i + 1] && a.col_indices[at[i]] < column) ++at[i];
    if (at[i] > start) pieces.push_back({start, at[i], static_cast<uint16_t>(i)});
  }
  std::stable_sort(pieces.begin(), pieces.end(), [](const OctetPiece& p, const OctetPiece& q) {
    return steps_of(p) > steps_of(q);
  });
  return pieces;
}

// Four pieces, fewer at the end of a tile, as one quad.
void append_quad(const Lists& a, const OctetPiece* pieces, size_t count, int64_t tile_start,
                 OctetPack& pack) {
  const int64_t first = pack.step_ptr.back() * kStep, steps = steps_of(pieces[0]);
  const auto none = static_cast<uint16_t>(pack.view.width * kOctet);
  pack.offset.resize(first + steps * kStep, none);
  for (size_t i = 0; i < kQuadRows; ++i) {
    const OctetPiece piece = i < count ? pieces[i] : OctetPiece{0, 0, kOctetRows};
    for (int64_t p = piece.start, k = 0; p < piece.stop; ++p, ++k) {
      pack.offset[first + k / kStepTerms * kStep + i * kStepTerms + k % kStepTerms] =
          static_cast<uint16_t>((a.col_indices[p] - tile_start) * kOctet);
    }
    pack.piece.push_back(piece);
    pack.row.push_back(piece.row);
  }
  pack.step_ptr.push_back(pack.step_ptr.back() + steps);
}

}  // namespace

std::unique_ptr<OctetPack> make_octets(const Lists& a) {
  auto pack = std::make_unique<OctetPack>();
  const int64_t tiles = tile_count(a), chunks = (a.rows + kOctetRows - 1) / kOctetRows;
  const int64_t width = std::max<int64_t>(1, (a.cols + tiles - 1) / tiles);
  pack->view = {chunks, tiles, width, nullptr, nullptr, nullptr, nullptr};
  pack->offset.reserve(a.indptr[a.rows] + a.rows * kStepTerms);
  pack->quad_ptr.push_back(0);
  pack->step_ptr.push_back(0);
  for (int64_t row = 0; row < a.rows; row += kOctetRows) {
    std::vector<int64_t> at(a.indptr + row, a.indptr + std::min(a.rows, row + kOctetRows));
    for (int64_t t = 0; t < tiles; ++t) {
      const auto pieces = take_pieces(a, row, std::min(a.cols, (t + 1) * width), at);
      for (size_t i = 0; i < pieces.size(); i += kQuadRows) {
        append_quad(a, &pieces[i], std::min<size_t>(kQuadRows, pieces.size() - i), t * width,
                    *pack);
      }
      pack->quad_ptr.push_back(static_cast<int64_t>(pack->step_ptr.size()) - 1);
    }
  }
  pack->view.quad_ptr = pack->quad_ptr.data();
  pack->view.step_ptr = pack->step_ptr.data();
  pack->view.row = pack->row.data();
  pack->view.offset = pack->offset.data();
  return pack;
}

double octet_padding(const Lists& a) {
  constexpr int64_t kSample = 4;
  const int64_t tiles = tile_count(a), chunks = (a.rows + kOctetRows - 1) / kOctetRows;
  const int64_t width = (a.cols + tiles - 1) / tiles, sample = std::min(chunks, kSample);
  int64_t places = 0, nonzeros = 0;
  for (int64_t i = 0; i < sample; ++i) {
    const int64_t row = i * chunks / sample * kOctetRows;
    const int64_t stop = std::min(a.rows, row + kOctetRows);
    std::vector<int64_t> at(a.indptr + row, a.indptr + stop);
    nonzeros += a.indptr[stop] - a.indptr[row];
    for (int64_t t = 0; t < tiles; ++t) {
      const auto pieces = take_pieces(a, row, std::min(a.cols, (t + 1) * width), at);
      for (size_t p = 0; p < pieces.size(); p += kQuadRows) places += kStep * steps_of(pieces[p]);
    }
  }
  return nonzeros > 0 ? static_cast<double>(places) / static_cast<double>(nonzeros) : 1.0;
}

int64_t OctetPack::nbytes() const {
  return static_cast<int64_t>(8 * (quad_ptr.size() + step_ptr.size()) +
                              2 * (row.size() + offset.size()) + sizeof(OctetPiece) * piece.size() +
                              values.nbytes());
}

template <class T>
void pack_octet_values(const OctetPack& pack, const int64_t* permutation, const T* values,
                       T* packed, const Executor& executor) {
  const RowOctets& a = pack.view;
  for_each(executor, a.chunks, [&](int64_t chunk) {
    for (int64_t q = a.quad_ptr[chunk * a.tiles]; q < a.quad_ptr[(chunk + 1) * a.tiles]; ++q) {
      T* to = packed + a.step_ptr[q] * kStep;
      const int64_t places = (a.step_ptr[q + 1] - a.step_ptr[q]) * kStepTerms;
      for (int i = 0; i < kQuadRows; ++i) {
        const OctetPiece& piece = pack.piece[q * kQuadRows + i];
        for (int64_t k = 0; k < places; ++k) {
          const int64_t p = piece.start + k;
          const bool used = p < piece.stop;
          to[k / kStepTerms * kStep + i * kStepTerms + k % kStepTerms] =
              used ? values[permutation ? permutation[p] : p] : T(0);
        }
      }
    }
  });
}

template void pack_octet_values(const OctetPack&, const int64_t*, const float*, float*,
                                const Executor&);
template void pack_octet_values(const OctetPack&, const int64_t*, const double*, double*,
                                const Executor&);

}  // namespace spfmt
