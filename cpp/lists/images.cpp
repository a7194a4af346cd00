#include "images.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "../core/images.h"
#include "../core/variant.h"

namespace spfmt {
namespace {

// A strip's frame and its sums, or its part of dY.
constexpr int64_t kFrameBytes = 4 << 20, kChunkRows = 32;
// Shorter pieces than this spend their time on loading and storing Y; small maps allow longer ones,
// as far as L1 holds their channels.
constexpr int64_t kLeastPerPiece = 15, kBlockBytes = 12 << 10;

// One place of lists, forward or turned: which numbers of a frame it meets, and which value.
struct Place {
  int64_t channel;
  int32_t offset;
  int64_t source;
};

// Lists made ready for a geometry, and for one image or kTogether at a time.
struct ListImagePack {
  Frame frame;
  int64_t rows;                 // forward those of A; turned the channels of X, by phase
  std::vector<int64_t> source;  // the value at each place, where they are in another order
  std::vector<int64_t> piece_ptr;
  std::vector<ImagePiece> piece;
  std::vector<int32_t> offset;
  ImagePieces view;

  ListImagePack(const RowLists& of, const Geometry& g, bool turned, int64_t images,
                const FrameRoom& room)
      : frame(g, turned, turned ? of.lists.rows : channels_of(of.lists, g), 1, images, room),
        rows(turned ? channels_of(of.lists, g) * phases() : of.lists.rows) {
    const Lists& a = of.lists;
    std::vector<int64_t> ptr;
    std::vector<Place> place;
    if (std::max(a.indptr[a.rows], rows) > INT32_MAX) {
      throw std::length_error("too many values for a convolution");
    }
    turned ? gather_turned(a, g, ptr, place) : gather(a, g, ptr, place);
    if (turned || of.source) {
      for (const Place& p : place) source.push_back(of.source ? of.source[p.source] : p.source);
    }
    cut(ptr, place, room.bytes);
  }
  ListImagePack(const ListImagePack&) = delete;  // `view` points into it
  int64_t phases() const {
    return frame.turned ? static_cast<int64_t>(frame.y.phases.size() * frame.x.phases.size()) : 1;
  }
  int64_t nbytes() const {
    return static_cast<int64_t>(8 * (source.size() + piece_ptr.size()) +
                                sizeof(ImagePiece) * piece.size() + 4 * offset.size());
  }

 private:
  static int64_t channels_of(const Lists& a, const Geometry& g) {
    return g.groups * (a.cols / g.cells());
  }

  // body(row, position, channel of X, cell) of every nonzero.
  template <class Body>
  static void for_nonzeros(const Lists& a, const Geometry& g, const Body& body) {
    const int64_t channels = a.cols / g.cells(),
                  group_rows = std::max<int64_t>(1, a.rows / g.groups);
    for (int64_t r = 0; r < a.rows; ++r) {
      for (int64_t p = a.indptr[r]; p < a.indptr[r + 1]; ++p) {
        const int64_t c = r / group_rows * channels + a.col_indices[p] / g.cells();
        body(r, p, c, a.col_indices[p] % g.cells());
      }
    }
  }

  void gather(const Lists& a, const Geometry& g, std::vector<int64_t>& ptr,
              std::vector<Place>& place) const {
    ptr.assign(a.indptr, a.indptr + a.rows + 1);
    for_nonzeros(a, g, [&](int64_t, int64_t p, int64_t c, int64_t cell) {
      const int64_t offset = frame.offset(c, cell / g.x.kernel, cell % g.x.kernel);
      place.push_back({c, static_cast<int32_t>(offset), p});
    });
  }

  void gather_turned(const Lists& a, const Geometry& g, std::vector<int64_t>& ptr,
                     std::vector<Place>& place) const {
    const auto across = static_cast<int64_t>(frame.x.phases.size());
    const auto for_places = [&](const auto& body) {
      for_nonzeros(a, g, [&](int64_t r, int64_t p, int64_t c, int64_t cell) {
        const int64_t ky = cell / g.x.kernel, kx = cell % g.x.kernel;
        if (frame.y.phase[ky] < 0 || frame.x.phase[kx] < 0) return;
        const int64_t row = c * phases() + frame.y.phase[ky] * across + frame.x.phase[kx];
        body(row, Place{r, static_cast<int32_t>(frame.offset(r, ky, kx)), p});
      });
    };
    ptr.assign(rows + 1, 0);
    for_places([&](int64_t row, const Place&) { ++ptr[row + 1]; });
    for (int64_t i = 0; i < rows; ++i) ptr[i + 1] += ptr[i];
    place.resize(ptr[rows]);
    std::vector<int64_t> next(ptr.begin(), ptr.end() - 1);
    for_places([&](int64_t row, const Place& p) { place[next[row]++] = p; });
  }

