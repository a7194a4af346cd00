// Drivers of Groups products. Weights are used where the caller keeps them: nothing is repacked.
#include "../core/drivers.h"
#include "../core/samples.h"

namespace spfmt {
namespace {

template <class T>
void spmm_panels(const Tiles<T>& tiles, const Plan& plan, const Args<T>& args,
                 const Executor& executor) {
  constexpr int64_t kTiles = 16;
  const Groups& a = plan.groups();
  const int64_t chunks = (a.tiles + kTiles - 1) / kTiles;
  for_panels(args.in.cols, kRowTile, executor,
             [&](int64_t begin, int64_t end, int width, const Executor& inner) {
               // The kernel writes whole vectors of samples.
               const bool direct = args.out.col_stride == 1 && (end - begin) % kRowTile == 0;
               const PanelSet<T> x(a.cols, begin, end, width),
                   y(direct ? 0 : a.rows, begin, end, width);
               x.pack(tiles, args.in, inner);
               for_each(inner, x.size() * chunks, [&](int64_t k) {
                 const int64_t i = k / chunks, first = k % chunks * kTiles;
                 const int64_t last = std::min(a.tiles, first + kTiles), row = a.row_ptr[first];
                 T* to = direct ? args.out.data + x.sample(i) : y[i].data;
                 const int64_t ldy = direct ? args.out.row_stride : y[i].width;
                 tiles.groups_panel(a, args.values, x.read(i), args.bias, to, ldy, first, last);
                 tiles.activate(args.activation, to, ldy, x.read(i).width, a.row_perm + row,
                                a.row_ptr[last] - row);
               });
               if (!direct) y.unpack(tiles, args.out, inner);
             });
}

template <class T>
void multiply_tokens(const Tiles<T>& tiles, const Groups& a, const Args<T>& args,
                     const Matrix<T>& y, bool quads, const Executor& executor) {
  const Samples<T> x(tiles, args.in);
  for_ranges(executor, a.tiles, range_step(executor, a.tiles), [&](int64_t begin, int64_t end) {
    for_parts(args.in.cols, tiles.most_tokens, [&](int64_t b, int n) {
      tiles.groups_tokens(a, args.values, x[b], n, args.bias, args.activation, samples_from(y, b),
                          quads, begin, end);
    });
  });
}

// Rows come in arbitrary order. Where a sample's features are contiguous, each number would meet
// another cache line, and from four samples on they do not fit L1: a row's samples are then written
// side by side, and transposed in the end. More than eight are the business of panels.
template <class T>
void spmm_tokens(const Tiles<T>& tiles, const Groups& a, const Args<T>& args,
                 const Executor& executor) {
  const Matrix<T>& out = args.out;
  if (out.col_stride == 1) {
    const bool quads = out.cols == 4 || out.cols == 8;  // whole ones: no room is needed
    return multiply_tokens(tiles, a, args, out, quads, executor);
  }
  if (out.cols < 4 || out.cols > kOctet) {
    return multiply_tokens(tiles, a, args, out, false, executor);
  }
  const Workspace rows(sizeof(T) * out.rows * kOctet);
  const Matrix<T> y{rows.template as<T>(), out.rows, out.cols, kOctet, 1};
  multiply_tokens(tiles, a, args, y, true, executor);
  const Panel<const T> panel{y.data, out.rows, kOctet, static_cast<int>(out.cols)};
  for_ranges(executor, out.rows, range_step(executor, out.rows), [&](int64_t begin, int64_t end) {
    tiles.unpack(panel, samples_from(out, 0), begin, end);
  });
}

// A panel accumulates all tiles in order, so panels are the only parallel work.
template <class T>
void spmm_t_panels(const Tiles<T>& tiles, const Plan& plan, const Args<T>& args,
                   const Executor& executor) {
  const Groups& a = plan.groups();
  for_strips(args.in.cols, kStrip, [&](int64_t begin, int64_t end) {
    const int width = panel_width(end - begin, executor.threads, kRowTile);
    const PanelSet<T> dy(a.rows, begin, end, width), dx(a.cols, begin, end, width);
    for_each(executor, dx.size(), [&](int64_t i) {
      tiles.pack(samples_from(args.in, dy.sample(i)), dy[i], 0, a.rows);
      std::fill_n(dx[i].data, a.cols * dx[i].width, T(0));
      tiles.groups_t_panel(a, args.values, dy.read(i), dx[i]);
      tiles.unpack(dx.read(i), samples_from(args.out, dx.sample(i)), 0, a.cols);
    });
  });
}

// Rows of dY gathered tile by tile, so that every tile's rows are one vector.
template <class T>
std::unique_ptr<Workspace> gather_tiles(const Groups& a, const Matrix<const T>& dy) {
  auto buffer = std::make_unique<Workspace>(sizeof(T) * dy.cols * a.tiles * kRowTile);
  T* to = buffer->template as<T>();
  std::fill_n(to, dy.cols * a.tiles * kRowTile, T(0));
  for (int64_t b = 0; b < dy.cols; ++b) {
    for (int64_t t = 0; t < a.tiles; ++t, to += kRowTile) {
      for (int64_t i = a.row_ptr[t]; i < a.row_ptr[t + 1]; ++i) {
        to[i - a.row_ptr[t]] = dy.data[a.row_perm[i] * dy.row_stride + b * dy.col_stride];
      }
    }
  }
  return buffer;
}

template <class T>
void spmm_t_tokens(const Tiles<T>& tiles, const Plan& plan, const Args<T>& args,
                   const Executor& executor) {
  const Groups& a = plan.groups();
  const ColumnEntries& entries = plan.columns().view;
  const auto dy = gather_tiles(a, args.in);
  for_ranges(executor, a.cols, range_step(executor, a.cols), [&](int64_t begin, int64_t end) {
    for_parts(args.in.cols, 4, [&](int64_t b, int n) {
      tiles.groups_t_tokens(a, entries, args.values, dy->template as<T>() + b * a.tiles * kRowTile,
                            n, samples_from(args.out, b), begin, end);
    });
  });
}

}  // namespace

template <class T>
void groups_spmm(const Tiles<T>& tiles, const Plan& plan, Variant variant, const Args<T>& args,
                 const Executor& executor) {
  if (args.out.rows == 0 || args.out.cols == 0) return;
  const Groups& a = plan.groups();
  if (variant == Variant::panels) return spmm_panels(tiles, plan, args, executor);
  spmm_tokens(tiles, a, args, executor);
}

template <class T>
void groups_spmm_t(const Tiles<T>& tiles, const Plan& plan, Variant variant, const Args<T>& args,
                   const Executor& executor) {
  if (args.out.rows == 0 || args.out.cols == 0) return;
  if (variant == Variant::tokens) {
    spmm_t_tokens(tiles, plan, args, executor);
  } else {
    spmm_t_panels(tiles, plan, args, executor);
  }
}

template <class T>
void groups_sddmm(const Tiles<T>& tiles, const Plan& plan, Variant, const Args<T>& args,
                  const Executor& executor) {
  const Groups& a = plan.groups();
  sample_product(tiles, plan, args, executor, kSampleStrip, kSampleStrip, a.tiles,
                 [&](const SampleRows<T>* dy, const PanelSet<T>& x, bool accumulate, int64_t begin,
                     int64_t end) {
                   tiles.groups_sddmm(a, *dy, x.read(0), accumulate, args.values, begin, end);
                 });
}

template void groups_spmm(const Tiles<float>&, const Plan&, Variant, const Args<float>&,
                          const Executor&);
template void groups_spmm(const Tiles<double>&, const Plan&, Variant, const Args<double>&,
                          const Executor&);
template void groups_spmm_t(const Tiles<float>&, const Plan&, Variant, const Args<float>&,
                            const Executor&);
template void groups_spmm_t(const Tiles<double>&, const Plan&, Variant, const Args<double>&,
                            const Executor&);
template void groups_sddmm(const Tiles<float>&, const Plan&, Variant, const Args<float>&,
                           const Executor&);
template void groups_sddmm(const Tiles<double>&, const Plan&, Variant, const Args<double>&,
                           const Executor&);

}  // namespace spfmt
