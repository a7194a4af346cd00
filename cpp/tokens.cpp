// Small batches of RowLists products: lanes over rows, tokens side by side, or eight samples as
// lanes.
#include <algorithm>

#include "drivers.h"
#include "parallel.h"
#include "slice_pack.h"

namespace spfmt {
namespace {

// Some tokens of X in the order the kernel reads them: block after block of 16 features, the tokens
// of a block side by side, zeros behind the last feature as far as a window may reach.
template <class T>
struct TokenGroup {
  int64_t first;
  int tokens;
  std::unique_ptr<Workspace> staged;
};

// The batch in groups of as many tokens as the kernel takes at once, then of fewer: powers of two.
template <class T>
std::vector<TokenGroup<T>> stage(const Tiles<T>& tiles, const Matrix<const T>& x, int width,
                                 bool& finite) {
  const int64_t blocks = (x.rows + width - 1) / kBlockCols + 1;
  std::vector<TokenGroup<T>> groups;
  for (int64_t b = 0; b < x.cols;) {
    int n = tiles.slice_tokens;
    while (n > x.cols - b) n /= 2;
    auto staged = std::make_unique<Workspace>(sizeof(T) * blocks * kBlockCols * n);
    const Strided<const T> from{x.data + b * x.col_stride, x.row_stride, x.col_stride};
    finite &= tiles.stage_tokens(from, x.rows, n, blocks, staged->template as<T>());
    groups.push_back({b, n, std::move(staged)});
    b += n;
  }
  return groups;
}

template <class T>
void multiply_tokens(const Tiles<T>& tiles, const Plan& plan, const int64_t* permutation,
                     const Args<T>& args, const Executor& executor) {
  constexpr int64_t kRun = 4;  // slices that stay in L1 while all groups of tokens pass over them
  const SlicePack& pack = plan.slices(tiles.widest_window, executor);
  const RowSlices& slices = pack.view;
  const auto packed =
      pack.values.get(args.values_version, sizeof(T) * pack.packed(), [&](Buffer& buffer) {
        pack_slice_values(plan.lists(), slices, permutation, args.values, buffer.as<T>(), executor);
      });
  bool finite = true;
  const auto groups = stage(tiles, args.in, slices.width, finite);
  for_ranges(executor, slices.slices, range_step(executor, slices.slices),
             [&](int64_t begin, int64_t end) {
               for (int64_t s = begin; s < end; s += kRun) {
                 for (const auto& g : groups) {
                   const Strided<T> y{args.out.data + g.first * args.out.col_stride,
                                      args.out.row_stride, args.out.col_stride};
                   tiles.slices_tokens(slices, packed->template as<T>(), g.staged->template as<T>(),
                                       g.tokens, finite, args.bias, args.activation, y, s,
                                       std::min(end, s + kRun));
                 }
               }
             });
}

// Up to eight samples, lanes over samples, straight from the caller's values.
template <class T>
void multiply_octet(const Tiles<T>& tiles, const RowLists& a, const Args<T>& args,
                    const Executor& executor) {
  const Workspace staged(sizeof(T) * a.cols * kOctet);
  const int n = static_cast<int>(args.in.cols);
  tiles.stage_octet({args.in.data, args.in.row_stride, args.in.col_stride}, a.cols, n,
                    staged.as<T>());
  const int64_t step = (range_step(executor, a.rows) + kRowTile - 1) / kRowTile * kRowTile;
  for_ranges(executor, a.rows, step, [&](int64_t begin, int64_t end) {
    tiles.lists_octet(a, args.values, staged.as<T>(), n, args.bias, args.activation,
                      {args.out.data, args.out.row_stride, args.out.col_stride}, begin, end);
  });
}

// Tokens cost by the place, padding included, and by the column, to stage X; an octet by the
// nonzero, however few of its samples are in use. One that leaves first-level cache costs half as
// much again.
template <class T>
bool prefers_octet(const Tiles<T>& tiles, const Plan& plan, int64_t batch,
                   const Executor& executor) {
  constexpr int64_t kOctetColumn = 20, kCachedColumns = 1024;
  if (batch == 1 || batch > kOctet) return false;
  const int64_t places = plan.slices(tiles.widest_window, executor).packed();
  const int64_t spill = plan.cols() > kCachedColumns ? tiles.octet_cost * plan.nnz() / 2 : 0;
  const int64_t octet = tiles.octet_cost * plan.nnz() + spill + kOctetColumn * plan.cols();
  return octet < batch * (places + plan.cols());
}

}  // namespace

template <class T>
void lists_small_batch(const Tiles<T>& tiles, const Plan& plan, const int64_t* permutation,
                       const Args<T>& args, const Executor& executor) {
  // An octet takes values straight from the caller, so they must be in order.
  if (!permutation && prefers_octet(tiles, plan, args.in.cols, executor)) {
    multiply_octet(tiles, plan.lists(), args, executor);
  } else {
    multiply_tokens(tiles, plan, permutation, args, executor);
  }
}

template void lists_small_batch(const Tiles<float>&, const Plan&, const int64_t*,
                                const Args<float>&, const Executor&);
template void lists_small_batch(const Tiles<double>&, const Plan&, const int64_t*,
                                const Args<double>&, const Executor&);

}  // namespace spfmt