  // Places of a row follow each other by channel.
  void cut(const std::vector<int64_t>& ptr, const std::vector<Place>& place, int64_t bytes) {
    const int64_t channels = std::max<int64_t>(1, frame.channels);
    const double per_channel =
        static_cast<double>(place.size()) / std::max<int64_t>(1, rows) / channels;
    const auto wanted = static_cast<int64_t>(kLeastPerPiece / std::max(per_channel, 1e-9));
    const int64_t held = kBlockBytes / std::max<int64_t>(1, frame.channel * frame.images * bytes);
    const int64_t block =
        std::clamp<int64_t>(std::max(wanted, held), 8, std::max<int64_t>(8, channels));
    const int64_t blocks = divide_up(channels, block), chunks = divide_up(rows, kChunkRows);
    std::vector<int64_t> at(ptr.begin(), ptr.begin() + rows);
    piece_ptr.push_back(0);
    offset.reserve(place.size());
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t q = 0; q < chunks; ++q) {
        const int64_t end = std::min(rows, (q + 1) * kChunkRows);
        const size_t begin = piece.size();
        for (int64_t r = q * kChunkRows; r < end; ++r)
          append(r, ptr[r + 1], (b + 1) * block, place, at, b == 0);
        std::stable_sort(
            piece.begin() + begin, piece.end(),
            [](const ImagePiece& p, const ImagePiece& o) { return p.count > o.count; });
        piece_ptr.push_back(piece.size());
      }
    }
    for (ImagePiece& p : piece) {
      p.first = static_cast<int32_t>(offset.size());
      for (int64_t k = p.start; k < p.start + p.count; ++k) offset.push_back(place[k].offset);
    }
    view = {blocks, chunks, piece_ptr.data(), piece.data(), offset.data()};
  }
  void append(int64_t row, int64_t stop, int64_t channel, const std::vector<Place>& place,
              std::vector<int64_t>& at, bool first) {
    const int64_t start = at[row];
    while (at[row] < stop && place[at[row]].channel < channel) ++at[row];
    if (at[row] == start && !first) return;
    piece.push_back({start, 0, static_cast<int32_t>(row), static_cast<int32_t>(at[row] - start)});
  }
};

// How the outputs of a unit are counted. With kTogether images side by side each output is a
// vector. Of one image vectors run over rows and the zeros between them, which are left out when
// results are handed over.
struct Domain {
  int64_t height, width;  // in vectors
  int64_t row;            // numbers from one row to the next, in frames and results alike

  Domain(const Frame& f, int64_t rows)
      : height(f.images > 1 ? rows : 1),
        width(f.images > 1
                  ? f.x.domain
                  : divide_up(std::max<int64_t>(0, (rows - 1) * f.width + f.x.domain), kLanes)),
        row(f.width * f.images) {}

  // body(y, x, down, across) over tiles of at most `most` vectors, with at most `tallest` rows.
  template <class Body>
  void for_tiles(int most, int tallest, const Body& body) const {
    const auto fits = [&](int rows) { return tallest >= rows && width <= most / rows; };
    const int64_t down = height >= 4 && fits(4) ? 4 : height >= 2 && fits(2) ? 2 : 1;
    int64_t y = 0;
    for (int64_t rows = down; rows >= 1; rows /= 2) {
      for (; y + rows <= height; y += rows) {
        for_parts(width, most / rows,
                  [&](int64_t x, int across) { body(y, x, static_cast<int>(rows), across); });
      }
    }
  }
};

// Y or dX: sums of products of lists with frames.
template <class T>
struct ListProduct {
  const Bodies<T>& bodies;
  const Product& p;
  const Geometry& g;
  const ListImagePack& pack;
  const T* values;

