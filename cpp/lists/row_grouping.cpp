#include "row_grouping.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "../core/samples.h"
#include "../core/threads.h"

namespace spfmt {
namespace {

// Rows compete inside a window, so time stays linear in the number of rows; layers beyond some
// 2048 x 2048 take a smaller one, which bounds the counts looked at, at one or two percent more
// padding.
int64_t window_size(int64_t rows, int64_t chunks) {
  constexpr int64_t kMostCounts = int64_t{1} << 28;  // 0.1 to 0.2 seconds
  const int64_t affordable = kMostCounts / std::max<int64_t>(1, rows * chunks);
  return std::clamp<int64_t>(affordable, kLanes, rows <= 8192 ? 2048 : 256);
}

// Extra steps that a slice with per-chunk maxima `top` needs when `counts` joins. Plain bytes and
// an int, so that compilers vectorise the loop; most of the time of packing is spent in it.
int growth(const uint8_t* counts, const uint8_t* top, int64_t chunks) {
  int extra = 0;
  for (int64_t c = 0; c < chunks; ++c) extra += counts[c] > top[c] ? counts[c] - top[c] : 0;
  return extra;
}

// Fills one slice: the fullest row of the window first (it decides most maxima), then always the
// row that adds the fewest steps; among equals the one that wastes least, then the first.
void fill_slice(const uint8_t* counts, int64_t chunks, const std::vector<int64_t>& total,
                std::vector<int32_t>& window, std::vector<uint8_t>& top,
                std::vector<int32_t>& order) {
  std::fill(top.begin(), top.end(), uint8_t{0});
  for (int lane = 0; lane < kLanes && !window.empty(); ++lane) {
    size_t best = 0;
    int64_t best_cost = INT64_MAX;
    for (size_t i = 0; i < window.size(); ++i) {
      const int32_t r = window[i];
      const int64_t extra = lane == 0 ? 0 : growth(counts + r * chunks, top.data(), chunks);
      const int64_t cost = kLanes * extra - total[r];
      if (cost < best_cost) best_cost = cost, best = i;
    }
    const int32_t r = window[best];
    for (int64_t c = 0; c < chunks; ++c) top[c] = std::max(top[c], counts[r * chunks + c]);
    order.push_back(r);
    window.erase(window.begin() + best);
  }
}

// Length (16 bits), nonzeros left of the middle (16), of a quarter and three quarters counted from
// the cut before (8 each), and the same for eighths (4 each). Saturated where a count is larger:
// only the quality of an order hangs on it.
uint64_t halves_key(const int32_t* first, const int32_t* last, int64_t cols) {
  const int32_t* cut[9];
  for (int i = 0; i <= 8; ++i) {
    cut[i] = std::lower_bound(first, last, static_cast<int32_t>(cols * i / 8));
  }
  uint64_t key = 0;
  const auto append = [&](int from, int to, int bits) {
    const auto count = static_cast<uint64_t>(cut[to] - cut[from]);
    key = key << bits | std::min(count, (uint64_t{1} << bits) - 1);
  };
  append(0, 8, 16);
  append(0, 4, 16);
  for (int i = 0; i < 8; i += 4) append(i, i + 2, 8);
  for (int i = 0; i < 8; i += 2) append(i, i + 1, 4);
  return key;
}

}  // namespace

std::vector<int32_t> sort_rows_by_halves(const Lists& a, const Executor& executor) {
  constexpr int64_t kBlock = 1 << 14;
  std::vector<int32_t> order(a.rows);
  for_ranges(executor, a.rows, kBlock, [&](int64_t begin, int64_t end) {
    std::vector<std::pair<uint64_t, int32_t>> keys;
    for (int64_t r = begin; r < end; ++r) {
      const int32_t* columns = a.col_indices;
      keys.emplace_back(halves_key(columns + a.indptr[r], columns + a.indptr[r + 1], a.cols),
                        static_cast<int32_t>(r));
    }
    std::sort(keys.begin(), keys.end());
    for (int64_t r = begin; r < end; ++r) order[r] = keys[r - begin].second;
  });
  return order;
}

std::vector<int32_t> group_rows_by_counts(const uint8_t* counts, int64_t rows, int64_t chunks) {
  std::vector<int64_t> total(rows);
  for (int64_t r = 0; r < rows; ++r) {
    total[r] = std::accumulate(counts + r * chunks, counts + (r + 1) * chunks, int64_t{0});
  }
  std::vector<int32_t> by_total(rows);
  std::iota(by_total.begin(), by_total.end(), 0);
  std::stable_sort(by_total.begin(), by_total.end(),
                   [&](int32_t a, int32_t b) { return total[a] > total[b]; });
  std::vector<int32_t> order, window;
  order.reserve(rows);
  std::vector<uint8_t> top(chunks);
  const int64_t limit = window_size(rows, chunks);
  for (int64_t next = 0; static_cast<int64_t>(order.size()) < rows;) {
    while (next < rows && static_cast<int64_t>(window.size()) < limit) {
      window.push_back(by_total[next++]);
    }
    fill_slice(counts, chunks, total, window, top, order);
  }
  return order;
}

}  // namespace spfmt
