// Images as kernels see them: frames, in which a convolution is a matrix product whose samples
// overlap.
//
// In a padded copy of an image a cell of the kernel is an offset, the same for every output: the
// kernels add up weights times numbers at base + offset, and do not know that they convolve. What a
// stride skips goes into maps of its own, one per phase, so that neighbouring outputs always meet
// neighbouring numbers:
//
//   forward    X in frames, phase = position modulo stride; outputs are those of Y
//   turned     dY in frames without phases; outputs are numbers of X, phase by phase
//
// The structure of dX is that of Y turned by 180 degrees, with inputs and outputs swapped; its
// values are the same ones (HRBP, section 3.1 and Appendix F).
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "../cost/cost.h"
#include "samples.h"
#include "threads.h"
#include "workspace.h"

namespace spfmt {

// Images whose numbers may lie side by side, and rows or images whose numbers do: one vector.
constexpr int kTogether = kLanes;

// The maps of one image, numbers of a row side by side.
template <class T>
struct Planes {
  T* data;
  int64_t channel, row;
};

template <class T>
struct ImageBodies {
  // to[k * step + i] = from[i][k] for k < n and i < lanes; zeros where from[i] is null.
  void (*transpose)(const T* const* from, int64_t n, T* to, int64_t step, int lanes);
  // to[i][k] = from[k][i] for k < n and i < kLanes, but where to[i] is null; n <= kLanes.
  void (*spread)(const T* const* from, int n, T* const* to);
  // y[k] = f(y[k] + z[k]) for k < n.
  void (*add)(Activation f, const T* z, T* y, int64_t n);
  // Rows of `width`: `before` zeros, then `count` numbers from[k * step], then zeros.
  void (*copy)(const T* from, int64_t row, int64_t rows, int64_t step, int64_t count, T* to,
               int64_t before, int64_t width);
};

// One axis of a frame.
struct FrameAxis {
  int64_t source;  // numbers of the maps that it is filled from
  int64_t step;    // distance there of neighbouring positions
  int64_t domain;  // outputs; of the first phase, where they have phases
  // Positions in front of the first output's own, and behind the last's; negative where the nearest
  // cell of the kernel is farther off.
  int64_t before, after;
  std::vector<int> phases;  // that cells meet: maps of the frame; turned, outputs
  // Of every cell of the kernel: the place of its phase, -1 where it meets nothing, and how far its
  // position is from the output's own.
  std::vector<int> phase, shift;

  FrameAxis(const Axis& axis, bool turned);
  // Positions from one line of a map to the next. Lines share the zeros between them.
  int64_t width() const;
  // A line of `width` positions begins with `zeros`; `count` numbers of a phase follow, the first
  // of them its `first`; all others are zeros.
  struct Line {
    int64_t zeros, first, count;
  };
  Line line(int64_t width, int64_t phase) const;
};

// What a frame may take.
struct FrameRoom {
  int64_t bytes;   // of a number
  int64_t budget;  // bytes of a strip, unless some rows of outputs need more
  int64_t beside;  // numbers per position and image that are held beside those of the frame
  bool in_place;   // whether the caller's maps are dense, and may be read where they lie

  // Tells apart frames that are made of one geometry, and of one structure.
  int64_t choice(int64_t images) const {
    return (2 * images + (bytes == sizeof(double))) * 2 + in_place;
  }
};

// How a unit of work sees its images: a strip of outputs of one image or of kTogether, whose
// numbers then lie side by side.
struct Frame {
  FrameAxis y, x;
  bool turned;
  int64_t channels;      // of X, or bands of dY
  int64_t element;       // numbers per position and image: 1, or the rows of a band
  int64_t images;        // 1 or kTogether
  int64_t rows;          // outputs along y in a strip
  int64_t width;         // positions of a line
  int64_t map, channel;  // positions between maps, and between channels
  bool in_place;         // nothing is copied: a pointwise frame's maps as they lie
  bool whole;            // false where phases of dX are left out, whose numbers are zeros

  // Throws std::length_error where offsets do not fit 32 bits.
  Frame(const Geometry&, bool turned, int64_t channels, int64_t element, int64_t images,
        const FrameRoom&);

  bool pointwise() const;  // an output meets its own position only

  int64_t maps() const {
    return turned ? 1 : static_cast<int64_t>(y.phases.size() * x.phases.size());
  }
  int64_t strips() const { return y.domain > 0 ? divide_up(y.domain, rows) : 0; }
  int64_t numbers() const;  // with room for vectors that start at the last output
  // Of cell (ky, kx) of a channel's map, from the first output's own place.
  int64_t offset(int64_t c, int64_t ky, int64_t kx) const;
  // Of Y in the strips of this one of X, and in lines as long: without padding, but with zeros
  // behind each line where this one has more positions than there are outputs.
  Frame of_outputs(const Geometry&, int64_t channels, int64_t element) const;