  void unit(const Unit& unit, const Executor& executor) const {
    const Frame& f = pack.frame;
    const PlanarImages<T> in(bodies.images, p.in, f.x.source, source_rows(f, unit), unit, executor);
    const FilledFrame<T> x(bodies.images, f, in.planes(), unit, executor);
    const int64_t step = f.turned ? g.y.stride : 1, width = f.turned ? g.x.size : g.x.out;
    const int64_t size = f.turned ? g.y.size : g.y.out;
    const PlanarResult<T> y(p.out, width,
                            {unit.row * step, std::min(size, (unit.row + unit.rows) * step)}, unit);
    if (!f.whole) y.clear(executor);
    const Domain domain(f, unit.rows);
    // Planes a power of two apart would meet in one cache set.
    const int64_t plane = (unit.rows * domain.row + 2 * kLanes) / kLanes * kLanes + kLanes;
    const Workspace sums(sizeof(T) * (pack.rows * plane + kLanes));
    T* sum = sums.template as<T>();
    multiply(domain, x.data(), sum, plane, executor);
    for_ranges(executor, pack.rows, range_step(executor, pack.rows),
               [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) hand_out(r, sum + r * plane, unit, y);
               });
    y.add(bodies.images, p, unit, executor);
    y.done(bodies.images, executor);
  }

  void multiply(const Domain& domain, const T* x, T* sum, int64_t plane,
                const Executor& executor) const {
    struct Tile {
      int64_t y, x;
      int down, across;
    };
    std::vector<Tile> tiles;
    domain.for_tiles(bodies.list_images.most_vectors, 2,
                     [&](int64_t y, int64_t at, int down, int across) {
                       tiles.push_back({y, at, down, across});
                     });
    if (tiles.empty()) return;
    // Small maps have fewer tiles than there are threads, which then share the rows.
    const auto count = static_cast<int64_t>(tiles.size()), chunks = pack.view.chunks;
    const int64_t runs =
        std::clamp<int64_t>(executor.threads / count, 1, std::max<int64_t>(1, chunks));
    for_each(executor, count * runs, [&](int64_t i) {
      const Tile& tile = tiles[i / runs];
      const int64_t at = tile.y * domain.row + tile.x * kLanes, run = i % runs;
      bodies.list_images.multiply(
          pack.view,
          {values, x + at, domain.row, static_cast<const T*>(p.bias.data), sum + at, plane,
           domain.row, tile.down, tile.across, chunks * run / runs, chunks * (run + 1) / runs});
    });
  }

  // Sums of a row of the lists, activated, to the maps.
  void hand_out(int64_t row, T* sum, const Unit& unit, const PlanarResult<T>& y) const {
    const Frame& f = pack.frame;
    const int64_t channel = row / pack.phases(), phase = row % pack.phases();
    const auto across = static_cast<int64_t>(f.x.phases.size());
    const int64_t py = f.turned ? f.y.phases[phase / across] : 0;
    const int64_t px = f.turned ? f.x.phases[phase % across] : 0;
    const int64_t down = f.turned ? g.y.stride : 1, step = f.turned ? g.x.stride : 1;
    const int64_t height =
        f.turned ? std::min(unit.rows, count_of(g.y.size, down, py) - unit.row) : unit.rows;
    const int64_t width = f.turned ? count_of(g.x.size, step, px) : g.x.out;
    const Planes<T>* planes = y.planes();
    const int64_t numbers = divide_up(height * f.width * f.images, kLanes) * kLanes;
    bodies.samples.activate(activation_of_sums(p), sum, 0, numbers, nullptr, 1);
    for (int64_t i = 0; i < height; ++i) {
      const T* line = sum + i * f.width * f.images;
      const int64_t at =
          channel * planes[0].channel + ((unit.row + i) * down + py) * planes[0].row + px;
      if (f.images > 1) {
        separate(bodies.images, line, width, planes, unit.count, at, step);
      } else if (step == 1) {
        bodies.images.copy(line, 0, 1, 1, width, planes[0].data + at, 0, width);
      } else {
        for (int64_t k = 0; k < width; ++k) planes[0].data[at + k * step] = line[k];
      }
    }
  }
};

// Whether the maps of a 1x1 convolution are whole vectors, and enough of them, where they lie.
bool is_wide(const Geometry& g, bool turned) {
  constexpr int64_t kLeast = 4 * kLanes;
  const int64_t pixels = turned ? g.y.out * g.x.out : g.y.size * g.x.size;
  return is_pointwise(g, turned) && pixels % kLanes == 0 && pixels >= kLeast;
}

