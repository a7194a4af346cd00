// The cost model: what it counts, what it predicts, and what is chosen from that.
#include "cost.h"

#include <algorithm>
#include <atomic>
#include <mutex>

#include "../core/variant.h"

namespace spfmt {
namespace {

// Columns that neighbouring rows are compared over: a narrow window of slices.
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

int index_of(const Variant& variant) {
  int i = 0;
  while (kVariants[i] != &variant) ++i;
  return i;
}

// spmm_t of lists is spmm of the transposed lists; of images it is a product of its own.
bool transposes(const Variant& variant, Op op) {
  return variant.layout == Layout::lists && op == Op::spmm_t && !variant.geometry;
}
const Terms& coefficients_of(const CostModel& model, Isa isa, const Variant& variant, Op op) {
  if (transposes(variant, op)) op = Op::spmm;
  return model.kernels[static_cast<int>(isa)][index_of(variant)][static_cast<int>(op)];
}

// The level that serves: this one or the next lower one that has the bodies. -1 where none has.
int serving_level(const Variant& variant, Isa isa, DType dtype) {
  int level = static_cast<int>(isa);
  while (level >= 0 && !variant.exists(static_cast<Isa>(level), dtype)) --level;
  return level;
}

// Positions from the first cell of a kernel to its last.
int64_t reach(const Axis& a) { return (a.kernel - 1) * a.dilation; }

// The level at which dense libraries were seen to compute by Winograd's way, and what they do so.
constexpr Isa kWinograd = Isa::avx512;
bool takes_winograd(const Geometry& g) {
  const auto fits = [](const Axis& a) { return a.kernel == 3 && a.stride == 1 && a.dilation == 1; };
  return fits(g.y) && fits(g.x) && g.groups == 1;
}

thread_local std::string forced_variant;

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
  constexpr int64_t kSample = 8;
  const int64_t slices = divide_up(a.rows, kBandRows), sample = std::min(slices, kSample);
  std::vector<uint8_t> top(divide_up(a.cols, kChunk));
  int64_t steps = 0;
  for (int64_t i = 0; i < sample; ++i) {
    const int64_t row = i * slices / sample * kBandRows;
    steps += slice_steps(a, row, std::min(a.rows, row + kBandRows), top);
  }
  // Grouping rows of like counts, and windows that overlap, save about half of the padding that
  // neighbouring rows would need.
  const double scale = sample > 0 ? static_cast<double>(slices) / sample : 0.0;
  const double full = static_cast<double>(a.indptr[a.rows]) / kBandRows;
  const double vectors = (full + std::max(full, steps * scale)) / 2;
  const int64_t nnz = a.indptr[a.rows];
  const double places = octet_padding(a) * static_cast<double>(nnz);
  return {Layout::lists,
          a.rows,
          a.cols,
          nnz,
          static_cast<int64_t>(vectors),
          static_cast<int64_t>(places)};
}

Summary summarize(const Groups& a) {
  int64_t columns = 0;
  for (int64_t b = 0; b < a.bands; ++b) columns += a.col_end[b] - a.col_begin[b];
  return {Layout::groups, a.rows, a.cols, a.value_ptr[a.bands], columns, 0};
}

Terms terms_of(const CostModel& model, const Work& work, double operands, double stream,
               double multiply, double bytes, double passes) {
  // Terms count vectors of 64 bytes: sixteen elements of float32, eight of float64.
  const double wide = static_cast<double>(size_of(work.dtype)) / size_of(DType::f32);
  return {1.0,
          operands * wide / kLanes,
          stream * wide,
          multiply * wide,
          passes * beyond(bytes, model.l2_bytes),
          passes * beyond(bytes, model.l3_bytes)};
}

Terms row_terms(const CostModel& model, const Summary& s, const Work& work) {
  const auto passes = static_cast<double>(divide_up(work.batch, 4));
  const auto vectors = static_cast<double>(s.vectors), batch = static_cast<double>(work.batch);
  return terms_of(model, work, static_cast<double>(s.rows + s.cols) * batch, vectors * passes,
                  vectors * batch, static_cast<double>(kLanes * size_of(work.dtype)) * vectors,
                  passes);
}

Terms panel_terms(const CostModel& model, const Summary& s, const Work& work, double stream) {
  const auto registers = static_cast<double>(divide_up(work.batch, kLanes));
  const auto nnz = static_cast<double>(s.nnz);
  return terms_of(model, work, static_cast<double>(s.rows + s.cols) * registers * kLanes, stream,
                  nnz * registers, static_cast<double>(size_of(work.dtype)) * nnz,
                  static_cast<double>(divide_up(work.batch, kPanel)));
}

Terms dense_terms(const CostModel& model, int64_t rows, int64_t cols, int64_t batch) {
  const double weights = static_cast<double>(rows) * cols;
  return terms_of(model, {Op::spmm, batch}, static_cast<double>(rows + cols) * batch,
                  weights / kLanes, weights / kLanes * batch, 4 * weights, 1);
}

ImageCounts image_counts(int64_t rows, int64_t cols, const Work& work) {
  const Geometry& g = *work.geometry;
  const bool turned = work.op == Op::spmm_t;
  const auto domain = [&](const Axis& a) { return turned ? divide_up(a.size, a.stride) : a.out; };
  const auto padded = [](const Axis& a) {
    return static_cast<double>(std::max(a.size, (a.out - 1) * a.stride + reach(a) + 1));
  };
  // Numbers of dX that a stride parts are written one by one.
  const double channels =
      static_cast<double>(g.groups) * (cols / g.cells()) * (turned ? g.x.stride : 1);
  return {domain(g.y), domain(g.x), domain(g.x) + divide_up(reach(g.x), g.x.stride),
          channels * padded(g.y) * padded(g.x) + static_cast<double>(rows) * g.y.out * g.x.out};
}

Terms dense_image_terms(const CostModel& model, int64_t rows, int64_t cols, const Work& work,
                        bool winograd) {
  const Geometry& g = *work.geometry;
  const double weights = static_cast<double>(rows) * cols, batch = static_cast<double>(work.batch);
  const double saved = winograd ? 2.25 : 1.0;  // 16 products for 36
  const double outputs = static_cast<double>(g.y.out) * g.x.out * batch;
  return terms_of(model, work, image_counts(rows, cols, work).operands * batch, weights / kLanes,
                  weights / kLanes * outputs / saved,
                  static_cast<double>(size_of(work.dtype)) * weights, 1);
}

double kernel_seconds(const CostModel& model, Isa isa, const Variant& variant,
                      const Summary& summary, const Work& work, int threads) {
  const Terms& unit = coefficients_of(model, isa, variant, work.op);
  const double serial = dot(unit, variant.terms(model, summary, work));
  return with_threads(model, serial, unit[0], model.efficiency, threads);
}

double dense_seconds(const CostModel& model, int64_t rows, int64_t cols, int64_t batch,
                     int threads) {
  const double serial = dot(model.dense, dense_terms(model, rows, cols, batch));
  const double shared =
      with_threads(model, serial, model.dense[0], model.dense_efficiency, threads);
  return std::min(serial, shared);
}

double dense_image_seconds(const CostModel& model, Isa isa, int64_t rows, int64_t cols,
                           const Work& work, int threads) {
  const auto seconds = [&](const Terms& unit, bool winograd) {
    const double serial = dot(unit, dense_image_terms(model, rows, cols, work, winograd));
    return std::min(serial, with_threads(model, serial, unit[0], model.dense_efficiency, threads));
  };
  const Terms& direct = model.dense_images[static_cast<int>(isa)][static_cast<int>(work.op)];
  const double plain = seconds(direct, false);
  return isa == kWinograd && takes_winograd(*work.geometry)
             ? std::min(plain, seconds(model.winograd, true))
             : plain;
}

Choice choose(const CostModel& model, Isa isa, const Summary& summary, const Work& work,
              int threads) {
  Choice best{nullptr, Isa::scalar, 1, 0.0};
  for (const Variant* row : kVariants) {
    const Variant& v = *row;
    const int level = serving_level(v, isa, work.dtype);
    if (v.layout != summary.layout || !v.takes(work) || level < 0) continue;
    if (v.packs && !work.packs && forced_variant != v.name) continue;
    const Isa serving = static_cast<Isa>(level);
    const double alone = kernel_seconds(model, serving, v, summary, work, 1);
    const bool forced = forced_variant == v.name;
    if (forced || best.variant == nullptr || alone <= best.seconds) best = {&v, serving, 1, alone};
    if (forced) break;
  }
  if (threads <= 1) return best;
  const double shared = kernel_seconds(model, best.isa, *best.variant, summary, work, threads);
  return shared < best.seconds ? Choice{best.variant, best.isa, threads, shared} : best;
}

Choice choose(Isa isa, const Plan& plan, const Work& work, int threads) {
  // Turned images are made from the lists themselves.
  const Plan& oriented = work.geometry ? plan : plan.oriented(work.op);
  return choose(cost_model(), isa, oriented.summary(), work, threads);
}

void force_variant(const std::string& name) { forced_variant = name; }

const CostModel& cost_model() {
  InUse& state = in_use();
  if (const CostModel* model = state.now.load(std::memory_order_acquire)) return *model;
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (const CostModel* model = state.now.load(std::memory_order_acquire)) return *model;
  return state.keep(default_cost_model());
}

void set_cost_model(const CostModel& model) {
  InUse& state = in_use();
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.keep(model);
}

std::vector<std::pair<std::string, double*>> coefficients(CostModel& model) {
  std::vector<std::pair<std::string, double*>> out = {
      {"l2_bytes", &model.l2_bytes},
      {"l3_bytes", &model.l3_bytes},
      {"wake_seconds", &model.wake_seconds},
      {"efficiency", &model.efficiency},
      {"dense_efficiency", &model.dense_efficiency},
  };
  const auto add = [&](const std::string& prefix, Terms& terms) {
    for (int i = 0; i < kTerms; ++i) out.emplace_back(prefix + "." + kTermNames[i], &terms[i]);
  };
  add("dense", model.dense);
  add(std::string(name_of(kWinograd)) + ".dense.winograd", model.winograd);
  for (int isa = 0; isa < kIsas; ++isa) {
    const std::string level = name_of(static_cast<Isa>(isa));
    for (const Op op : {Op::spmm, Op::spmm_t, Op::sddmm}) {
      add(level + ".dense." + name_of(op, true), model.dense_images[isa][static_cast<int>(op)]);
    }
    for (size_t i = 0; i < std::size(kVariants); ++i) {
      const Variant& v = *kVariants[i];
      for (const Op op : {Op::spmm, Op::spmm_t, Op::sddmm}) {
        if (transposes(v, op) || !v.does(op)) continue;
        add(level + "." + name_of(v.layout) + "." + name_of(op, v.geometry) + "." + v.name,
            model.kernels[isa][i][static_cast<int>(op)]);
      }
    }
  }
  return out;
}

}  // namespace spfmt
