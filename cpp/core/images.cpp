#include "images.h"

#include <climits>
#include <memory>
#include <numeric>
#include <stdexcept>

namespace spfmt {
namespace {

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

}  // namespace

FrameAxis::FrameAxis(const Axis& axis, bool turned)
    : source(turned ? axis.out : axis.size),
      step(turned ? 1 : axis.stride),
      domain(turned ? count_of(axis.size, axis.stride, 0) : axis.out),
      before(INT64_MIN),
      after(INT64_MIN) {
  for (int64_t k = 0; k < axis.kernel; ++k) {
    const int64_t at = k * axis.dilation - axis.padding, whole = floor_div(at, axis.stride);
    const int64_t far = turned ? -whole : whole;
    shift.push_back(static_cast<int>(far));
    phase.push_back(static_cast<int>(at - whole * axis.stride));
    before = std::max(before, -far);
    after = std::max(after, far);
  }
  phases = phase;
  std::sort(phases.begin(), phases.end());
  phases.erase(std::unique(phases.begin(), phases.end()), phases.end());
  // Turned, a phase is one of outputs, of which a small map may have none.
  const auto none = std::lower_bound(phases.begin(), phases.end(), axis.size);
  if (turned) phases.erase(none, phases.end());
  for (int& r : phase) {
    const auto place = std::lower_bound(phases.begin(), phases.end(), r);
    r = place == phases.end() ? -1 : static_cast<int>(place - phases.begin());
  }
}

int64_t FrameAxis::width() const {
  const int64_t first = step == 1 ? 0 : phases.front();
  const int64_t held = std::min(count_of(source, step, first), domain + after);
  // What is read behind the end of a line are the zeros in front of the next one. Results lie in
  // lines as long.
  const int64_t read = domain + after + std::min<int64_t>(before, 0);
  return std::max({int64_t{1}, domain, before + held, read});
}

FrameAxis::Line FrameAxis::line(int64_t width, int64_t phase) const {
  const int64_t zeros = std::clamp<int64_t>(before, 0, width),
                first = std::max<int64_t>(-before, 0);
  const int64_t held = count_of(source, step, phase) - first;
  return {zeros, first, std::clamp<int64_t>(held, 0, width - zeros)};
}

static bool has_all(const FrameAxis& axis, const Axis& of) {
  return static_cast<int64_t>(axis.phases.size()) == std::min(of.stride, of.size);
}

Frame::Frame(const Geometry& g, bool turn, int64_t channel_count, int64_t element_count,
             int64_t image_count, const FrameRoom& room)
    : y(g.y, turn),
      x(g.x, turn),
      turned(turn),
      channels(channel_count),
      element(element_count),
      images(image_count),
      rows(y.domain),
      width(x.width()),
      in_place(room.in_place && pointwise() &&
               channels <= INT32_MAX / std::max<int64_t>(1, y.source * x.source)),
      whole(!turned || (has_all(y, g.y) && has_all(x, g.x))) {
  // In floating point: sizes that do not fit must not overflow before they are refused.
  const double least = static_cast<double>(channels) * maps() * images * element * width *
                       (y.before + y.after + 1.0);
  if (least > INT32_MAX / 2) throw std::length_error("images too large for offsets of 32 bits");
  const int64_t numbers_of_row = (channels * maps() * element + room.beside) * width * images;
  const int64_t fitting = room.budget / std::max<int64_t>(1, numbers_of_row * room.bytes);
  cut(fitting);
  map = (rows + y.before + y.after) * width + std::max<int64_t>(x.before, 0);
  // Channels a power of two apart would meet in one cache set.
  if (map * images * element % 64 == 0) map += divide_up(16, images * element);
  if (in_place) map = y.source * x.source;
  channel = maps() * map;
  if (channels * channel > INT32_MAX / (images * element)) {
    throw std::length_error("images too large for offsets of 32 bits");
  }
}

// Into strips of about `fitting` positions down, all alike. Few rows with many zeros or neighbours
// around them would be filled over and over.
void Frame::cut(int64_t fitting) {
  if (rows < 2) return;
  const int64_t around = y.before + y.after, least = std::clamp<int64_t>(around, 1, rows);
  rows = std::clamp<int64_t>(fitting - around, least, rows);
  rows = divide_up(y.domain, divide_up(y.domain, rows));
  // Where maps are whole vectors their strips are, too.
  const int64_t whole = kLanes / std::gcd<int64_t>(kLanes, width);
  if (in_place) rows = std::min(y.domain, divide_up(rows, whole) * whole);
}

bool Frame::pointwise() const {
  const auto plain = [](const FrameAxis& a) {
    return a.before == 0 && a.after == 0 && a.step == 1 && a.phases.size() <= 1 &&
           a.source == a.domain;
  };
  return plain(y) && plain(x) && images == 1 && element == 1;
}

int64_t Frame::numbers() const {
  // The last tile may be taller or wider than what is left of the domain.
  constexpr int64_t kTallest = 4, kWidest = 32;
  return (channels * channel + kTallest * width + kWidest) * images * element;
}

int64_t Frame::offset(int64_t c, int64_t ky, int64_t kx) const {
  const auto across = static_cast<int64_t>(x.phases.size());
  const int64_t place = turned ? 0 : y.phase[ky] * across + x.phase[kx];
  const int64_t position = (y.shift[ky] + y.before) * width + x.shift[kx] + x.before;
  return (c * channel + place * map + position) * images * element;
}

Frame Frame::of_outputs(const Geometry& g, int64_t channel_count, int64_t element_count) const {
  Frame f = *this;
  f.y = FrameAxis({g.y.out, g.y.out}, true);
  f.x = FrameAxis({g.x.out, g.x.out}, true);
  f.turned = true;
  f.channels = channel_count;
  f.element = element_count;
  f.in_place = false;
  f.channel = f.map = rows * width + divide_up(kLanes, images) + 1;  // vectors end behind a map
  return f;
}

Rows source_rows(const Frame& f, const Unit& unit) {
  const int64_t last = f.y.step == 1 ? 0 : f.y.phases.back();
  const int64_t begin = f.y.step * (unit.row - f.y.before);
  const int64_t end = f.y.step * (unit.row + unit.rows - 1 + f.y.after) + last + 1;
  return {std::clamp<int64_t>(begin, 0, f.y.source), std::clamp<int64_t>(end, 0, f.y.source)};
}

namespace {

bool planar(const View& v, int64_t width) { return v.x_stride == 1 || width <= 1; }

}  // namespace

bool is_pointwise(const Geometry& g, bool turned) {
  const auto plain = [&](const Axis& a) {
    return a.kernel == 1 && a.padding == 0 && (turned || (a.stride == 1 && a.size == a.out));
  };
  return plain(g.y) && plain(g.x);
}

bool is_readable(const View& v, const Geometry& g, bool turned) {
  const int64_t height = turned ? g.y.out : g.y.size, width = turned ? g.x.out : g.x.size;
  return is_pointwise(g, turned) && planar(v, width) && (v.y_stride == width || height <= 1) &&
         (v.row_stride == height * width || v.rows <= 1);
}

namespace {

// body(first, pixels, from) over runs of pixels of the rows that lie `x_stride` apart: all rows in
// one where they follow each other.
template <class Body>
void for_runs(const View& v, int64_t width, Rows rows, const Body& body) {
  const int64_t count = rows.end - rows.begin;
  if (v.y_stride == width * v.x_stride) {
    if (count > 0) body(int64_t{0}, count * width, rows.begin * v.y_stride);
    return;
  }
  for (int64_t r = 0; r < count; ++r) body(r * width, width, (rows.begin + r) * v.y_stride);
}

// Pixels [0, n) of a run, whose channels lie side by side, to planes `plane` apart.
template <class T>
void split_pixels(const ImageBodies<T>& bodies, const T* from, int64_t x_stride, int64_t n,
                  int64_t channels, T* to, int64_t plane) {
  for (int64_t p = 0; p < n; p += kTogether) {
    const int lanes = static_cast<int>(std::min<int64_t>(kTogether, n - p));
    const T* pixel[kTogether] = {};
    for (int i = 0; i < lanes; ++i) pixel[i] = from + (p + i) * x_stride;
    bodies.transpose(pixel, channels, to + p, plane, lanes);
  }
}

template <class T>
void to_planes(const ImageBodies<T>& bodies, const View& v, const T* from, int64_t width, Rows rows,
               T* to, int64_t plane) {
  for_runs(v, width, rows, [&](int64_t first, int64_t n, int64_t at) {
    if (v.row_stride == 1) {
      return split_pixels(bodies, from + at, v.x_stride, n, v.rows, to + first, plane);
    }
    for (int64_t c = 0; c < v.rows; ++c) {
      const T* row = from + at + c * v.row_stride;
      for (int64_t p = 0; p < n; ++p) to[c * plane + first + p] = row[p * v.x_stride];
    }
  });
}

// Channels [begin, end), planes `plane` apart, to the caller's memory.
template <class T>
void from_planes(const ImageBodies<T>& bodies, const View& v, const T* from, int64_t plane,
                 int64_t width, Rows rows, T* to, int64_t begin, int64_t end) {
  for_runs(v, width, rows, [&](int64_t first, int64_t n, int64_t at) {
    for (int64_t c = begin; c < end; c += kTogether) {
      const int lanes = static_cast<int>(std::min<int64_t>(kTogether, end - c));
      if (v.row_stride == 1) {
        const T* row[kTogether] = {};
        for (int i = 0; i < lanes; ++i) row[i] = from + (c + i) * plane + first;
        bodies.transpose(row, n, to + at + c, v.x_stride, lanes);
        continue;
      }
      for (int i = 0; i < lanes; ++i) {
        const T* row = from + (c + i) * plane + first;
        T* pixel = to + at + (c + i) * v.row_stride;
        for (int64_t p = 0; p < n; ++p) pixel[p * v.x_stride] = row[p];
      }
    }
  });
}

// The planes of a unit's images: where the caller keeps them, or in a copy of these rows.
template <class P, class T>
std::vector<P> planes_of(const View& v, T* data, T* copy, int64_t width, Rows rows, int count) {
  const int64_t plane = (rows.end - rows.begin) * width;
  std::vector<P> planes;
  for (int i = 0; i < count; ++i) {
    if (copy == nullptr) {
      planes.push_back({data + i * v.col_stride, v.row_stride, v.y_stride});
    } else {
      planes.push_back({copy + i * v.rows * plane - rows.begin * width, plane, width});
    }
  }
  return planes;
}

// Room for that copy where the caller's memory is not planar.
template <class T>
std::unique_ptr<Workspace> room_for(const View& v, int64_t width, Rows rows, int count) {
  if (planar(v, width)) return nullptr;
  return std::make_unique<Workspace>(sizeof(T) * count * v.rows * (rows.end - rows.begin) * width);
}

}  // namespace

template <class T>
PlanarImages<T>::PlanarImages(const ImageBodies<T>& bodies, const View& v, int64_t width, Rows rows,
                              const Unit& unit, const Executor& executor)
    : copy_(room_for<T>(v, width, rows, unit.count)) {
  const T* data = static_cast<const T*>(v.data) + unit.image * v.col_stride;
  T* to = copy_ ? copy_->template as<T>() : nullptr;
  planes_ = planes_of<Planes<const T>, const T>(v, data, to, width, rows, unit.count);
  if (!copy_) return;
  const int64_t plane = (rows.end - rows.begin) * width;
  const int64_t height = rows.end - rows.begin;
  const int64_t parts = std::clamp<int64_t>(executor.threads / unit.count, 1, height);
  for_each(executor, unit.count * parts, [&](int64_t i) {
    const int64_t image = i / parts, part = i % parts, first = height * part / parts;
    const Rows some{rows.begin + first, rows.begin + height * (part + 1) / parts};
    to_planes(bodies, v, data + image * v.col_stride, width, some,
              to + image * v.rows * plane + first * width, plane);
  });
}

template <class T>
PlanarResult<T>::PlanarResult(const View& v, int64_t width, Rows rows, const Unit& unit)
    : view_(v),
      width_(width),
      rows_(rows),
      image_(unit.image),
      copy_(room_for<T>(v, width, rows, unit.count)) {
  T* data = static_cast<T*>(v.data) + unit.image * v.col_stride;
  T* copy = copy_ ? copy_->template as<T>() : nullptr;
  planes_ = planes_of<Planes<T>, T>(v, data, copy, width, rows, unit.count);
}

template <class T>
void PlanarResult<T>::clear(const Executor& executor) const {
  for_ranges(executor, view_.rows, range_step(executor, view_.rows), [&](int64_t c, int64_t end) {
    for (; c < end; ++c) {
      for (const Planes<T>& p : planes_) {
        for (int64_t y = rows_.begin; y < rows_.end; ++y) {
          std::fill_n(p.data + c * p.channel + y * p.row, width_, T(0));
        }
      }
    }
  });
}

template <class T>
void PlanarResult<T>::add(const ImageBodies<T>& bodies, const Product& p, const Unit& unit,
                          const Executor& executor) const {
  if (p.add.data == nullptr) return;
  const PlanarImages<T> z(bodies, p.add, width_, rows_, unit, executor);
  for_ranges(executor, view_.rows, range_step(executor, view_.rows), [&](int64_t c, int64_t end) {
    for (; c < end; ++c) {
      for (size_t i = 0; i < planes_.size(); ++i) {
        const Planes<T>& to = planes_[i];
        const Planes<const T>& from = z.planes()[i];
        // Rows that follow each other are one.
        const bool joined = to.row == width_ && from.row == width_;
        const int64_t step = joined ? std::max<int64_t>(1, rows_.end - rows_.begin) : 1;
        for (int64_t y = rows_.begin; y < rows_.end; y += step) {
          bodies.add(p.activation, from.data + c * from.channel + y * from.row,
                     to.data + c * to.channel + y * to.row, width_ * step);
        }
      }
    }
  });
}

template <class T>
void PlanarResult<T>::done(const ImageBodies<T>& bodies, const Executor& executor) const {
  if (!copy_) return;
  T* data = static_cast<T*>(view_.data) + image_ * view_.col_stride;
  const int64_t plane = (rows_.end - rows_.begin) * width_;
  for (size_t i = 0; i < planes_.size(); ++i) {
    const T* from = copy_->template as<T>() + i * view_.rows * plane;
    for_ranges(executor, view_.rows, kTogether, [&](int64_t begin, int64_t end) {
      from_planes(bodies, view_, from, plane, width_, rows_, data + i * view_.col_stride, begin,
                  end);
    });
  }
}

namespace {

// One line of a map of kTogether images: numbers of all of them side by side.
template <class T>
void fill_together(const ImageBodies<T>& bodies, const T* const* rows, const FrameAxis& axis,
                   int64_t width, int64_t phase, T* to) {
  const FrameAxis::Line line = axis.line(width, phase);
  T *begin = to + line.zeros * kTogether, *end = begin + line.count * kTogether;
  const int64_t first = phase + line.first * axis.step;
  std::fill(to, begin, T(0));
  if (axis.step == 1) {
    const T* from[kTogether] = {};
    for (int i = 0; i < kTogether; ++i) from[i] = rows[i] ? rows[i] + first : nullptr;
    bodies.transpose(from, line.count, begin, kTogether, kTogether);
  } else {
    for (int64_t k = 0; k < line.count; ++k) {
      for (int i = 0; i < kTogether; ++i) {
        begin[k * kTogether + i] = rows[i] ? rows[i][first + k * axis.step] : T(0);
      }
    }
  }
  std::fill(end, to + width * kTogether, T(0));
}

// One map of one channel and phase, whose rows that lie in the images are [begin, end).
template <class T>
void fill_map(const ImageBodies<T>& bodies, const Frame& f, const Planes<const T>* images,
              const Unit& unit, int64_t c, int64_t first, int64_t begin, int64_t end, int64_t phase,
              T* to) {
  const int64_t numbers = f.width * f.images;
  const Planes<const T>& p = images[0];
  if (f.images == 1) {
    const FrameAxis::Line line = f.x.line(f.width, phase);
    const T* from =
        p.data + c * p.channel + (first + begin * f.y.step) * p.row + phase + line.first * f.x.step;
    return bodies.copy(from, p.row * f.y.step, end - begin, f.x.step, line.count,
                       to + begin * numbers, line.zeros, f.width);
  }
  for (int64_t m = begin; m < end; ++m) {
    const T* row[kTogether] = {};
    for (int i = 0; i < unit.count; ++i) {
      row[i] = images[i].data + c * images[i].channel + (first + m * f.y.step) * images[i].row;
    }
    fill_together(bodies, row, f.x, f.width, phase, to + m * numbers);
  }
}

}  // namespace

template <class T>
void fill_frame(const ImageBodies<T>& bodies, const Frame& f, const Planes<const T>* images,
                const Unit& unit, T* to, int64_t begin, int64_t end) {
  // Turned, the phases are those of the outputs.
  static const std::vector<int> kNone = {0};
  const std::vector<int>&down = f.turned ? kNone : f.y.phases,
        &across = f.turned ? kNone : f.x.phases;
  const int64_t rows = unit.rows + f.y.before + f.y.after, line = f.width * f.images;
  for (int64_t c = begin; c < end; ++c) {
    T* map = to + c * f.channel * f.images;
    for (const int py : down) {
      const int64_t first = f.y.step * (unit.row - f.y.before) + py;  // row of the source
      const int64_t top = std::clamp<int64_t>(divide_up(-first, f.y.step), 0, rows);
      const int64_t bottom =
          std::clamp<int64_t>(divide_up(f.y.source - first, f.y.step), top, rows);
      for (const int px : across) {
        std::fill_n(map, top * line, T(0));
        fill_map(bodies, f, images, unit, c, first, top, bottom, px, map);
        std::fill(map + bottom * line, map + f.map * f.images, T(0));
        map += f.map * f.images;
      }
    }
  }
}

template <class T>
void fill_bands(const ImageBodies<T>& bodies, const Frame& f, const BandLanes* bands,
                const Planes<const T>* images, const Unit& unit, T* to, int64_t begin,
                int64_t end) {
  const int64_t step = f.images * kBandRows, row_numbers = f.width * step;
  for (int64_t v = begin; v < end; ++v) {
    T* map = to + v * f.channel * step;
    for (int64_t m = 0; m < unit.rows + f.y.before + f.y.after; ++m) {
      const int64_t source = unit.row + m - f.y.before;
      T* row = map + m * row_numbers;
      if (source < 0 || source >= f.y.source) {
        std::fill_n(row, row_numbers, T(0));
        continue;
      }
      const FrameAxis::Line line = f.x.line(f.width, 0);
      std::fill_n(row, line.zeros * step, T(0));
      for (int64_t g = 0; g < f.images; ++g) {
        const T* from[kBandRows] = {};
        for (int i = 0; g < unit.count && i < kBandRows; ++i) {
          if (bands[v].row[i] < 0) continue;
          from[i] = images[g].data + bands[v].row[i] * images[g].channel + source * images[g].row +
                    line.first;
        }
        bodies.transpose(from, line.count, row + (line.zeros * f.images + g) * kBandRows, step,
                         kBandRows);
      }
      std::fill(row + (line.zeros + line.count) * step, row + row_numbers, T(0));
    }
    std::fill(map + (unit.rows + f.y.before + f.y.after) * row_numbers, map + f.map * step, T(0));
  }
}

template <class T>
FilledFrame<T>::FilledFrame(const ImageBodies<T>& bodies, const Frame& f,
                            const Planes<const T>* images, const Unit& unit,
                            const Executor& executor) {
  if (f.in_place) {
    data_ = images[0].data + unit.row * f.width;
    return;
  }
  copy_ = std::make_unique<Workspace>(sizeof(T) * f.numbers());
  T* to = copy_->template as<T>();
  data_ = to;
  for_ranges(
      executor, f.channels, range_step(executor, f.channels),
      [&](int64_t begin, int64_t end) { fill_frame(bodies, f, images, unit, to, begin, end); });
  std::fill(to + f.channels * f.channel * f.images, to + f.numbers(), T(0));
}

template <class T>
void separate(const ImageBodies<T>& bodies, const T* line, int64_t width, const Planes<T>* planes,
              int images, int64_t at, int64_t step) {
  const int64_t image = images > 1 ? planes[1].data - planes[0].data : 0;
  for (int64_t k = 0; k < width; k += kTogether) {
    const int lanes = static_cast<int>(std::min<int64_t>(kTogether, width - k));
    const T* pixel[kTogether] = {};
    for (int i = 0; i < lanes; ++i) pixel[i] = line + (k + i) * kTogether;
    if (step == 1) {
      bodies.transpose(pixel, images, planes[0].data + at + k, image, lanes);
      continue;
    }
    T turned[kTogether * kTogether];
    bodies.transpose(pixel, images, turned, kTogether, lanes);
    for (int m = 0; m < images; ++m) {
      T* to = planes[m].data + at + k * step;
      for (int i = 0; i < lanes; ++i) to[i * step] = turned[m * kTogether + i];
    }
  }
}

template class FilledFrame<float>;
template class FilledFrame<double>;
template void separate(const ImageBodies<float>&, const float*, int64_t, const Planes<float>*, int,
                       int64_t, int64_t);
template void separate(const ImageBodies<double>&, const double*, int64_t, const Planes<double>*,
                       int, int64_t, int64_t);
template class PlanarImages<float>;
template class PlanarImages<double>;
template class PlanarResult<float>;
template class PlanarResult<double>;
template void fill_frame(const ImageBodies<float>&, const Frame&, const Planes<const float>*,
                         const Unit&, float*, int64_t, int64_t);
template void fill_frame(const ImageBodies<double>&, const Frame&, const Planes<const double>*,
                         const Unit&, double*, int64_t, int64_t);
template void fill_bands(const ImageBodies<float>&, const Frame&, const BandLanes*,
                         const Planes<const float>*, const Unit&, float*, int64_t, int64_t);
template void fill_bands(const ImageBodies<double>&, const Frame&, const BandLanes*,
                         const Planes<const double>*, const Unit&, double*, int64_t, int64_t);

}  // namespace spfmt
