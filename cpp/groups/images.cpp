#include <algorithm>
#include <vector>

#include "../core/images.h"
#include "../core/variant.h"
#include "image_packs.h"
#include "images.h"

// Weights are used where the caller keeps them: nothing is packed.
namespace spfmt {
namespace {

// Rows of one image of X, and of Y, that stay in L2 while all bands pass over them.
constexpr int64_t kFrameBytes = 1 << 20;
// Outputs of a band, or of a phase of dX, that L1 holds beside what they are made of.
constexpr int64_t kOutputs = 128;
// Tiles of the caller's own memory are no wider than its rows.
constexpr int64_t kSmallestTile = 4;

// Small maps fill no tile: the numbers of kTogether images then lie side by side.
int64_t images_together(int64_t height, int64_t width, int64_t batch) {
  const bool small = width < 4 && height < 4;
  return small && batch >= kTogether / 2 ? kTogether : 1;
}

// The shape that computes the fewest outputs in vain.
template <class Outputs>
const Tile<Outputs>& best_tile(const Tiles<Outputs>& tiles, int64_t height, int64_t width,
                               bool in_place) {
  const Tile<Outputs>* best = nullptr;
  double least = 0;
  for (int i = 0; i < tiles.count; ++i) {
    const Tile<Outputs>& t = tiles.tile[i];
    if (in_place && (t.rows > 1 || t.width > width)) continue;
    const double count = static_cast<double>(divide_up(height, t.rows) * divide_up(width, t.width));
    const double cost = count * (t.rows * t.width + tiles.cost);
    if (best == nullptr || cost < least) best = &t, least = cost;
  }
  return *best;
}

template <class Pack>
std::shared_ptr<const Pack> pack_of(const Plan& plan, const Geometry& g, int64_t images,
                                    const FrameRoom& room) {
  return plan.shaped<Pack>(g, room.choice(images), [&] {
    return std::make_shared<const Pack>(plan.groups(), g, images, room);
  });
}

template <class T>
std::shared_ptr<const ForwardPack> forward_pack(const Plan& plan, const Geometry& g,
                                                const View& x) {
  const bool readable = g.x.size >= kSmallestTile && is_readable(x, g, false);
  return pack_of<ForwardPack>(plan, g, images_together(g.y.out, g.x.out, x.cols),
                              {sizeof(T), kFrameBytes, plan.rows(), readable});
}

// Where the results of a unit go while they are computed: planes of one image, or numbers of
// kTogether images side by side that are handed to their planes in the end.
template <class T>
class Results {
 public:
  Results(const ImageBodies<T>& bodies, const View& view, const Frame& frame, const Geometry& g,
          const Unit& unit)
      : bodies_(bodies),
        frame_(frame),
        unit_(unit),
        width_(frame.turned ? g.x.size : g.x.out),
        rows_{unit.row, unit.row + unit.rows},
        planar_(view, width_, rows_, unit) {
    if (frame.images == 1) return;
    plane_ = unit.rows * width_ * kTogether + kTogether;
    aside_ = std::make_unique<Workspace>(sizeof(T) * view.rows * plane_);
  }
  T* at(int64_t channel, int64_t row) const {
    if (!aside_) {
      const Planes<T>& p = planar_.planes()[0];
      return p.data + channel * p.channel + (unit_.row + row) * p.row;
    }
    return aside_->template as<T>() + channel * plane_ + row * width_ * kTogether;
  }
  int64_t row() const { return aside_ ? width_ * kTogether : planar_.planes()[0].row; }
  int64_t width() const { return width_ * frame_.images; }
  void clear(const Executor& executor) const { planar_.clear(executor); }
  void done(const Product& p, int64_t channels, const Executor& executor) const {
    if (aside_) {
      for_ranges(executor, channels, range_step(executor, channels), [&](int64_t c, int64_t end) {
        for (; c < end; ++c) hand_out(c);
      });
    }
    planar_.add(bodies_, p, unit_, executor);
    planar_.done(bodies_, executor);
  }

