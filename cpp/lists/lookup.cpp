#include "lookup.h"

#include <algorithm>
#include <vector>

#include "../core/threads.h"
#include "../core/variant.h"
#include "slice_pack.h"

namespace spfmt {
namespace {

// Some samples of X in the order the kernel reads them: block after block of 16 features, the
// samples of a block side by side, zeros behind the last feature as far as a window may reach.
template <class T>
struct StagedSamples {
  int64_t first;
  int samples;
  std::unique_ptr<Workspace> staged;
};

// The batch in groups of as many samples as the kernel takes at once, then of fewer: powers of two.
template <class T>
std::vector<StagedSamples<T>> stage(const LookupBodies<T>& lookup, const Matrix<const T>& x,
                                    int width, bool& finite) {
  const int64_t blocks = (x.rows + width - 1) / kBlockCols + 1;
  std::vector<StagedSamples<T>> groups;
  for (int64_t b = 0; b < x.cols;) {
    int n = lookup.samples;
    while (n > x.cols - b) n /= 2;
    auto staged = std::make_unique<Workspace>(sizeof(T) * blocks * kBlockCols * n);
    const Strided<const T> from{x.data + b * x.col_stride, x.row_stride, x.col_stride};
    finite &= lookup.stage(from, x.rows, n, blocks, staged->template as<T>());
    groups.push_back({b, n, std::move(staged)});
    b += n;
  }
  return groups;
}

// Levels whose windows differ make slices of their own.
template <int kWidest>
struct SlicesOf : SlicePack {
  explicit SlicesOf(SlicePack pack) : SlicePack(std::move(pack)) {}
};

template <int kWidest>
const SlicePack& slices_of(const Plan& plan, const Executor& executor) {
  return plan.made<SlicesOf<kWidest>>([&] {
    return std::make_shared<SlicesOf<kWidest>>(make_slices(plan.lists(), kWidest, executor));
  });
}
const SlicePack& slices_of(const Plan& plan, int widest, const Executor& executor) {
  return widest > 32 ? slices_of<64>(plan, executor) : slices_of<32>(plan, executor);
}

struct ListLookup {
  template <class T>
  static bool exists(const Bodies<T>& bodies) {
    return bodies.lookup.multiply != nullptr;
  }

  template <class T>
  static void run(const Bodies<T>& bodies, const Plan& plan, const Product& p,
                  const Executor& executor) {
    constexpr int64_t kRun =
        4;  // slices that stay in L1 while all groups of samples pass over them
    const LookupBodies<T>& lookup = bodies.lookup;
    const Plan& lists = plan.oriented(p.op);
    const SlicePack& pack = slices_of(lists, lookup.widest_window, executor);
    const Slices& slices = pack.view;
    const auto packed =
        lists.packed<T>(&kListLookup, p, pack.places(), [&](T* to, const T* values) {
          pack_slice_values(lists.lists(), slices, lists.source(), values, to, executor);
        });
    bool finite = true;
    const auto groups = stage(lookup, p.in.as<const T>(), slices.width, finite);
    const T* bias = static_cast<const T*>(p.bias.data);
    const Matrix<T> out = p.out.as<T>();
    for_ranges(executor, slices.slices, range_step(executor, slices.slices),
               [&](int64_t begin, int64_t end) {
                 for (int64_t s = begin; s < end; s += kRun) {
                   for (const auto& g : groups) {
                     lookup.multiply(slices, packed->template as<T>(), g.staged->template as<T>(),
                                     g.samples, finite, bias, p.activation,
                                     samples_from(out, g.first), s, std::min(end, s + kRun));
                   }
                 }
               });
  }

  static Terms terms(const CostModel& model, const Summary& s, const Work& work) {
    return row_terms(model, s, work);
  }
};

}  // namespace

const Variant kListLookup = VariantOf<ListLookup>::row(
    "lookup", Layout::lists, {Op::spmm, Op::spmm_t}, false, kSmallBatch, true);

double lookup_padding(const Plan& plan, int widest) {
  const SlicePack& pack = slices_of(plan, widest, serial_executor());
  return static_cast<double>(pack.places()) / static_cast<double>(plan.nnz());
}

}  // namespace spfmt
