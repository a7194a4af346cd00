#include "bands.h"

#include <algorithm>
#include <vector>

#include "../core/threads.h"
#include "../core/variant.h"

// Weights are used where the caller keeps them: nothing is packed.
namespace spfmt {
namespace {

// A small batch as its kernels read it: where the caller keeps it, or a copy with each feature's
// samples side by side.
template <class T>
class Samples {
 public:
  Samples(const SampleBodies<T>& bodies, const Matrix<const T>& m) : view_(samples_from(m, 0)) {
    // A feature's samples are as many cache lines, which costs nothing while L1 holds them all and
    // more than the copy does beyond.
    constexpr int64_t kReadInPlace = 28 << 10;
    const int64_t bytes = m.rows * m.cols * static_cast<int64_t>(sizeof(T));
    if (m.cols == 1 || m.col_stride == 1 || bytes <= kReadInPlace) return;
    const int64_t width = m.cols <= kOctet ? m.cols : (m.cols + kLanes - 1) / kLanes * kLanes;
    copy_ = std::make_unique<Workspace>(sizeof(T) * (m.rows * width + kOctet));
    T* data = copy_->template as<T>();
    bodies.pack(view_, {data, m.rows, static_cast<int>(width), static_cast<int>(m.cols)}, 0,
                m.rows);
    view_ = {data, width, 1};
  }
  Strided<const T> operator[](int64_t sample) const {
    return {view_.data + sample * view_.sample_stride, view_.feature_stride, view_.sample_stride};
  }

 private:
  Strided<const T> view_;
  std::unique_ptr<Workspace> copy_;
};

template <class T>
void multiply_rows(const Bodies<T>& bodies, const Groups& a, const Product& p, const Matrix<T>& y,
                   bool quads, const Executor& executor) {
  const Samples<T> x(bodies.samples, p.in.as<const T>());
  const T *values = static_cast<const T*>(p.values.data),
          *bias = static_cast<const T*>(p.bias.data);
  for_ranges(executor, a.bands, range_step(executor, a.bands), [&](int64_t begin, int64_t end) {
    for_parts(p.in.cols, bodies.bands.most_samples, [&](int64_t b, int n) {
      bodies.bands.multiply(a, values, x[b], n, bias, p.activation, samples_from(y, b), quads,
                            begin, end);
    });
  });
}

// Rows come in arbitrary order. Where a sample's features are contiguous, each number would meet
// another cache line, and from four samples on they do not fit L1: a row's samples are then written
// side by side, and transposed in the end. More than eight are the business of panels.
template <class T>
void multiply(const Bodies<T>& bodies, const Groups& a, const Product& p,
              const Executor& executor) {
  const Matrix<T> out = p.out.as<T>();
  if (out.col_stride == 1) {
    const bool quads = out.cols == 4 || out.cols == 8;  // whole ones: no room is needed
    return multiply_rows(bodies, a, p, out, quads, executor);
  }
  if (out.cols < 4 || out.cols > kOctet) {
    return multiply_rows(bodies, a, p, out, false, executor);
  }
  const Workspace rows(sizeof(T) * out.rows * kOctet);
  const Matrix<T> y{rows.template as<T>(), out.rows, out.cols, kOctet, 1};
  multiply_rows(bodies, a, p, y, true, executor);
  const Panel<const T> panel{y.data, out.rows, kOctet, static_cast<int>(out.cols)};
  for_ranges(executor, out.rows, range_step(executor, out.rows), [&](int64_t begin, int64_t end) {
    bodies.samples.unpack(panel, samples_from(out, 0), begin, end);
  });
}

struct ColumnPack {
  std::vector<int64_t> col_ptr, entry_value;
  std::vector<int32_t> entry_band;
  ColumnEntries view;

  int64_t nbytes() const {
    return static_cast<int64_t>(8 * (col_ptr.size() + entry_value.size()) + 4 * entry_band.size());
  }
};

std::shared_ptr<const ColumnPack> make_columns(const Groups& a) {
  auto pack = std::make_shared<ColumnPack>();
  pack->col_ptr.assign(a.cols + 1, 0);
  for (int64_t t = 0; t < a.bands; ++t) {
    for (int64_t j = a.col_begin[t]; j < a.col_end[t]; ++j) ++pack->col_ptr[a.col_indices[j] + 1];
  }
  for (int64_t c = 0; c < a.cols; ++c) pack->col_ptr[c + 1] += pack->col_ptr[c];
  pack->entry_band.resize(pack->col_ptr[a.cols]);
  pack->entry_value.resize(pack->col_ptr[a.cols]);
  std::vector<int64_t> next(pack->col_ptr.begin(), pack->col_ptr.end() - 1);
  for (int64_t t = 0; t < a.bands; ++t) {
    const int64_t rows = a.row_ptr[t + 1] - a.row_ptr[t];
    for (int64_t j = a.col_begin[t]; j < a.col_end[t]; ++j) {
      const int64_t e = next[a.col_indices[j]]++;
      pack->entry_band[e] = static_cast<int32_t>(t);
      pack->entry_value[e] = a.value_ptr[t] + (j - a.col_begin[t]) * rows;
    }
  }
  pack->view = {pack->col_ptr.data(), pack->entry_band.data(), pack->entry_value.data()};
  return pack;
}

// Rows of dY gathered band by band, so that every band's rows are one vector.
template <class T>
std::unique_ptr<Workspace> gather_bands(const Groups& a, const Matrix<const T>& dy) {
  auto buffer = std::make_unique<Workspace>(sizeof(T) * dy.cols * a.bands * kLanes);
  T* to = buffer->template as<T>();
  std::fill_n(to, dy.cols * a.bands * kLanes, T(0));
  for (int64_t b = 0; b < dy.cols; ++b) {
    for (int64_t t = 0; t < a.bands; ++t, to += kLanes) {
      for (int64_t i = a.row_ptr[t]; i < a.row_ptr[t + 1]; ++i) {
        to[i - a.row_ptr[t]] = dy.data[a.row_perm[i] * dy.row_stride + b * dy.col_stride];
      }
    }
  }
  return buffer;
}

template <class T>
void multiply_t(const Bodies<T>& bodies, const Plan& plan, const Product& p,
                const Executor& executor) {
  const Groups& a = plan.groups();
  const ColumnEntries& entries = plan.made<ColumnPack>([&] { return make_columns(a); }).view;
  const T* values = static_cast<const T*>(p.values.data);
  const auto dy = gather_bands(a, p.in.as<const T>());
  for_ranges(executor, a.cols, range_step(executor, a.cols), [&](int64_t begin, int64_t end) {
    for_parts(p.in.cols, 4, [&](int64_t b, int n) {
      bodies.bands.multiply_t(a, entries, values, dy->template as<T>() + b * a.bands * kLanes, n,
                              samples_from(p.out.as<T>(), b), begin, end);
    });
  });
}

struct GroupBands {
  template <class T>
  static bool exists(const Bodies<T>& bodies) {
    return bodies.bands.multiply != nullptr;
  }
  template <class T>
  static void run(const Bodies<T>& bodies, const Plan& plan, const Product& p,
                  const Executor& executor) {
    if (p.op == Op::spmm) return multiply(bodies, plan.groups(), p, executor);
    multiply_t(bodies, plan, p, executor);
  }
  static Terms terms(const CostModel& model, const Summary& s, const Work& work) {
    return row_terms(model, s, work);
  }
};

}  // namespace

const Variant kGroupBands = VariantOf<GroupBands>::row(
    "bands", Layout::groups, {Op::spmm, Op::spmm_t}, false, kSmallBatch, false);

}  // namespace spfmt
