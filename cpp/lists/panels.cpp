// Drivers of Lists products.
#include "../core/drivers.h"
#include "../core/samples.h"

namespace spfmt {
namespace {

// Values in the order in which the pieces are visited. `permutation` (or null) maps a position of
// the structure to a place in `values`.
template <class T>
void pack_piece_values(const TilePack& pack, const int64_t* permutation, const T* values, T* packed,
                       const Executor& executor) {
  const RowTiles& a = pack.view;
  for_each(executor, pack.chunks(), [&](int64_t chunk) {
    T* to = packed + a.visit_ptr[chunk * a.tiles];
    for (int64_t p = a.piece_ptr[chunk * a.tiles]; p < a.piece_ptr[(chunk + 1) * a.tiles]; ++p) {
      const int64_t from = a.base[chunk] + a.piece[p].start;
      const int count = a.piece[p].count;
      if (permutation) {
        for (int k = 0; k < count; ++k) to[k] = values[permutation[from + k]];
      } else {
        std::copy_n(values + from, count, to);
      }
      to += count;
    }
  });
}

// Each chunk of rows is summed in a scratch panel that stays in cache, then written to Y in its own
// layout: the only time that Y's memory is touched.
template <class T>
void multiply_panels(const Tiles<T>& tiles, const Lists& a, const TilePack& pack,
                     const T* packed, const Args<T>& args, const Executor& executor) {
  for_panels(args.in.cols, kPanel / 2, executor,
             [&](int64_t begin, int64_t end, int width, const Executor& inner) {
               const PanelSet<T> x(args.in.rows, begin, end, width);
               x.pack(tiles, args.in, inner);
               for_each(inner, x.size() * pack.chunks(), [&](int64_t k) {
                 const int64_t chunk = k % pack.chunks(), row = chunk * kRowChunk;
                 const int64_t rows = std::min(kRowChunk, a.rows - row);
                 const Panel<const T>& panel = x.read(k / pack.chunks());
                 const Workspace scratch(sizeof(T) * rows * panel.width);
                 T* y = scratch.template as<T>();
                 tiles.lists_panel(pack.view, packed, panel, args.bias, y, chunk);
                 tiles.activate(args.activation, y, panel.width, panel.width, nullptr, rows);
                 Strided<T> to = samples_from(args.out, x.sample(k / pack.chunks()));
                 to.data += row * to.feature_stride;
                 tiles.unpack({y, rows, panel.width, panel.samples}, to, 0, rows);
               });
             });
}

template <class T>
void spmm_panels(const Tiles<T>& tiles, const Plan& plan, const int64_t* permutation,
                 const Args<T>& args, const Executor& executor) {
  const TilePack& pack = plan.tiles();
  const auto packed =
      pack.values.get(args.values_version, sizeof(T) * plan.nnz(), [&](Buffer& buffer) {
        pack_piece_values(pack, permutation, args.values, buffer.as<T>(), executor);
      });
  multiply_panels(tiles, plan.lists(), pack, packed->template as<T>(), args, executor);
}

template <class T>
void spmm(const Tiles<T>& tiles, const Plan& plan, Variant variant, const int64_t* permutation,
          const Args<T>& args, const Executor& executor) {
  if (args.out.rows == 0 || args.out.cols == 0) return;
  const auto run = variant == Variant::tokens   ? lists_tokens<T>
                   : variant == Variant::octets ? lists_octets<T>
                                                : spmm_panels<T>;
  run(tiles, plan, permutation, args, executor);
}

}  // namespace

template <class T>
void lists_spmm(const Tiles<T>& tiles, const Plan& plan, Variant variant, const Args<T>& args,
                const Executor& executor) {
  spmm(tiles, plan, variant, nullptr, args, executor);
}

// The transposed matrix is Lists too: bring the values into its order, then multiply.
template <class T>
void lists_spmm_t(const Tiles<T>& tiles, const Plan& plan, Variant variant, const Args<T>& args,
                  const Executor& executor) {
  const TransposePack& pack = plan.transpose();
  spmm(tiles, *pack.plan, variant, pack.source.data(), args, executor);
}

template <class T>
void lists_sddmm(const Tiles<T>& tiles, const Plan& plan, Variant, const Args<T>& args,
                 const Executor& executor) {
  // Short strips keep X in L2; longer ones come back less often to a gradient that leaves it.
  constexpr int64_t kShortStrip = 2 * kPanel, kCachedValues = 1 << 20;
  const int64_t strip = plan.nnz() <= kCachedValues ? kShortStrip : kStrip;
  const TilePack& pack = plan.tiles();
  sample_product(tiles, plan, args, executor, strip, kPanel, pack.chunks(),
                 [&](const SampleRows<T>* dy, const PanelSet<T>& x, bool accumulate, int64_t begin,
                     int64_t end) {
                   for (int64_t chunk = begin; chunk < end; ++chunk) {
                     tiles.lists_sddmm(pack.view, dy, x.read(), static_cast<int>(x.size()),
                                       accumulate, args.values, chunk);
                   }
                 });
}

template void lists_spmm(const Tiles<float>&, const Plan&, Variant, const Args<float>&,
                         const Executor&);
template void lists_spmm(const Tiles<double>&, const Plan&, Variant, const Args<double>&,
                         const Executor&);
template void lists_spmm_t(const Tiles<float>&, const Plan&, Variant, const Args<float>&,
                           const Executor&);
template void lists_spmm_t(const Tiles<double>&, const Plan&, Variant, const Args<double>&,
                           const Executor&);
template void lists_sddmm(const Tiles<float>&, const Plan&, Variant, const Args<float>&,
                          const Executor&);
template void lists_sddmm(const Tiles<double>&, const Plan&, Variant, const Args<double>&,
                          const Executor&);

}  // namespace spfmt
