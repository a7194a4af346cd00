#include <algorithm>
#include <numeric>
#include <vector>

#include "../core/variant.h"

// Convolutions of narrow bands: a band of four rows would leave most lanes of a vector empty, so
// its rows are multiplied one by one, as lists are. Values are put in the order of the rows for
// each product, which takes as long as reading them.
namespace spfmt {
namespace {

struct BandRows {
  std::vector<int64_t> indptr, source;
  std::vector<int32_t> cols;
  RowLists view;

  explicit BandRows(const Groups& a) : indptr(a.rows + 1) {
    for (int64_t t = 0; t < a.bands; ++t) {
      for (int64_t i = a.row_ptr[t]; i < a.row_ptr[t + 1]; ++i) {
        indptr[a.row_perm[i] + 1] = a.col_end[t] - a.col_begin[t];
      }
    }
    std::partial_sum(indptr.begin(), indptr.end(), indptr.begin());
    cols.resize(indptr.back());
    source.resize(indptr.back());
    for (int64_t t = 0; t < a.bands; ++t) place(a, t);
    view = {{a.rows, a.cols, indptr.data(), cols.data()}, source.data()};
  }
  BandRows(const BandRows&) = delete;  // `view` points into it
  int64_t nbytes() const {
    return static_cast<int64_t>(8 * (indptr.size() + source.size()) + 4 * cols.size());
  }

 private:
  void place(const Groups& a, int64_t t) {
    const int64_t n = a.row_ptr[t + 1] - a.row_ptr[t];
    std::vector<int64_t> order(a.col_end[t] - a.col_begin[t]);
    std::iota(order.begin(), order.end(), int64_t{0});
    const int32_t* col = a.col_indices + a.col_begin[t];
    std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return col[i] < col[j]; });
    for (int64_t i = 0; i < n; ++i) {
      int64_t at = indptr[a.row_perm[a.row_ptr[t] + i]];
      for (const int64_t j : order) {
        cols[at] = col[j];
        source[at++] = a.value_ptr[t] + j * n + i;
      }
    }
  }
};

}  // namespace

template <class T>
void run_band_rows(const Bodies<T>& bodies, const Plan& plan, const Product& p,
                   const Executor& executor) {
  const BandRows& rows =
      plan.made<BandRows>([&] { return std::make_shared<const BandRows>(plan.groups()); });
  run_row_lists(bodies, plan, rows.view, p, executor);
}
template void run_band_rows(const Bodies<float>&, const Plan&, const Product&, const Executor&);
template void run_band_rows(const Bodies<double>&, const Plan&, const Product&, const Executor&);

namespace {

struct GroupRows {
  template <class T>
  static bool exists(const Bodies<T>& bodies) {
    return bodies.list_images.multiply != nullptr;
  }
  template <class T>
  static void run(const Bodies<T>& bodies, const Plan& plan, const Product& p,
                  const Executor& executor) {
    run_band_rows(bodies, plan, p, executor);
  }
  static Terms terms(const CostModel& model, const Summary& s, const Work& work) {
    return row_list_terms(model, s, work);
  }
};

}  // namespace

const Variant kGroupRows = VariantOf<GroupRows>::row(
    "rows", Layout::groups, {Op::spmm, Op::spmm_t, Op::sddmm}, true, INT64_MAX, false);

}  // namespace spfmt