 private:
  void hand_out(int64_t channel) const {
    const Planes<T>* planes = planar_.planes();
    for (int64_t y = 0; y < unit_.rows; ++y) {
      const int64_t to = channel * planes[0].channel + (unit_.row + y) * planes[0].row;
      separate(bodies_, at(channel, y), width_, planes, unit_.count, to, 1);
    }
  }

  const ImageBodies<T>& bodies_;
  const Frame& frame_;
  const Unit& unit_;
  int64_t width_, plane_ = 0;
  Rows rows_;
  PlanarResult<T> planar_;
  std::unique_ptr<Workspace> aside_;
};

template <class T>
struct Forward {
  const Bodies<T>& bodies;
  const Groups& a;
  const Product& p;
  const Geometry& g;
  const ForwardPack& pack;

  void unit(const Unit& unit, const Executor& executor) const {
    const Frame& f = pack.frame;
    const PlanarImages<T> in(bodies.images, p.in, g.x.size, source_rows(f, unit), unit, executor);
    const Results<T> y(bodies.images, p.out, f, g, unit);
    const FilledFrame<T> x(bodies.images, f, in.planes(), unit, executor);
    const Cut cut(*bodies.group_images.multiply, f, unit.rows, y);
    const int64_t items = a.bands * cut.count;
    for_ranges(executor, items, range_step(executor, items), [&](int64_t begin, int64_t end) {
      const Workspace sums(sizeof(T) * cut.numbers());
      for (int64_t i = begin; i < end; ++i) {
        outputs(cut, cut.block(i % cut.count), x, y, i / cut.count, sums.template as<T>());
      }
    });
    y.done(p, a.rows, executor);
  }

  // Outputs of one band that are summed up in L1 before they are handed to their maps: some rows.
  struct Block {
    int64_t x, y;  // its first output, from the unit's
    int64_t height, width;
    int64_t wide;  // room for whole tiles
    // In the caller's memory nothing may be read behind the last output: the tile that begins at
    // `last` sums up outputs that begin `shift` earlier, some of them in vain.
    int64_t last, shift;
  };

  // A unit cut into blocks. Maps without padding are one long row, which is cut anywhere.
  struct Cut {
    const Frame& frame;
    const bool flat;
    const int64_t height, width, y_row;
    const Tile<BandOutputs<T>>& tile;
    int64_t tall, count;

    Cut(const Tiles<BandOutputs<T>>& tiles, const Frame& f, int64_t rows, const Results<T>& y)
        : frame(f),
          flat(f.pointwise() && y.row() == y.width()),
          height(flat ? 1 : rows),
          width(flat ? rows * y.width() : y.width()),
          y_row(y.row()),
          tile(best_tile(tiles, height, flat ? width / divide_up(width, kOutputs) : width,
                         f.in_place)) {
      tall =
          std::clamp<int64_t>(kOutputs / wide(width), 1, divide_up(height, tile.rows) * tile.rows);
      tall = divide_up(tall, tile.rows) * tile.rows;
      count = flat ? divide_up(width, kOutputs) : divide_up(height, tall);
    }
    int64_t wide(int64_t n) const { return divide_up(n, tile.width) * tile.width; }
    int64_t numbers() const {
      return tall * wide(flat ? divide_up(width, count) : width) * kBandRows;
    }
    Block block(int64_t i) const {
      const int64_t row = flat ? 0 : i * tall;
      const int64_t begin = flat ? width * i / count : 0;
      const int64_t n = (flat ? width * (i + 1) / count : width) - begin;
      return {row * frame.width * frame.images + begin,
              row * y_row + begin,
              std::min(tall, height - row),
              n,
              wide(n),
              wide(n) - tile.width,
              frame.in_place ? wide(n) - n : 0};
    }
  };

