#include "slice_pack.h"

#include <algorithm>
#include <climits>
#include <cstring>
#include <numeric>
#include <type_traits>

#include "../core/threads.h"
#include "row_grouping.h"

namespace spfmt {

int64_t SlicePack::nbytes() const {
  return static_cast<int64_t>(4 * lane_row.size() + 8 * slice_ptr.size() + block->bytes() +
                              code->bytes());
}

namespace {

constexpr int kMostSteps = 4;

// The rows of one slice, walked record by record with one cursor each.
class SliceWalk {
 public:
  SliceWalk(const Lists& lists, const int32_t* lane_row) : lists_(lists) {
    for (int i = 0; i < kLanes; ++i) {
      const int32_t row = lane_row[i];
      at_[i] = row < 0 ? 0 : lists.indptr[row];
      stop_[i] = row < 0 ? 0 : lists.indptr[row + 1];
      fetch(i);
    }
  }

  // The block of the lowest column left, -1 when there is none.
  int32_t next_block() const {
    int32_t lowest = INT32_MAX;
    for (const int32_t column : column_) lowest = std::min(lowest, column);
    return lowest == INT32_MAX ? -1 : lowest / kBlockCols;
  }

  // Takes up to `steps` nonzeros of every lane from the window, and writes 16 codes per step.
  void take(int32_t block, int width, int steps, uint8_t* code) {
    const int64_t first = int64_t{block} * kBlockCols;
    const int64_t end = std::min<int64_t>(first + width, INT32_MAX);
    for (int i = 0; i < kLanes; ++i) {
      for (int k = 0; k < steps; ++k) {
        const bool used = column_[i] < end;
        if (code != nullptr) {
          code[k * kLanes + i] =
              used ? window_code(static_cast<int>(column_[i] - first)) : kPadding;
        }
        if (!used) continue;
        ++at_[i];
        fetch(i);
      }
    }
  }

 private:
  void fetch(int i) { column_[i] = at_[i] < stop_[i] ? lists_.col_indices[at_[i]] : INT32_MAX; }

  const Lists& lists_;
  int64_t at_[kLanes], stop_[kLanes];
  int32_t column_[kLanes];  // the next one; INT32_MAX behind the last
};

int64_t count_records(const Lists& a, const int32_t* lane_row, int width, int steps) {
  SliceWalk walk(a, lane_row);
  int64_t records = 0;
  for (int32_t block; (block = walk.next_block()) >= 0; ++records) {
    walk.take(block, width, steps, nullptr);
  }
  return records;
}

// Nonzeros of each row in each block of 16 columns; at most 16, so a byte holds it.
std::vector<uint8_t> block_counts(const Lists& a, int64_t blocks) {
  std::vector<uint8_t> counts(a.rows * blocks);
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t p = a.indptr[r]; p < a.indptr[r + 1]; ++p) {
      ++counts[r * blocks + a.col_indices[p] / kBlockCols];
    }
  }
  return counts;
}

// Sums over `width` blocks in place, each cut off at the end of its row.
void sum_windows(std::vector<uint8_t>& counts, int64_t blocks, int64_t width) {
  for (size_t row = 0; row < counts.size(); row += blocks) {
    for (int64_t i = 0; i < blocks; ++i) {
      for (int64_t k = i + 1; k < std::min(blocks, i + width); ++k) {
        counts[row + i] = static_cast<uint8_t>(counts[row + i] + counts[row + k]);
      }
    }
  }
}

// Whether all rows have as many nonzeros in each chunk of 32 columns, as n:m has.
bool rows_fill_chunks_equally(const std::vector<uint8_t>& counts, int64_t blocks) {
  const auto chunk = [&](size_t i) {
    return counts[i] + (static_cast<int64_t>(i) % blocks + 1 < blocks ? counts[i + 1] : 0);
  };
  for (size_t i = blocks; i < counts.size(); ++i) {
    if (static_cast<int64_t>(i) % blocks % 2 == 0 && chunk(i) != chunk(i - blocks)) return false;
  }
  return true;
}

// The order in which rows fill the slices. Windows of 48 columns say best what overlapping windows
// of 32 will need: 1.50 places per nonzero at 10 % of 3072 x 768, against 1.52 with chunks of 32.
// Greedy grouping is too slow for many rows, and little use where windows are wide.
std::vector<int32_t> slice_order(const Lists& a, bool streams, const Executor& executor) {
  constexpr int64_t kMostGreedyRows = 8192;
  std::vector<int32_t> order(a.rows);
  std::iota(order.begin(), order.end(), 0);
  const int64_t blocks = (a.cols + kBlockCols - 1) / kBlockCols;
  // Counts take rows x blocks bytes, which may be far more than the nonzeros do.
  if (a.rows * blocks > 16 * a.indptr[a.rows] + (1 << 20)) return order;
  std::vector<uint8_t> counts = block_counts(a, blocks);
  if (rows_fill_chunks_equally(counts, blocks)) return order;
  if (streams || a.rows > kMostGreedyRows) return sort_rows_by_halves(a, executor);
  sum_windows(counts, blocks, 3);
  return group_rows_by_counts(counts.data(), a.rows, blocks);
}

// Rows of a slice ascend, so that neighbours in Y are neighbours in the lanes.
std::vector<int32_t> assign_lanes(const Lists& a, int64_t slices, bool streams,
                                  const Executor& executor) {
  std::vector<int32_t> lane_row = slice_order(a, streams, executor);
  for (int64_t s = 0; s < slices; ++s) {
    const auto first = lane_row.begin() + s * kLanes;
    std::sort(first, lane_row.begin() + std::min(a.rows, (s + 1) * kLanes));
  }
  lane_row.resize(slices * kLanes, -1);
  return lane_row;
}

