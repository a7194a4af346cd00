#include "panels.h"

#include <algorithm>
#include <climits>
#include <stdexcept>
#include <vector>

#include "../core/panels.h"
#include "../core/variant.h"

namespace spfmt {
namespace {

// A tile's columns are counted in 16 bits, and so are the nonzeros of a piece.
constexpr int64_t kMostTileCols = UINT16_MAX;
// 256 columns of a panel are 64 KiB, of which a pass finds a good part in L1.
constexpr int64_t kTileCols = 256;
// Shorter pieces than this spend their time on loading and storing Y.
constexpr int64_t kLeastPerPiece = 8;

struct PiecePack {
  std::vector<int64_t> base, piece_ptr, visit_ptr;
  std::vector<Piece> piece;
  std::vector<uint16_t> col;
  Pieces view;

  int64_t chunks() const { return static_cast<int64_t>(base.size()); }
  int64_t nbytes() const {
    return static_cast<int64_t>(8 * (base.size() + piece_ptr.size() + visit_ptr.size()) +
                                sizeof(Piece) * piece.size() + 2 * col.size());
  }
};

int64_t tile_count(const Lists& a) {
  const int64_t mean = a.rows > 0 ? a.indptr[a.rows] / a.rows : 0;
  const int64_t wanted = (a.cols + kTileCols - 1) / kTileCols;
  const int64_t least = (a.cols + kMostTileCols - 1) / kMostTileCols;
  return std::max<int64_t>({1, least, std::min(wanted, mean / kLeastPerPiece)});
}

// The parts of the rows of a chunk that lie in the tile ending at `column`, longest first and of
// equal ones the first row first; `at` moves past them. `order` has room for a number per row.
void append_pieces(const Lists& a, int64_t row, std::vector<int64_t>& at, int64_t column,
                   bool first, std::vector<uint64_t>& order, PiecePack& pack) {
  size_t n = 0;
  for (size_t i = 0; i < at.size(); ++i) {
    const int64_t start = at[i];
    at[i] = std::lower_bound(a.col_indices + start, a.col_indices + a.indptr[row + i + 1], column) -
            a.col_indices;
    if (at[i] == start && !first) continue;
    order[n++] = static_cast<uint64_t>(UINT16_MAX - (at[i] - start)) << 48 | i << 32 |
                 static_cast<uint32_t>(start - a.indptr[row]);
  }
  std::sort(order.begin(), order.begin() + static_cast<int64_t>(n));
  for (size_t k = 0; k < n; ++k) {
    pack.piece.push_back({static_cast<int32_t>(order[k]), static_cast<uint16_t>(order[k] >> 32),
                          static_cast<uint16_t>(UINT16_MAX - (order[k] >> 48))});
  }
}

// Columns of the pieces from a first one on, counted from a tile's start, at `to`; returns their
// end.
uint16_t* write_columns(const Lists& a, int64_t row, int64_t tile_start, size_t first_piece,
                        const PiecePack& pack, uint16_t* to) {
  for (size_t i = first_piece; i < pack.piece.size(); ++i) {
    const Piece& piece = pack.piece[i];
    const int32_t* col = a.col_indices + a.indptr[row] + piece.start;
    for (int k = 0; k < piece.count; ++k) to[k] = static_cast<uint16_t>(col[k] - tile_start);
    to += piece.count;
  }
  return to;
}

std::shared_ptr<const PiecePack> make_pieces(const Lists& a) {
  auto pack = std::make_shared<PiecePack>();
  const int64_t tiles = tile_count(a);
  const int64_t width = std::max<int64_t>(1, (a.cols + tiles - 1) / tiles);
  pack->col.resize(a.indptr[a.rows]);
  uint16_t* to = pack->col.data();
  std::vector<uint64_t> order(kRowChunk);
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
      const int64_t end = t == tiles - 1 ? a.cols : (t + 1) * width;
      append_pieces(a, row, at, end, t == 0, order, *pack);
      to = write_columns(a, row, t * width, first_piece, *pack, to);
      pack->piece_ptr.push_back(pack->piece.size());
      pack->visit_ptr.push_back(to - pack->col.data());
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

const PiecePack& pieces_of(const Plan& plan) {
  return plan.made<PiecePack>([&] { return make_pieces(plan.lists()); });
}

// Each chunk of rows is summed in a scratch panel that stays in cache, then written to Y in its own
// layout: the only time that Y's memory is touched.
template <class T>
void multiply(const Bodies<T>& bodies, const Plan& plan, const T* values, const Product& p,
              const Executor& executor) {
  const PiecePack& pack = pieces_of(plan);
  const Matrix<const T> in = p.in.as<const T>();
  for_panels(in.cols, kPanel / 2, executor,
             [&](int64_t begin, int64_t end, int width, const Executor& inner) {
               const PanelSet<T> x(in.rows, begin, end, width);
               x.pack(bodies.samples, in, inner);
               for_each(inner, x.size() * pack.chunks(), [&](int64_t k) {
                 const int64_t chunk = k % pack.chunks(), row = chunk * kRowChunk;
                 const int64_t rows = std::min(kRowChunk, plan.rows() - row);
                 const Panel<const T>& panel = x.read(k / pack.chunks());
                 const Workspace scratch(sizeof(T) * rows * panel.width);
                 T* y = scratch.template as<T>();
                 bodies.list_panels.multiply(pack.view, values, panel,
                                             static_cast<const T*>(p.bias.data), y, chunk);
                 bodies.samples.activate(p.activation, y, panel.width, panel.width, nullptr, rows);
                 Strided<T> to = samples_from(p.out.as<T>(), x.sample(k / pack.chunks()));
                 to.data += row * to.feature_stride;
                 bodies.samples.unpack({y, rows, panel.width, panel.samples}, to, 0, rows);
               });
             });
}

// Values in the order of transposed lists.
template <class T>
void gather(const Plan& plan, const T* values, T* to, const Executor& executor) {
  const int64_t* source = plan.source();
  for_ranges(executor, plan.nnz(), range_step(executor, plan.nnz()),
             [&](int64_t begin, int64_t end) {
               for (int64_t i = begin; i < end; ++i) to[i] = values[source[i]];
             });
}

template <class T>
void sample(const Bodies<T>& bodies, const Plan& plan, const Product& p, const Executor& executor) {
  // Short strips keep X in L2; longer ones come back less often to a gradient that leaves it.
  constexpr int64_t kShortStrip = 2 * kPanel, kCachedValues = 1 << 20;
  const int64_t strip = plan.nnz() <= kCachedValues ? kShortStrip : kStrip;
  const PiecePack& pack = pieces_of(plan);
  sample_product<T>(bodies.samples, plan, p, executor, strip, kPanel, pack.chunks(),
                    [&](const SampleRows<T>* dy, const PanelSet<T>& x, bool accumulate,
                        int64_t begin, int64_t end) {
                      for (int64_t chunk = begin; chunk < end; ++chunk) {
                        bodies.list_panels.sample(pack.view, dy, x.read(),
                                                  static_cast<int>(x.size()), accumulate,
                                                  static_cast<T*>(p.values.data), chunk);
                      }
                    });
}

struct ListPanels {
  template <class T>
  static bool exists(const Bodies<T>& bodies) {
    return bodies.list_panels.multiply != nullptr;
  }

  // Lists are multiplied with their values where they lie. Transposed ones need another order,
  // which is kept where it stays right, and else made at every product: less than comparing and
  // keeping it, and a training step has new values at each.
  template <class T>
  static void run(const Bodies<T>& bodies, const Plan& plan, const Product& p,
                  const Executor& executor) {
    if (p.op == Op::sddmm) return sample(bodies, plan, p, executor);
    const Plan& lists = plan.oriented(p.op);
    const T* values = static_cast<const T*>(p.values.data);
    if (lists.source() == nullptr) return multiply(bodies, lists, values, p, executor);
    if (p.constant < 0) {
      const Workspace ordered(sizeof(T) * lists.nnz());
      gather(lists, values, ordered.template as<T>(), executor);
      return multiply(bodies, lists, ordered.template as<T>(), p, executor);
    }
    const auto ordered = lists.packed<T>(
        &kListPanels, p, lists.nnz(),
        [&](T* to, const T* constant_values) { gather(lists, constant_values, to, executor); });
    multiply(bodies, lists, ordered->template as<const T>(), p, executor);
  }

  static Terms terms(const CostModel& model, const Summary& s, const Work& work) {
    return panel_terms(model, s, work, static_cast<double>(s.nnz) * divide_up(work.batch, kPanel));
  }
};

}  // namespace

const Variant kListPanels = VariantOf<ListPanels>::row(
    "panels", Layout::lists, {Op::spmm, Op::spmm_t, Op::sddmm}, false, INT64_MAX, false);

}  // namespace spfmt
