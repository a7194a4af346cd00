// Groups with lanes over the rows of a band, for small batches.
#pragma once

#include <cstdint>

#include "../core/samples.h"
#include "../core/spfmt.h"

namespace spfmt {

// Groups seen from the columns: column c occurs at entries col_ptr[c] .. col_ptr[c + 1]; entry e is
// a column of band entry_band[e] whose values start at entry_value[e].
struct ColumnEntries {
  const int64_t* col_ptr;
  const int32_t* entry_band;
  const int64_t* entry_value;
};

template <class T>
struct BandBodies {
  // n samples (1 .. most_samples), x and y with any strides; bands [begin, end). `quads` where a
  // row's samples are contiguous in y: n rounded up to four are written, so that parts of a batch
  // go in order, and eight samples of room are enough for all parts of up to eight.
  int most_samples;
  void (*multiply)(const Groups&, const T* values, Strided<const T> x, int n, const T* bias,
                   Activation, Strided<T> y, bool quads, int64_t begin, int64_t end);
  // dy_bands[(b * bands + t) * 16 + i]: dY by band, zeros behind a short band; columns [begin,
  // end).
  void (*multiply_t)(const Groups&, const ColumnEntries&, const T* values, const T* dy_bands, int n,
                     Strided<T> dx, int64_t begin, int64_t end);
};

}  // namespace spfmt