// body(first, images, together) over runs of a batch: sets of kTogether images, and the rest one by
// one where they are few; all of them where maps are vectors as they lie.
template <class Body>
void for_sets(int64_t batch, bool wide, const Body& body) {
  if (wide) {
    if (batch > 0) body(int64_t{0}, batch, int64_t{1});
    return;
  }
  int64_t whole = batch / kTogether * kTogether;
  if (2 * (batch - whole) >= kTogether) whole = batch;
  if (whole > 0) body(int64_t{0}, whole, int64_t{kTogether});
  if (batch > whole) body(whole, batch - whole, int64_t{1});
}

template <class T>
std::shared_ptr<const ListImagePack> pack_of(const Plan& plan, const RowLists& a, const Product& p,
                                             int64_t images) {
  const Geometry& g = *p.geometry;
  const bool turned = p.op == Op::spmm_t;
  const View& from = p.op == Op::sddmm ? p.in2 : p.in;
  // Whole vectors are read, and behind the last number there would be others' memory.
  const bool whole = (turned ? g.y.out * g.x.out : g.y.size * g.x.size) % kLanes == 0;
  const bool readable = whole && is_readable(from, g, turned);
  const FrameRoom room{sizeof(T), kFrameBytes, turned ? a.lists.cols / g.cells() : a.lists.rows,
                       readable};
  return plan.shaped<ListImagePack>(g, 2 * room.choice(images) + turned, [&] {
    return std::make_shared<const ListImagePack>(a, g, turned, images, room);
  });
}

template <class T>
void multiply(const Bodies<T>& bodies, const Plan& plan, const RowLists& a, const Product& p,
              const Executor& executor) {
  const Geometry& g = *p.geometry;
  const bool turned = p.op == Op::spmm_t;
  const bool wide = is_wide(g, turned) && is_readable(p.in, g, turned);
  for_sets(p.in.cols, wide, [&](int64_t first, int64_t images, int64_t together) {
    const auto pack = pack_of<T>(plan, a, p, together);
    const T* values = static_cast<const T*>(p.values.data);
    const Workspace ordered(sizeof(T) * (pack->source.size() + 1));
    T* to = ordered.template as<T>();
    for (size_t i = 0; i < pack->source.size(); ++i) to[i] = values[pack->source[i]];
    const ListProduct<T> product{bodies, p, g, *pack, pack->source.empty() ? values : to};
    for_units(pack->frame, first, images, executor,
              [&](const Unit& unit, const Executor& inner) { product.unit(unit, inner); });
  });
}

// Adds the share of a unit to the gradient. dY lies like the sums of a product, zeros between its
// rows, which numbers of X behind a row then meet.
template <class T>
void add_gradient(const Bodies<T>& bodies, const Product& p, const ListImagePack& pack,
                  const Unit& unit, T* gradient, const Executor& executor) {
  const Geometry& g = *p.geometry;
  const Frame& f = pack.frame;
  const PlanarImages<T> in2(bodies.images, p.in2, g.x.size, source_rows(f, unit), unit, executor);
  const FilledFrame<T> x(bodies.images, f, in2.planes(), unit, executor);
  const Frame rows = f.of_outputs(g, pack.rows, 1);
  const PlanarImages<T> in(bodies.images, p.in, g.x.out, source_rows(rows, unit), unit, executor);
  const FilledFrame<T> dy(bodies.images, rows, in.planes(), unit, executor);
  const Domain domain(f, unit.rows);
  const int64_t blocks = pack.view.blocks;
  for_each(executor, pack.view.chunks * blocks, [&](int64_t i) {
    domain.for_tiles(
        bodies.list_images.most_held, 4, [&](int64_t y, int64_t at, int down, int across) {
          const int64_t place = y * domain.row + at * kLanes;
          bodies.list_images.sample(pack.view,
                                    {x.data() + place, dy.data() + place, domain.row,
                                     rows.channel * f.images, domain.row, gradient, down, across},
                                    i % blocks, i / blocks);
        });
  });
}

// Whether an image holds finite numbers only.
template <class T>
bool finite(const View& v, int64_t image, int64_t height, int64_t width) {
  for (int64_t c = 0; c < v.rows; ++c) {
    for (int64_t y = 0; y < height; ++y) {
      const T* row =
          static_cast<const T*>(v.data) + image * v.col_stride + c * v.row_stride + y * v.y_stride;
      bool whole = true;
      for (int64_t x = 0; x < width; ++x) {
        whole &= std::fabs(row[x * v.x_stride]) <= std::numeric_limits<T>::max();
      }
      if (!whole) return false;
    }
  }
  return true;
}

