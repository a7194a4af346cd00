// Builds the RowTiles layout: pieces of rows in the order in which the panel kernels visit them.
#include <algorithm>
#include <climits>
#include <stdexcept>

#include "../core/plan.h"

namespace spfmt {
namespace {

// A tile's columns are counted in 16 bits, and so are the nonzeros of a piece.
constexpr int64_t kMostTileCols = UINT16_MAX;
// 256 columns of a panel are 64 KiB, of which a pass finds a good part in L1.
constexpr int64_t kTileCols = 256;
// Shorter pieces than this spend their time on loading and storing Y.
constexpr int64_t kLeastPerPiece = 8;

int64_t tile_count(const Lists& a) {
  const int64_t mean = a.rows > 0 ? a.indptr[a.rows] / a.rows : 0;
  const int64_t wanted = (a.cols + kTileCols - 1) / kTileCols;
  const int64_t least = (a.cols + kMostTileCols - 1) / kMostTileCols;
  return std::max<int64_t>({1, least, std::min(wanted, mean / kLeastPerPiece)});
}

// The part of each row of a chunk that lies in the tile ending at `column`; `at` moves past it.
void append_pieces(const Lists& a, int64_t row, std::vector<int64_t>& at, int64_t column,
                   bool first, TilePack& pack) {
  const size_t begin = pack.piece.size();
  for (size_t i = 0; i < at.size(); ++i) {
    const int64_t start = at[i];
    while (at[i] < a.indptr[row + i + 1] && a.col_indices[at[i]] < column) ++at[i];
    if (at[i] == start && !first) continue;
    pack.piece.push_back({static_cast<int32_t>(start - a.indptr[row]), static_cast<uint16_t>(i),
                          static_cast<uint16_t>(at[i] - start)});
  }
  std::stable_sort(pack.piece.begin() + begin, pack.piece.end(),
                   [](const RowPiece& p, const RowPiece& q) { return p.count > q.count; });
}

void append_columns(const Lists& a, int64_t row, int64_t tile_start, size_t first_piece,
                    TilePack& pack) {
  for (size_t i = first_piece; i < pack.piece.size(); ++i) {
    const RowPiece& piece = pack.piece[i];
    const int32_t* col = a.col_indices + a.indptr[row] + piece.start;
    for (int k = 0; k < piece.count; ++k) {
      pack.col.push_back(static_cast<uint16_t>(col[k] - tile_start));
    }
  }
  pack.piece_ptr.push_back(pack.piece.size());
  pack.visit_ptr.push_back(pack.col.size());
}

}  // namespace

std::unique_ptr<TilePack> make_tile_pack(const Lists& a) {
  auto pack = std::make_unique<TilePack>();
  const int64_t tiles = tile_count(a);
  const int64_t width = std::max<int64_t>(1, (a.cols + tiles - 1) / tiles);
  pack->col.reserve(a.indptr[a.rows]);
  pack->piece_ptr.push_back(0);
  pack->visit_ptr.push_back(0);
  for (int64_t row = 0; row < a.rows; row += kRowChunk) {
    const int64_t rows = std::min(kRowChunk, a.rows - row);
    if (a.indptr[row + rows] - a.indptr[row] > INT32_MAX) {
      throw std::length_error("rows too long for one chunk");
    }
    pack->base.push_back(a.indptr[row]);
    std::vector<int64_t> at(a.indptr + row, a.indptr + row + rows);
    for (int64_t t = 0; t < tiles; ++t) {
      const size_t first_piece = pack->piece.size();
      append_pieces(a, row, at, t == tiles - 1 ? a.cols : (t + 1) * width, t == 0, *pack);
      append_columns(a, row, t * width, first_piece, *pack);
    }
  }
  pack->view = {tiles,
                width,
                pack->base.data(),
                pack->piece_ptr.data(),
                pack->visit_ptr.data(),
                pack->piece.data(),
                pack->col.data()};
  return pack;
}

int64_t TilePack::nbytes() const {
  return static_cast<int64_t>(8 * (base.size() + piece_ptr.size() + visit_ptr.size()) +
                              sizeof(RowPiece) * piece.size() + 2 * col.size() + values.nbytes());
}

}  // namespace spfmt
