// Small batches of Lists products with rows as lanes, tokens side by side.
#include <algorithm>

#include "../core/drivers.h"
#include "../core/threads.h"
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

}  // namespace

template <class T>
void lists_tokens(const Tiles<T>& tiles, const Plan& plan, const int64_t* permutation,
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

template void lists_tokens(const Tiles<float>&, const Plan&, const int64_t*, const Args<float>&,
                           const Executor&);
template void lists_tokens(const Tiles<double>&, const Plan&, const int64_t*, const Args<double>&,
                           const Executor&);

}  // namespace spfmt
