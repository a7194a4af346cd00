// Drivers of RowLists products.
#include "drivers.h"
#include "panels.h"

namespace spfmt {
namespace {

// Values in the order of the slices, zero where a lane is padding.
template <class T>
void pack_slice_values(const RowLists& a, const SlicePack& pack, const T* values, T* packed,
                       const Executor& executor) {
  for_ranges(executor, pack.view.slices, range_step(executor, pack.view.slices),
             [&](int64_t begin, int64_t end) {
               for (int64_t s = begin; s < end; ++s) {
                 const int32_t* row = pack.lane_row.data() + s * kRowTile;
                 const int64_t first = pack.step_ptr[pack.slice_ptr[s]];
                 const int64_t last = pack.step_ptr[pack.slice_ptr[s + 1]];
                 for (int64_t k = first * kRowTile; k < last * kRowTile; ++k) {
                   const int32_t from = pack.source[k];
                   packed[k] = from < 0 ? T(0) : values[a.indptr[row[k % kRowTile]] + from];
                 }
               }
             });
}

template <class T>
void spmm_tokens(const Tiles<T>& tiles, const Plan& plan, const Args<T>& args,
                 const Executor& executor) {
  const SlicePack& pack = plan.slices();
  const auto packed =
      pack.values.get(args.values_version, sizeof(T) * pack.packed(), [&](Buffer& buffer) {
        pack_slice_values(plan.lists(), pack, args.values, buffer.as<T>(), executor);
      });
  const Tokens<T> x(args.in);
  bool finite = true;
  for (int64_t b = 0; b < args.in.cols; ++b) finite &= tiles.all_finite(x[b], args.in.rows);
  for_ranges(executor, pack.view.slices, range_step(executor, pack.view.slices),
             [&](int64_t begin, int64_t end) {
               for_tokens(args.in.cols, [&](int64_t b, int n) {
                 tiles.slices_tokens(pack.view, packed->template as<T>(), x[b], x.stride(), n,
                                     finite, args.bias, samples_from(args.out, b), begin, end);
               });
             });
}

template <class T>
void spmm_panels(const Tiles<T>& tiles, const Plan& plan, const Args<T>& args,
                 const Executor& executor) {
  const RowLists& a = plan.lists();
  const RowTiles& pieces = plan.tiles().view;
  multiply_panels(tiles, args, executor, (a.rows + kRowChunk - 1) / kRowChunk,
                  [&](const Panel<const T>& x, T* y, int64_t ldy, int64_t begin, int64_t end) {
                    tiles.lists_panel(a, pieces, args.values, x, args.bias, y, ldy, begin, end);
                  });
}

}  // namespace

template <class T>
void lists_spmm(const Tiles<T>& tiles, const Plan& plan, const Args<T>& args, const Executor& all) {
  if (args.out.rows == 0 || args.out.cols == 0) return;
  const Executor executor = for_work(all, plan.nnz() * args.in.cols);
  if (args.in.cols < kTokenLimit) {
    spmm_tokens(tiles, plan, args, executor);
  } else {
    spmm_panels(tiles, plan, args, executor);
  }
}

// The transposed matrix is RowLists too: bring the values into its order, then multiply.
template <class T>
void lists_spmm_t(const Tiles<T>& tiles, const Plan& plan, const Args<T>& args,
                  const Executor& all) {
  if (args.out.rows == 0 || args.out.cols == 0) return;
  const Executor executor = for_work(all, plan.nnz() * args.in.cols);
  const TransposePack& pack = plan.transpose();
  const auto values =
      pack.values.get(args.values_version, sizeof(T) * plan.nnz(), [&](Buffer& buffer) {
        T* to = buffer.as<T>();
        for_ranges(executor, plan.nnz(), range_step(executor, plan.nnz()),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t p = begin; p < end; ++p) to[p] = args.values[pack.source[p]];
                   });
      });
  Args<T> forward = args;
  forward.values = values->template as<T>();
  forward.bias = nullptr;
  lists_spmm(tiles, *pack.plan, forward, all);
}

template <class T>
void lists_sddmm(const Tiles<T>& tiles, const Plan& plan, const Args<T>& args,
                 const Executor& all) {
  const RowLists& a = plan.lists();
  sample_product(tiles, plan, args, all, a.rows,
                 [&](const Panel<const T>* dy, const Panel<const T>* x, int panels, bool accumulate,
                     int64_t begin, int64_t end) {
                   tiles.lists_sddmm(a, dy, x, panels, accumulate, args.values, begin, end);
                 });
}

template void lists_spmm(const Tiles<float>&, const Plan&, const Args<float>&, const Executor&);
template void lists_spmm(const Tiles<double>&, const Plan&, const Args<double>&, const Executor&);
template void lists_spmm_t(const Tiles<float>&, const Plan&, const Args<float>&, const Executor&);
template void lists_spmm_t(const Tiles<double>&, const Plan&, const Args<double>&, const Executor&);
template void lists_sddmm(const Tiles<float>&, const Plan&, const Args<float>&, const Executor&);
template void lists_sddmm(const Tiles<double>&, const Plan&, const Args<double>&, const Executor&);

}  // namespace spfmt
