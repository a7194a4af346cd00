// The cost model: what it counts, what it predicts, and what is chosen from that.
#include "cost.h"

#include <algorithm>
#include <atomic>
#include <mutex>

#include "../lists/octet_pack.h"
#include "../core/plan.h"
#include "../core/bodies.h"

namespace spfmt {
namespace {

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Columns that neighbouring rows are compared over: a narrow window of RowSlices.
constexpr int64_t kChunk = 32;

// Steps that a slice of rows [begin, end) needs: for every chunk of columns as many as the fullest
// of its rows. `top` is zero for every chunk, before and after.
int64_t slice_steps(const Lists& a, int64_t begin, int64_t end, std::vector<uint8_t>& top) {
  int64_t steps = 0;
  for (int64_t r = begin; r < end; ++r) {
    int64_t run_chunk = -1;
    int run = 0;
    for (int64_t p = a.indptr[r]; p < a.indptr[r + 1]; ++p) {
      const int64_t chunk = a.col_indices[p] / kChunk;
      run = chunk == run_chunk ? run + 1 : 1;
      run_chunk = chunk;
      if (run > top[chunk]) ++top[chunk], ++steps;
    }
  }
  for (int64_t p = a.indptr[begin]; p < a.indptr[end]; ++p) top[a.col_indices[p] / kChunk] = 0;
  return steps;
}

// Bytes of one pass over `bytes` that a cache of `size` does not hold: none while they fit, all
// from twice the size on, for a cyclic walk evicts what it will need next.
double beyond(double bytes, double size) {
  return size > 0 ? bytes * std::clamp(bytes / size - 1.0, 0.0, 1.0) : bytes;
}

Terms terms_of(const CostModel& model, double operands, double stream, double multiply,
               double bytes, double passes) {
  return {1.0,
          operands / kRowTile,
          stream,
          multiply,
          passes * beyond(bytes, model.l2_bytes),
          passes * beyond(bytes, model.l3_bytes)};
}

double dot(const Terms& a, const Terms& b) {
  double sum = 0;
  for (int i = 0; i < kTerms; ++i) sum += a[i] * b[i];
  return sum;
}

// A call's own time is not shared between threads.
double with_threads(const CostModel& model, double seconds, double call, double efficiency,
                    int threads) {
  if (threads <= 1) return seconds;
  return call + (seconds - call) / (1 + (threads - 1) * efficiency) + model.wake_seconds;
}

// spmm_t of lists is spmm of the transposed lists.
const Terms& coefficients_of(const CostModel& model, Isa isa, Op op, Variant variant,
                             Layout layout) {
  if (layout == Layout::lists && op == Op::spmm_t) op = Op::spmm;
  return model.kernels[static_cast<int>(isa)][static_cast<int>(layout)][static_cast<int>(op)]
                      [static_cast<int>(variant)];
}

thread_local std::optional<Variant> forced_variant;

// Models that were in use stay: a product on another thread may still be reading one.
struct InUse {
  std::mutex mutex;
  std::vector<std::unique_ptr<const CostModel>> kept;
  std::atomic<const CostModel*> now{nullptr};

