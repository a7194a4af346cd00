// Groups with lanes over samples, up to 64 at a time; for the gradient of the values up to 256.
#pragma once

#include <cstdint>

#include "../core/samples.h"
#include "../core/spfmt.h"

namespace spfmt {

template <class T>
struct GroupPanelBodies {
  // y[r * ldy + b] for the rows of bands [begin, end), b < x.width.
  void (*multiply)(const Groups&, const T* values, const Panel<const T>& x, const T* bias, T* y,
                   int64_t ldy, int64_t begin, int64_t end);
  // dx += A^T dy over all bands, in order; dx starts as zeros.
  void (*multiply_t)(const Groups&, const T* values, const Panel<const T>& dy, const Panel<T>& dx);
  // gradient (+)= dY X^T at bands [begin, end), over one panel of at most kSampleStrip samples.
  void (*sample)(const Groups&, const SampleRows<T>& dy, const Panel<const T>& x, bool accumulate,
                 T* gradient, int64_t begin, int64_t end);
};

}  // namespace spfmt
