#include "octets.h"

#include <algorithm>
#include <vector>

#include "../core/threads.h"
#include "../core/variant.h"

namespace spfmt {
namespace {

// An octet of 768 columns is 24 KiB, which leaves room in L1 for what streams past it.
constexpr int64_t kTileCols = 768;
// Offsets are 16 bits wide.
constexpr int64_t kMostTileCols = UINT16_MAX / kOctet;
// Shorter pieces than this are mostly padding, and loading and storing of sums.
constexpr int64_t kLeastPerPiece = 16;
constexpr int kStep = kQuadRows * kStepTerms;

// Nonzeros [start, stop) of the lists, all of one row of a chunk.
struct OctetPiece {
  int64_t start, stop;
  uint16_t row;
};

struct OctetPack {
  std::vector<int64_t> quad_ptr, step_ptr;
  std::vector<uint16_t> row, offset;
  std::vector<OctetPiece> piece;  // four per quad
  Octets view;

  // Places for values, padding included.
  int64_t places() const { return static_cast<int64_t>(offset.size()); }
  int64_t nbytes() const {
    return static_cast<int64_t>(8 * (quad_ptr.size() + step_ptr.size()) +
                                2 * (row.size() + offset.size()) +
                                sizeof(OctetPiece) * piece.size());
  }
};

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
    const int32_t* stop = a.col_indices + a.indptr[first_row + i + 1];
    at[i] = std::lower_bound(a.col_indices + start, stop, column) - a.col_indices;
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

std::shared_ptr<const OctetPack> make_octets(const Lists& a) {
  auto pack = std::make_shared<OctetPack>();
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

// Values in the order of the steps, zero where there are none. `source` (or null) maps a position
// of the lists to a place in `values`.
template <class T>
void pack_values(const OctetPack& pack, const int64_t* source, const T* values, T* packed,
                 const Executor& executor) {
  const Octets& a = pack.view;
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
              used ? values[source ? source[p] : p] : T(0);
        }
      }
    }
  });
}

// Eight samples of X, tile after tile, a feature of zeros behind each.
template <class T>
void stage(const SampleBodies<T>& samples, const Octets& a, Strided<const T> x, int64_t cols, int n,
           T* to) {
  for (int64_t t = 0; t < a.tiles; ++t, to += (a.width + 1) * kOctet) {
    const int64_t first = std::min(cols, t * a.width), features = std::min(a.width, cols - first);
    samples.pack({x.data + first * x.feature_stride, x.feature_stride, x.sample_stride},
                 {to, features, kOctet, n}, 0, features);
    std::fill_n(to + a.width * kOctet, kOctet, T(0));
  }
}

struct ListOctets {
  template <class T>
  static bool exists(const Bodies<T>& bodies) {
    return bodies.octets.multiply != nullptr;
  }

  template <class T>
  static void run(const Bodies<T>& bodies, const Plan& plan, const Product& p,
                  const Executor& executor) {
    const Plan& lists = plan.oriented(p.op);
    const OctetPack& pack = lists.made<OctetPack>([&] { return make_octets(lists.lists()); });
    const Octets& a = pack.view;
    const auto packed = lists.packed<T>(
        &kListOctets, p, pack.places(),
        [&](T* to, const T* values) { pack_values(pack, lists.source(), values, to, executor); });
    const Matrix<const T> in = p.in.as<const T>();
    const Matrix<T> out = p.out.as<T>();
    const int64_t octets = divide_up(in.cols, kOctet);
    const int64_t staged = a.tiles * (a.width + 1) * kOctet;  // elements per octet
    const Workspace x(sizeof(T) * staged * octets);
    const auto samples = [&](int64_t o) {
      return static_cast<int>(std::min<int64_t>(kOctet, in.cols - o * kOctet));
    };
    for (int64_t o = 0; o < octets; ++o) {
      stage(bodies.samples, a, samples_from(in, o * kOctet), in.rows, samples(o),
            x.as<T>() + o * staged);
    }
    const T* bias = static_cast<const T*>(p.bias.data);
    for_each(executor, a.chunks, [&](int64_t chunk) {
      const int64_t row = chunk * kOctetRows;
      const int rows = static_cast<int>(std::min(kOctetRows, lists.rows() - row));
      for (int64_t o = 0; o < octets; ++o) {
        Strided<T> y = samples_from(out, o * kOctet);
        y.data += row * out.row_stride;
        bodies.octets.multiply(a, packed->template as<T>(), x.as<T>() + o * staged, samples(o),
                               chunk, rows, bias ? bias + row : nullptr, p.activation, y);
      }
    });
  }

  static Terms terms(const CostModel& model, const Summary& s, const Work& work) {
    const auto octets = static_cast<double>(divide_up(work.batch, kOctet));
    const auto places = static_cast<double>(s.octet_places);
    const double bytes = (size_of(work.dtype) + 2) * places;  // weights and their offsets
    return terms_of(model, work, static_cast<double>(s.rows + s.cols) * octets * kOctet, 0,
                    places * octets, bytes, 1);
  }
};

}  // namespace

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

const Variant kListOctets = VariantOf<ListOctets>::row(
    "octets", Layout::lists, {Op::spmm, Op::spmm_t}, false, kSmallBatch, true);

}  // namespace spfmt
