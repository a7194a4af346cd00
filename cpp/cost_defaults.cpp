// Coefficients that hold until this machine is calibrated, measured on a Zen 4 core (1 MiB of L2,
// 32 MiB of L3). `python -m benchmarks.advise --defaults` prints the table for another one.
#include <map>

#include "cost.h"

namespace spfmt {
namespace {

struct Row {
  const char* name;
  Terms unit;  // call, operands, stream, multiply, beyond_l2, beyond_l3
};

// clang-format off
constexpr Row kRows[] = {
    {"avx2.row_groups.sddmm.panels", {6.66e-06, 0, 1.91e-09, 8.42e-10, 4.32e-10, 2.5e-11}},
    {"avx2.row_groups.spmm.panels", {3.77e-06, 2.23e-09, 1.31e-10, 3.64e-10, 0, 2.5e-11}},
    {"avx2.row_groups.spmm.tokens", {3.48e-06, 5.76e-09, 3.97e-10, 2.18e-10, 2.97e-12, 2.5e-11}},
    {"avx2.row_groups.spmm_t.panels", {3.66e-06, 3.07e-09, 1.1e-09, 3.18e-10, 0, 2.5e-11}},
    {"avx2.row_groups.spmm_t.tokens", {3.44e-06, 5.27e-09, 1.78e-09, 4.92e-10, 0, 2.5e-11}},
    {"avx2.row_lists.sddmm.panels", {4.39e-06, 2.55e-09, 8.43e-10, 5.3e-10, 0, 2.5e-11}},
    {"avx2.row_lists.spmm.panels", {3.65e-06, 1.95e-09, 2.93e-10, 4.22e-10, 3.5e-11, 2.5e-11}},
    {"avx2.row_lists.spmm.tokens", {3.42e-06, 0, 5.85e-10, 4.43e-09, 0, 2.5e-11}},
    {"avx512.row_groups.sddmm.panels", {5.2e-06, 0, 1.61e-09, 4.57e-10, 6.07e-11, 2.5e-11}},
    {"avx512.row_groups.spmm.panels", {3.82e-06, 1.87e-09, 1.08e-10, 2.89e-10, 0, 2.5e-11}},
    {"avx512.row_groups.spmm.tokens", {3.45e-06, 6.56e-09, 5.62e-10, 1.42e-10, 1.62e-12, 2.5e-11}},
    {"avx512.row_groups.spmm_t.panels", {3.75e-06, 1.97e-09, 8.69e-10, 2.74e-10, 0, 2.5e-11}},
    {"avx512.row_groups.spmm_t.tokens", {3.12e-06, 1.85e-08, 1.34e-09, 3.8e-10, 7.54e-12, 2.5e-11}},
    {"avx512.row_lists.sddmm.panels", {4.01e-06, 2.3e-09, 4.07e-10, 3.96e-10, 0, 2.5e-11}},
    {"avx512.row_lists.spmm.panels", {3.7e-06, 1.11e-09, 1.56e-10, 4.12e-10, 0, 2.5e-11}},
    {"avx512.row_lists.spmm.tokens", {3.34e-06, 5.36e-09, 4.76e-10, 4.51e-10, 0, 2.5e-11}},
    {"dense", {4.05e-06, 7.51e-10, 4.12e-10, 2.76e-10, 7.59e-13, 2.5e-11}},
    {"scalar.row_groups.sddmm.panels", {6.88e-06, 0, 1.6e-08, 2.23e-09, 4.58e-10, 2.5e-11}},
    {"scalar.row_groups.spmm.panels", {4.19e-06, 6.98e-09, 9.78e-11, 1.02e-09, 0, 2.5e-11}},
    {"scalar.row_groups.spmm.tokens", {3.52e-06, 1.19e-08, 5.15e-10, 8.02e-10, 1.1e-11, 2.5e-11}},
    {"scalar.row_groups.spmm_t.panels", {3.94e-06, 8.3e-09, 1.93e-09, 1.03e-09, 0, 2.5e-11}},
    {"scalar.row_groups.spmm_t.tokens", {3.3e-06, 2.27e-08, 6.99e-09, 1.22e-09, 1.09e-10, 2.5e-11}},
    {"scalar.row_lists.sddmm.panels", {4.16e-06, 7.77e-10, 5.09e-10, 6.14e-09, 0, 2.5e-11}},
    {"scalar.row_lists.spmm.panels", {3.68e-06, 7.08e-09, 4.09e-10, 9.79e-10, 0, 2.5e-11}},
    {"scalar.row_lists.spmm.tokens", {3.5e-06, 2.42e-09, 2.31e-09, 3.54e-09, 0, 2.5e-11}},
};
// clang-format on

}  // namespace

CostModel default_cost_model() {
  CostModel model{};
  const std::map<std::string, double> single = {{"l2_bytes", 1 << 20},
                                                {"l3_bytes", 32 << 20},
                                                {"wake_seconds", 5e-6},
                                                {"efficiency", 0.9},
                                                {"dense_efficiency", 0.9}};
  std::map<std::string, const Terms*> rows;
  for (const Row& row : kRows) rows[row.name] = &row.unit;
  for (const auto& [key, place] : coefficients(model)) {
    const size_t dot = key.rfind('.');
    if (dot == std::string::npos) {
      *place = single.at(key);
      continue;
    }
    const std::string term = key.substr(dot + 1);
    for (int i = 0; i < kTerms; ++i) {
      if (term == kTermNames[i]) *place = (*rows.at(key.substr(0, dot)))[i];
    }
  }
  return model;
}

}  // namespace spfmt