  void outputs(const Cut& cut, const Block& block, const FilledFrame<T>& x, const Results<T>& y,
               int64_t t, T* sums) const {
    const BandLanes& band = pack.bands[t];
    const int64_t stride = pack.frame.width * pack.frame.images;
    const T* bias = static_cast<const T*>(p.bias.data);
    T start[kBandRows] = {};
    for (int i = 0; bias && i < kBandRows; ++i) {
      if (band.row[i] >= 0) start[i] = bias[band.row[i]];
    }
    BandOutputs<T> o{static_cast<const T*>(p.values.data) + a.value_ptr[t],
                     static_cast<int>(a.row_ptr[t + 1] - a.row_ptr[t]),
                     pack.offset.data() + a.col_begin[t],
                     a.col_end[t] - a.col_begin[t],
                     nullptr,
                     stride,
                     start,
                     nullptr,
                     block.wide * kBandRows};
    const T* base = x.data() + pack.group_offset(band.group, g) + block.x;
    // Columns in parts, so that every tile of the block finds their weights in L1.
    const int64_t rows = o.rows, most = std::max<int64_t>(1, o.cols);
    for_parts(most, bodies.group_images.columns, [&](int64_t, int n) {
      o.cols = std::min<int64_t>(n, a.col_end[t] - a.col_begin[t]);
      for (int64_t r = 0; r < block.height; r += cut.tile.rows) {
        for (int64_t c = 0; c < block.width; c += cut.tile.width) {
          o.x = base + r * stride + c - (c == block.last ? block.shift : 0);
          o.sums = sums + (r * block.wide + c) * kBandRows;
          cut.tile.run(o);
        }
      }
      o.values += o.cols * rows;
      o.offset += o.cols;
      o.start = nullptr;
    });
    hand_out(block, y, band, sums);
  }

  // Sixteen outputs at a time, over the ends of rows where these follow each other in memory.
  void hand_out(const Block& block, const Results<T>& y, const BandLanes& band, T* sums) const {
    bodies.samples.activate(activation_of_sums(p), sums, 0, block.height * block.wide * kBandRows,
                            nullptr, 1);
    T* to[kBandRows] = {};
    const bool joined = y.row() == block.width;
    const int64_t run = joined ? block.height * block.width : block.width;
    for (int64_t r = 0; r < (joined ? 1 : block.height); ++r) {
      for (int i = 0; i < kBandRows; ++i) {
        if (band.row[i] >= 0) to[i] = y.at(band.row[i], r) + block.y;
      }
      for (int64_t k = 0; k < run; k += kLanes) {
        const int n = static_cast<int>(std::min<int64_t>(kLanes, run - k));
        const T* from[kLanes];
        int64_t line = r + k / block.width, at = k % block.width;
        for (int i = 0; i < n; ++i) {
          const int64_t shifted = at + (at >= block.last ? block.shift : 0);
          from[i] = sums + (line * block.wide + shifted) * kBandRows;
          if (++at == block.width) ++line, at = 0;
        }
        bodies.images.spread(from, n, to);
        for (T*& place : to) {
          if (place) place += kLanes;
        }
      }
    }
  }
};

template <class T>
void multiply(const Bodies<T>& bodies, const Plan& plan, const Product& p,
              const Executor& executor) {
  const Geometry& g = *p.geometry;
  const auto pack = forward_pack<T>(plan, g, p.in);
  const Forward<T> forward{bodies, plan.groups(), p, g, *pack};
  for_units(pack->frame, 0, p.in.cols, executor,
            [&](const Unit& unit, const Executor& inner) { forward.unit(unit, inner); });
}

template <class T>
struct Backward {
  const Bodies<T>& bodies;
  const Product& p;
  const Geometry& g;
  const TurnedPack& pack;

  void unit(const Unit& unit, const Executor& executor) const {
    const Frame& f = pack.frame;
    const PlanarImages<T> in(bodies.images, p.in, g.x.out, source_rows(f, unit), unit, executor);
    const Workspace frame(sizeof(T) * f.numbers());
    T* dy = frame.template as<T>();
    for_ranges(executor, f.channels, range_step(executor, f.channels),
               [&](int64_t begin, int64_t end) {
                 fill_bands(bodies.images, f, pack.bands.data(), in.planes(), unit, dy, begin, end);
               });
    // Strips are counted in outputs of a phase; rows of dX are `stride` times as many.
    const int64_t last = std::min(g.y.size, (unit.row + unit.rows) * g.y.stride);
    const Unit lines{unit.image, unit.count, unit.row * g.y.stride, last - unit.row * g.y.stride};
    const Results<T> dx(bodies.images, p.out, f, g, lines);
    if (!f.whole) dx.clear(executor);
    const int64_t channels = p.out.rows;
    for (int64_t phase = 0; phase < pack.phases(); ++phase) {
      outputs(unit, phase, dy, dx, channels, executor);
    }
    dx.done(p, channels, executor);
  }

