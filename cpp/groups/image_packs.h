// Groups made ready for a geometry: which number of a frame each column meets.
#pragma once

#include <algorithm>
#include <vector>

#include "../core/images.h"
#include "../core/variant.h"
#include "images.h"

namespace spfmt {

// Rows of the structure in one group of the convolution.
inline int64_t rows_of_group(const Groups& a, const Geometry& g) {
  return std::max<int64_t>(1, a.rows / g.groups);
}

// Whether the rows of a band belong to several groups of the convolution, which see other channels.
inline bool spans_groups(const Groups& a, const Geometry& g) {
  const int64_t rows = rows_of_group(a, g);
  for (int64_t t = 0; g.groups > 1 && t < a.bands; ++t) {
    for (int64_t i = a.row_ptr[t]; i < a.row_ptr[t + 1]; ++i) {
      if (a.row_perm[i] / rows != a.row_perm[a.row_ptr[t]] / rows) return true;
    }
  }
  return false;
}

inline std::vector<BandLanes> lanes_of(const Groups& a, const Geometry& g) {
  std::vector<BandLanes> bands;
  for (int64_t t = 0; t < a.bands; ++t) {
    BandLanes lanes{a.row_perm[a.row_ptr[t]] / rows_of_group(a, g), {}};
    std::fill_n(lanes.row, kBandRows, -1);
    std::copy(a.row_perm + a.row_ptr[t], a.row_perm + a.row_ptr[t + 1], lanes.row);
    bands.push_back(lanes);
  }
  return bands;
}

// A geometry made ready for products with X.
struct ForwardPack {
  std::vector<BandLanes> bands;
  Frame frame;
  std::vector<int32_t> offset;  // (col_count)

  ForwardPack(const Groups& a, const Geometry& g, int64_t images, const FrameRoom& room)
      : bands(lanes_of(a, g)),
        frame(g, false, g.groups * (a.cols / g.cells()), 1, images, room),
        offset(a.col_count) {
    for (int64_t j = 0; j < a.col_count; ++j) {
      const int64_t c = a.col_indices[j] / g.cells(), cell = a.col_indices[j] % g.cells();
      offset[j] = static_cast<int32_t>(frame.offset(c, cell / g.x.kernel, cell % g.x.kernel));
    }
  }
  // From the first group's channels to those of another.
  int64_t group_offset(int64_t group, const Geometry& g) const {
    return group * (frame.channels / g.groups) * frame.channel * frame.images;
  }
  int64_t nbytes() const {
    return static_cast<int64_t>(sizeof(BandLanes) * bands.size() + 4 * offset.size());
  }
};

// A geometry made ready for dX: what every number of it is the sum of, by channel and phase.
struct TurnedPack {
  std::vector<BandLanes> bands;
  Frame frame;
  std::vector<int64_t> ptr;
  std::vector<TurnedEntry> entry;

  TurnedPack(const Groups& a, const Geometry& g, int64_t images, const FrameRoom& room)
      : bands(lanes_of(a, g)), frame(g, true, a.bands, kBandRows, images, room) {
    const int64_t outputs = g.groups * (a.cols / g.cells()) * phases();
    ptr.assign(outputs + 1, 0);
    for_entries(a, g, [&](int64_t output, const TurnedEntry&) { ++ptr[output + 1]; });
    for (int64_t i = 0; i < outputs; ++i) ptr[i + 1] += ptr[i];
    entry.resize(ptr[outputs]);
    std::vector<int64_t> next(ptr.begin(), ptr.end() - 1);
    for_entries(a, g, [&](int64_t output, const TurnedEntry& e) { entry[next[output]++] = e; });
  }
  int64_t phases() const {
    return static_cast<int64_t>(frame.y.phases.size() * frame.x.phases.size());
  }
  int64_t nbytes() const {
    return static_cast<int64_t>(sizeof(BandLanes) * bands.size() + 8 * ptr.size() +
                                sizeof(TurnedEntry) * entry.size());
  }

 private:
  template <class Body>
  void for_entries(const Groups& a, const Geometry& g, const Body& body) const {
    const auto across = static_cast<int64_t>(frame.x.phases.size());
    for (int64_t t = 0; t < a.bands; ++t) {
      const int64_t rows = a.row_ptr[t + 1] - a.row_ptr[t];
      const int64_t first = bands[t].group * (a.cols / g.cells());
      for (int64_t j = a.col_begin[t]; j < a.col_end[t]; ++j) {
        const int64_t c = a.col_indices[j] / g.cells(), cell = a.col_indices[j] % g.cells();
        const int64_t ky = cell / g.x.kernel, kx = cell % g.x.kernel;
        if (frame.y.phase[ky] < 0 || frame.x.phase[kx] < 0) continue;
        const int64_t phase = frame.y.phase[ky] * across + frame.x.phase[kx];
        body((first + c) * phases() + phase,
             {a.value_ptr[t] + (j - a.col_begin[t]) * rows,
              static_cast<int32_t>(frame.offset(t, ky, kx)), static_cast<int32_t>(rows)});
      }
    }
  }
};

}  // namespace spfmt