 private:
  void cut(int64_t fitting);
};

// Whether outputs meet one position of the operand, their own; turned, with gaps between them.
bool is_pointwise(const Geometry&, bool turned);
// Whether a frame of the operand would be a copy of its maps, as 1x1 convolutions have them: each
// map one line, one after the other.
bool is_readable(const View&, const Geometry&, bool turned);

// How many of `size` numbers, `step` apart, begin at `phase`.
inline int64_t count_of(int64_t size, int64_t step, int64_t phase) {
  return phase < size ? (size - phase + step - 1) / step : 0;
}

// Up to kTogether images of a batch, and which of their outputs.
struct Unit {
  int64_t image;
  int count;  // images
  int64_t row, rows;
};

// Rows of the maps that a unit reads or writes.
struct Rows {
  int64_t begin, end;
};
Rows source_rows(const Frame&, const Unit&);

// Maps of the images of a unit with numbers of a row side by side: where the caller keeps them, or
// copies of the rows that the unit reads.
template <class T>
class PlanarImages {
 public:
  PlanarImages(const ImageBodies<T>&, const View&, int64_t width, Rows, const Unit&,
               const Executor&);
  const Planes<const T>* planes() const { return planes_.data(); }

 private:
  std::unique_ptr<Workspace> copy_;
  std::vector<Planes<const T>> planes_;
};

// The same for the rows of a result that a unit writes; done() hands them to the caller.
template <class T>
class PlanarResult {
 public:
  PlanarResult(const View&, int64_t width, Rows, const Unit&);
  const Planes<T>* planes() const { return planes_.data(); }
  void clear(const Executor&) const;
  // y = f(y + add) of a product, where it has one.
  void add(const ImageBodies<T>&, const Product&, const Unit&, const Executor&) const;
  void done(const ImageBodies<T>&, const Executor&) const;

 private:
  const View& view_;
  int64_t width_;
  Rows rows_;
  int64_t image_;
  std::unique_ptr<Workspace> copy_;
  std::vector<Planes<T>> planes_;
};

// The activation of sums before they reach their maps: none where something is added to these.
inline Activation activation_of_sums(const Product& p) {
  return p.add.data != nullptr ? Activation::none : p.activation;
}

// Fills channels [begin, end) of a frame of numbers from the images of a unit.
template <class T>
void fill_frame(const ImageBodies<T>&, const Frame&, const Planes<const T>* images, const Unit&,
                T* to, int64_t begin, int64_t end);

// A band as a convolution sees it.
struct BandLanes {
  int64_t group;           // of the convolution, to which all of its rows belong
  int32_t row[kBandRows];  // of each lane, -1 where it has none
};

// Fills bands [begin, end) of a frame whose positions hold the rows of a band.
template <class T>
void fill_bands(const ImageBodies<T>&, const Frame&, const BandLanes*,
                const Planes<const T>* images, const Unit&, T* to, int64_t begin, int64_t end);

// The numbers of a unit in a frame, zeros behind the last position; or as they lie.
template <class T>
class FilledFrame {
 public:
  FilledFrame(const ImageBodies<T>&, const Frame&, const Planes<const T>* images, const Unit&,
              const Executor&);
  const T* data() const { return data_; }

 private:
  std::unique_ptr<Workspace> copy_;
  const T* data_;
};

// `width` numbers of kTogether images side by side, to the row of each image that begins at `at` of
// its first plane, `step` apart.
template <class T>
void separate(const ImageBodies<T>&, const T* line, int64_t width, const Planes<T>* planes,
              int images, int64_t at, int64_t step);

// body(unit, executor) over the images and strips of a batch. With a unit for every thread each is
// one thread's; with fewer the threads share each unit's work.
template <class Body>
void for_units(const Frame& frame, int64_t first, int64_t images, const Executor& executor,
               const Body& body) {
  const int64_t strips = frame.strips(), sets = divide_up(images, frame.images);
  const auto unit = [&](int64_t i) {
    const int64_t image = i / strips * frame.images, row = i % strips * frame.rows;
    return Unit{first + image, static_cast<int>(std::min(frame.images, images - image)), row,
                std::min(frame.rows, frame.y.domain - row)};
  };
  if (sets * strips >= executor.threads) {
    for_each(executor, sets * strips, [&](int64_t i) { body(unit(i), serial_executor()); });
  } else {
    for (int64_t i = 0; i < sets * strips; ++i) body(unit(i), executor);
  }
}

}  // namespace spfmt