struct RecordShape {
  int width, steps;
};

// Steps in a sample of the slices.
int64_t sample_steps(const Lists& a, const std::vector<int32_t>& lane_row, int64_t slices,
                     RecordShape shape) {
  constexpr int64_t kSample = 64;
  int64_t records = 0;
  for (int64_t i = 0; i < std::min(slices, kSample); ++i) {
    const int64_t s = slices <= kSample ? i : i * slices / kSample;
    records += count_records(a, lane_row.data() + s * kLanes, shape.width, shape.steps);
  }
  return records * shape.steps;
}

// The shape of records that costs least. More steps share one window's loads, and fill up worse
// where nonzeros are few. Windows of 64 columns pad least, and take two look-ups: they pay where
// the layout streams from memory and they save a tenth of its bytes, or larger batches lose more.
RecordShape choose_shape(const Lists& a, const std::vector<int32_t>& lane_row, int64_t slices,
                         bool streams) {
  // Measured time of a step in records of 1 to 4, relative to the last.
  constexpr double kStepCost[kMostSteps] = {1.3, 1.04, 1.01, 1.0};
  RecordShape best{};
  double best_cost = 0;
  for (const int width : {32, 64}) {
    if (width == 64 && !streams) continue;
    for (int steps = 1; steps <= kMostSteps; ++steps) {
      const auto count = static_cast<double>(sample_steps(a, lane_row, slices, {width, steps}));
      const double bytes = ((4 + 1) * kLanes + 4.0 / steps) * (width == 64 ? 1.1 : 1.0);
      const double cost = count * (streams ? bytes : kStepCost[steps - 1]);
      if (best.width == 0 || cost < best_cost) best = {width, steps}, best_cost = cost;
    }
  }
  return best;
}

// Fills the records of slice s, whose place is known.
void fill_slice(const Lists& a, SlicePack& pack, int64_t s) {
  const Slices& view = pack.view;
  SliceWalk walk(a, pack.lane_row.data() + s * kLanes);
  int64_t q = pack.slice_ptr[s];
  for (int32_t block; (block = walk.next_block()) >= 0; ++q) {
    pack.block->as<int32_t>()[q] = block;
    walk.take(block, view.width, view.steps, pack.code->as<uint8_t>() + q * view.steps * kLanes);
  }
}

}  // namespace

SlicePack make_slices(const Lists& a, int widest, const Executor& executor) {
  constexpr int64_t kCachedNonzeros = 1 << 21;  // 16 MiB of slices
  SlicePack pack;
  const int64_t slices = (a.rows + kLanes - 1) / kLanes;
  const bool streams = widest >= 64 && a.indptr[a.rows] > kCachedNonzeros;
  pack.lane_row = assign_lanes(a, slices, streams, executor);
  const auto [width, steps] = choose_shape(a, pack.lane_row, slices, streams);
  pack.slice_ptr.assign(slices + 1, 0);
  const int64_t step = range_step(executor, slices);
  for_ranges(executor, slices, step, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      pack.slice_ptr[s + 1] = count_records(a, pack.lane_row.data() + s * kLanes, width, steps);
    }
  });
  std::partial_sum(pack.slice_ptr.begin(), pack.slice_ptr.end(), pack.slice_ptr.begin());
  const size_t records = pack.slice_ptr[slices];
  pack.block = std::make_unique<Buffer>(records * sizeof(int32_t));
  pack.code = std::make_unique<Buffer>(records * steps * kLanes);
  pack.view = {slices,
               width,
               steps,
               pack.lane_row.data(),
               pack.slice_ptr.data(),
               pack.block->as<int32_t>(),
               pack.code->as<uint8_t>()};
  for_ranges(executor, slices, step, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) fill_slice(a, pack, s);
  });
  return pack;
}

namespace {

// `value` where mask is all ones, zero where it is none. No branch: nobody could predict it.
template <class T>
T mask_value(T value, int64_t mask) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  Bits bits;
  std::memcpy(&bits, &value, sizeof(T));
  bits &= static_cast<Bits>(mask);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T, class Place>
void pack_slice(const Lists& a, const Slices& slices, int64_t slice, const T* values,
                const Place& place, T* packed) {
  const int64_t per_record = int64_t{slices.steps} * kLanes;
  int64_t at[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const int32_t row = slices.lane_row[slice * kLanes + i];
    at[i] = row < 0 ? 0 : a.indptr[row];
  }
  const int64_t stop = slices.slice_ptr[slice + 1] * per_record;
  for (int64_t k = slices.slice_ptr[slice] * per_record; k < stop; k += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      static_assert(kPadding == 1 << 6);
      const int64_t used = (slices.code[k + i] >> 6 & 1) - int64_t{1};  // 0 or -1
      packed[k + i] = mask_value(values[place(at[i] & used)], used);
      at[i] -= used;
    }
  }
}

}  // namespace

template <class T>
void pack_slice_values(const Lists& a, const Slices& slices, const int64_t* source, const T* values,
                       T* packed, const Executor& executor) {
  for_ranges(executor, slices.slices, range_step(executor, slices.slices),
             [&](int64_t begin, int64_t end) {
               for (int64_t s = begin; s < end; ++s) {
                 if (source) {
                   const auto place = [&](int64_t p) { return source[p]; };
                   pack_slice(a, slices, s, values, place, packed);
                 } else {
                   pack_slice(a, slices, s, values, [](int64_t p) { return p; }, packed);
                 }
               }
             });
}

template void pack_slice_values(const Lists&, const Slices&, const int64_t*, const float*, float*,
                                const Executor&);
template void pack_slice_values(const Lists&, const Slices&, const int64_t*, const double*, double*,
                                const Executor&);

}  // namespace spfmt