  // Outputs of one phase.
  struct Phase {
    const Tile<TurnedOutputs<T>>& tile;
    int64_t place, py, px, height, width;
    int64_t across;  // tiles in a row

    int64_t count() const { return divide_up(height, tile.rows) * across; }
  };

  // All outputs of one phase. A few tiles, some lines of dX, pass over all channels while L1 holds
  // their part of dY.
  void outputs(const Unit& unit, int64_t place, const T* dy, const Results<T>& dx, int64_t channels,
               const Executor& executor) const {
    const Frame& f = pack.frame;
    const auto phases = static_cast<int64_t>(f.x.phases.size());
    const int64_t py = f.y.phases[place / phases], px = f.x.phases[place % phases];
    const int64_t height = std::min(unit.rows, count_of(g.y.size, g.y.stride, py) - unit.row);
    const int64_t width = count_of(g.x.size, g.x.stride, px) * f.images;
    if (height <= 0 || width <= 0 || channels == 0) return;
    const auto& tile = best_tile(*bodies.group_images.multiply_t, height, width, false);
    const Phase tiles{tile, place, py, px, height, width, divide_up(width, tile.width)};
    const int64_t few = std::max<int64_t>(1, kOutputs / (tile.rows * tile.width));
    // Small maps have fewer such ranges than there are threads, which then share the channels.
    const int64_t ranges = divide_up(tiles.count(), few);
    const int64_t runs = std::clamp<int64_t>(executor.threads / ranges, 1, channels);
    for_each(executor, ranges * runs, [&](int64_t i) {
      const int64_t begin = i / runs * few, end = std::min(tiles.count(), begin + few);
      const int64_t run = i % runs, last = channels * (run + 1) / runs;
      for (int64_t c = channels * run / runs; c < last; ++c) {
        for (int64_t k = begin; k < end; ++k) channel_tile(tiles, k, dy, dx, c);
      }
    });
  }

  void channel_tile(const Phase& tiles, int64_t i, const T* dy, const Results<T>& dx,
                    int64_t c) const {
    const Frame& f = pack.frame;
    const int64_t* ptr = pack.ptr.data() + c * pack.phases() + tiles.place;
    const int64_t y = i / tiles.across * tiles.tile.rows, x = i % tiles.across * tiles.tile.width;
    tiles.tile.run({static_cast<const T*>(p.values.data), pack.entry.data() + ptr[0],
                    pack.entry.data() + ptr[1], dy + (y * f.width * f.images + x) * kBandRows,
                    f.width * f.images * kBandRows,
                    dx.at(c, y * g.y.stride + tiles.py) + tiles.px + x * g.x.stride,
                    dx.row() * g.y.stride, g.x.stride,
                    static_cast<int>(std::min<int64_t>(tiles.tile.rows, tiles.height - y)),
                    static_cast<int>(std::min<int64_t>(tiles.tile.width, tiles.width - x))});
  }
};

template <class T>
void multiply_t(const Bodies<T>& bodies, const Plan& plan, const Product& p,
                const Executor& executor) {
  const Geometry& g = *p.geometry;
  const bool strided = g.y.stride > 1 || g.x.stride > 1;
  const int64_t images = strided ? 1 : images_together(g.y.size, g.x.size, p.in.cols);
  const FrameRoom room{sizeof(T), kFrameBytes, p.out.rows, false};
  const auto pack = pack_of<TurnedPack>(plan, g, images, room);
  const Backward<T> backward{bodies, p, g, *pack};
  for_units(pack->frame, 0, p.in.cols, executor,
            [&](const Unit& unit, const Executor& inner) { backward.unit(unit, inner); });
}

// Images that one pass over the gradient takes, so that it is not loaded and stored for a few
// outputs.
int64_t images_per_pass(const Frame& f) {
  constexpr int64_t kWanted = 64, kMost = 8;
  const int64_t outputs = std::max<int64_t>(1, f.rows * f.x.domain * f.images);
  return std::clamp<int64_t>(kWanted / outputs, 1, kMost);
}

// X and dY of some images, and the gradient that they add.
template <class T>
struct Gradient {
  const Bodies<T>& bodies;
  const Groups& a;
  const Product& p;
  const Geometry& g;
  const ForwardPack& pack;
  const Frame rows;  // of dY, without padding
  const int64_t images, parts;
  const Workspace x, dy;

