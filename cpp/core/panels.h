// Batches cut into panels: packing, unpacking, and the strips that bound the workspace.
#pragma once

#include <algorithm>
#include <vector>

#include "bodies.h"
#include "plan.h"
#include "threads.h"

namespace spfmt {

// Samples that spmm_t of groups and sddmm of lists pack at a time, which bounds their workspace to
// (rows + cols) * kStrip elements.
constexpr int64_t kStrip = 8 * kPanel;

// Panels of up to `width` samples over samples [begin, end) of some matrix, in one buffer.
template <class T>
class PanelSet {
 public:
  PanelSet(int64_t features, int64_t begin, int64_t end, int width) : begin_(begin), width_(width) {
    const int64_t samples = end - begin;
    const int64_t padded = (samples + kLanes - 1) / kLanes * kLanes;
    workspace_ = std::make_unique<Workspace>(sizeof(T) * features * padded);
    T* data = workspace_->template as<T>();
    for (int64_t b = 0; b < samples; b += width) {
      const int n = static_cast<int>(std::min<int64_t>(width, samples - b));
      const int rounded = (n + kLanes - 1) / kLanes * kLanes;
      panels_.push_back({data + features * b, features, rounded, n});
      read_.push_back({data + features * b, features, rounded, n});
    }
  }

  int64_t size() const { return static_cast<int64_t>(panels_.size()); }
  const Panel<T>& operator[](int64_t i) const { return panels_[i]; }
  const Panel<const T>& read(int64_t i) const { return read_[i]; }
  const Panel<const T>* read() const { return read_.data(); }
  int64_t sample(int64_t i) const { return begin_ + i * width_; }

  void pack(const SampleBodies<T>& bodies, const Matrix<const T>& from,
            const Executor& executor) const {
    for_pieces(executor, [&](int64_t i, int64_t f, int64_t stop) {
      bodies.pack(samples_from(from, sample(i)), panels_[i], f, stop);
    });
  }
  void unpack(const SampleBodies<T>& bodies, const Matrix<T>& to, const Executor& executor) const {
    for_pieces(executor, [&](int64_t i, int64_t f, int64_t stop) {
      bodies.unpack(read_[i], samples_from(to, sample(i)), f, stop);
    });
  }

 private:
  template <class Body>
  void for_pieces(const Executor& executor, const Body& body) const {
    constexpr int64_t kFeatures = 256;
    const int64_t features = panels_.empty() ? 0 : panels_[0].features;
    const int64_t pieces = (features + kFeatures - 1) / kFeatures;
    for_each(executor, size() * pieces, [&](int64_t k) {
      const int64_t f = k % pieces * kFeatures;
      body(k / pieces, f, std::min(features, f + kFeatures));
    });
  }

  int64_t begin_;
  int width_;
  std::unique_ptr<Workspace> workspace_;
  std::vector<Panel<T>> panels_;
  std::vector<Panel<const T>> read_;
};

// body(begin, end) over strips of the batch.
template <class Body>
void for_strips(int64_t batch, int64_t strip, const Body& body) {
  for (int64_t b = 0; b < batch; b += strip) body(b, std::min(batch, b + strip));
}

// Narrows panels until every thread has one; the width does not change any sum.
inline int panel_width(int64_t batch, int threads, int least) {
  int width = kPanel;
  while (width > least && (batch + width - 1) / width < threads) width /= 2;
  return width;
}

// body(begin, end, width, executor) over strips of a batch of Y = A X in panels of `width` samples,
// no narrower than `least`, below which the kernel slows down. With a panel for every thread each
// strip is one panel that one thread packs, multiplies and unpacks while it is in that core's
// cache, and workspace is one panel of X and Y per thread. With fewer panels than threads the whole
// batch is one strip, and the threads share the rows.
template <class Body>
void for_panels(int64_t batch, int least, const Executor& executor, const Body& body) {
  int64_t width = panel_width(batch, executor.threads, least);
  const int64_t panels = (batch + width - 1) / width;
  if (panels < executor.threads) return body(int64_t{0}, batch, kPanel, executor);
  for_each(executor, panels, [&](int64_t i) {
    body(i * width, std::min(batch, (i + 1) * width), static_cast<int>(width), serial_executor());
  });
}

// The gradient of the values, strip by strip, in panels of `width` samples. compute(dy, x,
// accumulate, begin, end) does units [begin, end) of the structure for one strip; strips add up in
// order.
template <class T, class Compute>
void sample_product(const SampleBodies<T>& bodies, const Plan& plan, const Product& p,
                    const Executor& executor, int64_t strip, int width, int64_t units,
                    const Compute& compute) {
  const Matrix<const T> in = p.in.as<const T>();
  std::fill_n(static_cast<T*>(p.values.data), in.cols == 0 ? plan.nnz() : 0, T(0));
  for_strips(in.cols, strip, [&](int64_t begin, int64_t end) {
    // Rows of dY are read once per unit, so they may lie anywhere.
    const bool direct = in.col_stride == 1 && (end - begin) % kLanes == 0;
    const PanelSet<T> packed(direct ? 0 : plan.rows(), begin, end, width),
        x(plan.cols(), begin, end, width);
    packed.pack(bodies, in, executor);
    x.pack(bodies, p.in2.as<const T>(), executor);
    std::vector<SampleRows<T>> dy;
    for (int64_t i = 0; i < x.size(); ++i) {
      if (direct) {
        dy.push_back({in.data + x.sample(i), in.row_stride});
      } else {
        dy.push_back({packed[i].data, packed[i].width});
      }
    }
    for_ranges(executor, units, range_step(executor, units),
               [&](int64_t first, int64_t last) { compute(dy.data(), x, begin > 0, first, last); });
  });
}

}  // namespace spfmt