// body(first, images, together) for the gradient. Of a single image, numbers of X behind a row meet
// zeros of dY: what is not finite would make NaN of them. Such an image is taken as if it were one
// of kTogether, whose outputs are vectors of their own.
template <class T, class Body>
void for_gradient_sets(const Product& p, const Body& body) {
  const Geometry& g = *p.geometry;
  // Maps without padding have no zeros behind their rows.
  const bool wide = is_wide(g, false) && is_readable(p.in2, g, false);
  const int64_t batch = g.x.out == 0 ? 0 : p.in.cols;
  for_sets(batch, wide, [&](int64_t first, int64_t images, int64_t together) {
    if (together > 1 || wide) return body(first, images, together);
    for (int64_t i = first; i < first + images; ++i) {
      body(i, 1, finite<T>(p.in2, i, g.y.size, g.x.size) ? 1 : int64_t{kTogether});
    }
  });
}

template <class T>
void sample(const Bodies<T>& bodies, const Plan& plan, const RowLists& a, const Product& p,
            const Executor& executor) {
  T* values = static_cast<T*>(p.values.data);
  const Workspace ordered(sizeof(T) * (a.source ? plan.nnz() + 1 : 1));
  T* gradient = a.source ? ordered.template as<T>() : values;
  std::fill_n(gradient, plan.nnz(), T(0));
  for_gradient_sets<T>(p, [&](int64_t first, int64_t images, int64_t together) {
    const auto pack = pack_of<T>(plan, a, p, together);
    // Units one after the other, whatever the threads: they add to the same gradient.
    const Executor alone = serial_executor();
    for_units(pack->frame, first, images, alone, [&](const Unit& unit, const Executor&) {
      add_gradient(bodies, p, *pack, unit, gradient, executor);
    });
  });
  for (int64_t i = 0; a.source && i < plan.nnz(); ++i) values[a.source[i]] = gradient[i];
}

}  // namespace

template <class T>
void run_row_lists(const Bodies<T>& bodies, const Plan& plan, const RowLists& a, const Product& p,
                   const Executor& executor) {
  p.op == Op::sddmm ? sample(bodies, plan, a, p, executor) : multiply(bodies, plan, a, p, executor);
}
template void run_row_lists(const Bodies<float>&, const Plan&, const RowLists&, const Product&,
                            const Executor&);
template void run_row_lists(const Bodies<double>&, const Plan&, const RowLists&, const Product&,
                            const Executor&);

Terms row_list_terms(const CostModel& model, const Summary& s, const Work& work) {
  constexpr int64_t kTile = 4;  // vectors
  const ImageCounts c = image_counts(s.rows, s.cols, work);
  double images = 0, passes = 0, vectors = 0, tiles = 0;
  const bool wide = is_wide(*work.geometry, work.op == Op::spmm_t);
  for_sets(work.batch, wide, [&](int64_t, int64_t count, int64_t together) {
    const auto units = static_cast<double>(divide_up(count, together));
    const bool side_by_side = together > 1;
    const int64_t line = (c.height - 1) * c.row + c.width;
    const int64_t height = side_by_side ? c.height : 1;
    const int64_t width = side_by_side ? c.width : divide_up(line, kLanes);
    images += units * static_cast<double>(together);
    passes += units;
    vectors += units * static_cast<double>(height * width);
    tiles += units * static_cast<double>(divide_up(height * width, kTile));
  });
  const auto nnz = static_cast<double>(s.nnz);
  // Values and offsets come from behind L2 once for every tile.
  return terms_of(model, work, c.operands * images, nnz * passes, nnz * vectors,
                  static_cast<double>(size_of(work.dtype) + sizeof(int32_t)) * nnz, tiles);
}

namespace {

struct ListImages {
  template <class T>
  static bool exists(const Bodies<T>& bodies) {
    return bodies.list_images.multiply != nullptr;
  }
  template <class T>
  static void run(const Bodies<T>& bodies, const Plan& plan, const Product& p,
                  const Executor& executor) {
    run_row_lists(bodies, plan, {plan.lists(), nullptr}, p, executor);
  }
  static Terms terms(const CostModel& model, const Summary& s, const Work& work) {
    return row_list_terms(model, s, work);
  }
};

}  // namespace

const Variant kListImages = VariantOf<ListImages>::row(
    "images", Layout::lists, {Op::spmm, Op::spmm_t, Op::sddmm}, true, INT64_MAX, false);

}  // namespace spfmt