  Gradient(const Bodies<T>& b, const Groups& groups, const Product& product,
           const ForwardPack& forward)
      : bodies(b),
        a(groups),
        p(product),
        g(*product.geometry),
        pack(forward),
        rows(forward.frame.of_outputs(*product.geometry, groups.bands, kBandRows)),
        images(images_per_pass(forward.frame)),
        parts(parts_of(groups)),
        x(forward.frame.in_place ? 0 : sizeof(T) * images * forward.frame.numbers()),
        dy(sizeof(T) * images * rows.numbers()) {}

  // Numbers of X of the units of a pass, from the first to those of the next one.
  struct Numbers {
    const T* data;
    int64_t image;
  };
  Numbers numbers(const Unit& first) const {
    const Frame& f = pack.frame;
    if (!f.in_place) return {x.template as<T>(), f.numbers()};
    const T* data = static_cast<const T*>(p.in2.data);
    return {data + first.image * p.in2.col_stride + first.row * f.width, p.in2.col_stride};
  }

  void fill(const Unit& unit, int64_t place, const Executor& executor) const {
    if (!pack.frame.in_place) fill_x(unit, place, executor);
    const PlanarImages<T> images_of_dy(bodies.images, p.in, g.x.out,
                                       {unit.row, unit.row + unit.rows}, unit, executor);
    T* bands = dy.template as<T>() + place * rows.numbers();
    for_ranges(executor, rows.channels, range_step(executor, rows.channels),
               [&](int64_t begin, int64_t end) {
                 fill_bands(bodies.images, rows, pack.bands.data(), images_of_dy.planes(), unit,
                            bands, begin, end);
               });
  }

  void fill_x(const Unit& unit, int64_t place, const Executor& executor) const {
    const Frame& f = pack.frame;
    const PlanarImages<T> of_x(bodies.images, p.in2, g.x.size, source_rows(f, unit), unit,
                               executor);
    T* to = x.template as<T>() + place * f.numbers();
    for_ranges(executor, f.channels, range_step(executor, f.channels),
               [&](int64_t begin, int64_t end) {
                 fill_frame(bodies.images, f, of_x.planes(), unit, to, begin, end);
               });
  }

  // Columns [begin, end) of a band, over `count` images in rows that L1 holds of dY.
  void add(int64_t t, int64_t begin, int64_t end, int count, const Unit& first) const {
    constexpr int64_t kHeld = 256;
    const Frame& f = pack.frame;
    const Numbers from = numbers(first);
    const int64_t n = a.row_ptr[t + 1] - a.row_ptr[t];
    const int64_t width = g.x.out * f.images, step = std::max<int64_t>(1, kHeld / width);
    BandGradient<T> o{nullptr,
                      nullptr,
                      rows.numbers(),
                      from.image,
                      rows.width * f.images * kBandRows,
                      f.width * f.images,
                      count,
                      0,
                      width,
                      pack.offset.data() + a.col_begin[t] + begin,
                      end - begin,
                      static_cast<int>(n),
                      static_cast<T*>(p.values.data) + a.value_ptr[t] + begin * n};
    for (int64_t y = 0; y < first.rows; y += step) {
      o.height = std::min(step, first.rows - y);
      o.dy = dy.template as<T>() + t * rows.channel * rows.images * kBandRows + y * o.dy_row;
      o.x = from.data + pack.group_offset(pack.bands[t].group, g) + y * o.x_row;
      bodies.group_images.sample(o);
    }
  }