  const CostModel& keep(const CostModel& model) {
    kept.push_back(std::make_unique<const CostModel>(model));
    now.store(kept.back().get(), std::memory_order_release);
    return *kept.back();
  }
};

InUse& in_use() {
  static InUse& state = *new InUse;  // outlives every thread
  return state;
}

}  // namespace

const std::array<const char*, kTerms> kTermNames = {"call",     "operands",  "stream",
                                                    "multiply", "beyond_l2", "beyond_l3"};

Summary summarize(const Lists& a) {
  constexpr int64_t kSample = 32;
  const int64_t slices = divide_up(a.rows, kRowTile), sample = std::min(slices, kSample);
  std::vector<uint8_t> top(divide_up(a.cols, kChunk));
  int64_t steps = 0;
  for (int64_t i = 0; i < sample; ++i) {
    const int64_t row = i * slices / sample * kRowTile;
    steps += slice_steps(a, row, std::min(a.rows, row + kRowTile), top);
  }
  // Grouping rows of like counts, and windows that overlap, save about half of the padding that
  // neighbouring rows would need.
  const double scale = sample > 0 ? static_cast<double>(slices) / sample : 0.0;
  const double full = static_cast<double>(a.indptr[a.rows]) / kRowTile;
  const double vectors = (full + std::max(full, steps * scale)) / 2;
  const int64_t nnz = a.indptr[a.rows];
  const double places = octet_padding(a) * static_cast<double>(nnz);
  return {Layout::lists,           a.rows, a.cols, nnz, static_cast<int64_t>(vectors),
          static_cast<int64_t>(places)};
}

Summary summarize(const Groups& a) {
  int64_t columns = 0;
  for (int64_t t = 0; t < a.tiles; ++t) columns += a.col_end[t] - a.col_begin[t];
  return {Layout::groups, a.rows, a.cols, a.value_ptr[a.tiles], columns, 0};
}

const Summary& summary_of(const Plan& plan, Op op) {
  const bool transposed = op == Op::spmm_t && plan.layout() == Layout::lists;
  return transposed ? plan.transpose().plan->summary() : plan.summary();
}

Terms kernel_terms(const CostModel& model, Variant variant, const Summary& s, int64_t batch) {
  const double features = static_cast<double>(s.rows + s.cols);
  const double nnz = static_cast<double>(s.nnz), vectors = static_cast<double>(s.vectors);
  if (variant == Variant::tokens) {
    const double passes = static_cast<double>(divide_up(batch, 4));
    return terms_of(model, features * batch, vectors * passes, vectors * batch, 64 * vectors,
                    passes);
  }
  if (variant == Variant::octets) {
    constexpr double kBytes = 6;  // a weight and its offset
    const double octets = static_cast<double>(divide_up(batch, kOctet));
    const double places = static_cast<double>(s.octet_places);
    return terms_of(model, features * octets * kOctet, 0, places * octets, kBytes * places, 1);
  }
  const double registers = static_cast<double>(divide_up(batch, kRowTile));
  const double passes = static_cast<double>(divide_up(batch, kPanel));
  const double stream = s.layout == Layout::lists ? nnz * passes : vectors * registers;
  return terms_of(model, features * registers * kRowTile, stream, nnz * registers, 4 * nnz, passes);
}

Terms dense_terms(const CostModel& model, int64_t rows, int64_t cols, int64_t batch) {
  const double weights = static_cast<double>(rows) * cols;
  return terms_of(model, static_cast<double>(rows + cols) * batch, weights / kRowTile,
                  weights / kRowTile * batch, 4 * weights, 1);
}

double kernel_seconds(const CostModel& model, Isa isa, Op op, Variant variant,
                      const Summary& summary, int64_t batch, int threads) {
  const Terms& unit = coefficients_of(model, isa, op, variant, summary.layout);
  const double serial = dot(unit, kernel_terms(model, variant, summary, batch));
  return with_threads(model, serial, unit[0], model.efficiency, threads);
}

double dense_seconds(const CostModel& model, int64_t rows, int64_t cols, int64_t batch,
                     int threads) {
  const double serial = dot(model.dense, dense_terms(model, rows, cols, batch));
  const double shared =
      with_threads(model, serial, model.dense[0], model.dense_efficiency, threads);
  return std::min(serial, shared);
}

bool has_variant(Layout layout, Op op, Variant variant, int64_t batch) {
  if (variant == Variant::panels) return true;
  if (variant == Variant::octets && layout != Layout::lists) return false;
  return op != Op::sddmm && batch <= kMostTokens;
}

Choice choose(const CostModel& model, Isa isa, Op op, const Summary& summary, int64_t batch,
              int threads) {
  const auto seconds = [&](Variant v, int n) {
    return kernel_seconds(model, isa, op, v, summary, batch, n);
  };
  const auto exists = [&](Variant v) { return has_variant(summary.layout, op, v, batch); };
  Choice best{Variant::panels, 1, seconds(Variant::panels, 1)};
  for (const Variant v : {Variant::octets, Variant::tokens}) {
    if (!exists(v)) continue;
    const double alone = seconds(v, 1);
    if (alone <= best.seconds) best = {v, 1, alone};
  }
  if (forced_variant && exists(*forced_variant)) {
    best = {*forced_variant, 1, seconds(*forced_variant, 1)};
  }
  if (threads <= 1) return best;
  const double shared = seconds(best.variant, threads);
  return shared < best.seconds ? Choice{best.variant, threads, shared} : best;
}

Choice choose(Isa isa, Op op, const Plan& plan, int64_t batch, int threads) {
  return choose(cost_model(), isa, op, summary_of(plan, op), batch, threads);
}

void force_variant(std::optional<Variant> forced) { forced_variant = forced; }

const CostModel& cost_model() {
  InUse& state = in_use();
  if (const CostModel* model = state.now.load(std::memory_order_acquire)) return *model;
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (const CostModel* model = state.now.load(std::memory_order_acquire)) return *model;
  return state.keep(read_calibration(cost_file()).model);
}

void set_cost_model(const CostModel& model) {
  InUse& state = in_use();
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.keep(model);
}

}  // namespace spfmt