  void pass(const std::vector<Unit>& units, const Executor& executor) const {
    if (units.size() > 1) {
      for_each(executor, units.size(), [&](int64_t i) { fill(units[i], i, serial_executor()); });
    } else {
      fill(units[0], 0, executor);
    }
    const int64_t items = a.bands * parts;
    for_ranges(executor, items, range_step(executor, items), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t t = i / parts, cols = a.col_end[t] - a.col_begin[t];
        const int64_t begin = cols * (i % parts) / parts, end = cols * (i % parts + 1) / parts;
        if (begin < end) {
          add(t, begin, end, static_cast<int>(units.size()), units[0]);
        }
      }
    });
  }

  // Parts of every band's columns that threads share.
  static int64_t parts_of(const Groups& a) {
    constexpr int64_t kColumns = 80;
    int64_t longest = 1;
    for (int64_t t = 0; t < a.bands; ++t) {
      longest = std::max(longest, a.col_end[t] - a.col_begin[t]);
    }
    return divide_up(longest, kColumns);
  }
};

template <class T>
void sample(const Bodies<T>& bodies, const Plan& plan, const Product& p, const Executor& executor) {
  const Geometry& g = *p.geometry;
  const Groups& a = plan.groups();
  std::fill_n(static_cast<T*>(p.values.data), plan.nnz(), T(0));
  if (p.in.cols == 0 || g.y.out == 0 || g.x.out == 0) return;
  const auto pack = forward_pack<T>(plan, g, p.in2);
  const Frame& f = pack->frame;
  const Gradient<T> gradient(bodies, a, p, *pack);
  for (int64_t row = 0; row < f.y.domain; row += f.rows) {
    const int64_t rows = std::min(f.rows, f.y.domain - row), step = f.images * gradient.images;
    for (int64_t first = 0; first < p.in.cols; first += step) {
      std::vector<Unit> units;
      for (int64_t i = first; i < std::min(p.in.cols, first + step); i += f.images) {
        units.push_back({i, static_cast<int>(std::min(f.images, p.in.cols - i)), row, rows});
      }
      gradient.pass(units, executor);
    }
  }
}

struct GroupImages {
  template <class T>
  static bool exists(const Bodies<T>& bodies) {
    return bodies.group_images.multiply != nullptr;
  }
  template <class T>
  static void run(const Bodies<T>& bodies, const Plan& plan, const Product& p,
                  const Executor& executor) {
    if (spans_groups(plan.groups(), *p.geometry)) {
      return run_band_rows(bodies, plan, p, executor);
    }
    if (p.op == Op::spmm) return multiply(bodies, plan, p, executor);
    if (p.op == Op::spmm_t) return multiply_t(bodies, plan, p, executor);
    sample(bodies, plan, p, executor);
  }
  static Terms terms(const CostModel& model, const Summary& s, const Work& work) {
    const ImageCounts c = image_counts(s.rows, s.cols, work);
    // Bands that span groups of the convolution run row by row. Of a grouped one all are taken to:
    // a search for likeness puts rows of any group together, and the variant of rows then wins.
    const double rows = static_cast<double>(s.nnz) / std::max<int64_t>(1, s.vectors);
    const double visits = std::clamp<double>(work.geometry->groups, 1.0, std::max(1.0, rows));
    const double vectors = static_cast<double>(s.vectors) * visits;
    const auto batch = static_cast<double>(work.batch);
    const double outputs = static_cast<double>(c.height) * c.width;
    return terms_of(model, work, c.operands * batch, vectors * batch, vectors * outputs * batch,
                    static_cast<double>(size_of(work.dtype)) * s.nnz, batch);
  }
};

}  // namespace

const Variant kGroupImages = VariantOf<GroupImages>::row(
    "images", Layout::groups, {Op::spmm, Op::spmm_t, Op::sddmm}, true, INT64_MAX, false);

}  // namespace spfmt
