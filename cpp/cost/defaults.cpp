// Coefficients that hold until this machine is calibrated, measured on a Zen 4 core (1 MiB of L2,
// 32 MiB of L3), those of octets and of avx2's lookup on Zen 3 and scaled by its clock.
// `python -m benchmarks.advise --defaults` prints the table for another one.
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
    {"avx2.groups.sddmm.panels", {6.64e-06, 0, 2.18e-09, 7.96e-10, 3.33e-10, 2.5e-11}},
    {"avx2.groups.spmm.panels", {1.32e-06, 2.15e-09, 9.79e-11, 3.53e-10, 0, 2.5e-11}},
    {"avx2.groups.spmm.bands", {9.44e-07, 6.79e-09, 3.81e-10, 2.05e-10, 3.01e-12, 2.5e-11}},
    {"avx2.groups.spmm_t.panels", {1.22e-06, 2.68e-09, 9.47e-10, 3.22e-10, 0, 2.5e-11}},
    {"avx2.groups.spmm_t.bands", {8.34e-07, 8.18e-09, 1.64e-09, 4.31e-10, 0, 2.5e-11}},
    {"avx2.lists.sddmm.panels", {4.38e-06, 3.45e-09, 8.91e-10, 4.45e-10, 0, 2.5e-11}},
    {"avx2.lists.spmm.octets", {1.1e-06, 7e-09, 0, 2.9e-10, 0, 2.5e-11}},
    {"avx2.lists.spmm.panels", {1.24e-06, 2.2e-09, 2.77e-10, 4.05e-10, 4.16e-11, 2.5e-11}},
    {"avx2.lists.spmm.lookup", {9.21e-07, 6e-09, 6e-10, 3.7e-09, 0, 2.5e-11}},
    {"avx512.groups.sddmm.panels", {5.46e-06, 0, 1.58e-09, 4.4e-10, 6.53e-11, 2.5e-11}},
    {"avx512.groups.spmm.panels", {1.26e-06, 1.63e-09, 9.22e-11, 2.85e-10, 0, 2.5e-11}},
    {"avx512.groups.spmm.bands", {9.23e-07, 5.65e-09, 4.82e-10, 1.54e-10, 1.05e-12, 2.5e-11}},
    {"avx512.groups.spmm_t.panels", {1.19e-06, 1.9e-09, 7.91e-10, 2.75e-10, 0, 2.5e-11}},
    {"avx512.groups.spmm_t.bands", {7.7e-07, 1.53e-08, 1.2e-09, 4.16e-10, 0, 2.5e-11}},
    {"avx512.lists.sddmm.panels", {4.16e-06, 2.37e-09, 4.27e-10, 3.75e-10, 0, 2.5e-11}},
    {"avx512.lists.spmm.octets", {1.1e-06, 7e-09, 0, 2.9e-10, 0, 2.5e-11}},
    {"avx512.lists.spmm.panels", {1.15e-06, 1.25e-09, 1.66e-10, 3.89e-10, 0, 2.5e-11}},
    {"avx512.lists.spmm.lookup", {9.14e-07, 8.33e-09, 6.16e-10, 3.63e-10, 0, 2.5e-11}},
    {"dense", {4.07e-06, 1e-09, 4.27e-10, 2.69e-10, 0, 2.5e-11}},
    {"scalar.groups.sddmm.panels", {7.53e-06, 0, 1.47e-08, 2.31e-09, 3.48e-10, 2.5e-11}},
    {"scalar.groups.spmm.panels", {1.59e-06, 8.52e-09, 2.26e-11, 9.87e-10, 0, 2.5e-11}},
    {"scalar.groups.spmm.bands", {9.72e-07, 1.36e-08, 9.8e-11, 8.61e-10, 1.19e-11, 2.5e-11}},
    {"scalar.groups.spmm_t.panels", {1.49e-06, 9.02e-09, 1.78e-09, 1.02e-09, 0, 2.5e-11}},
    {"scalar.groups.spmm_t.bands", {7.43e-07, 2.84e-08, 7.39e-09, 9.04e-10, 4.82e-11, 2.5e-11}},
    {"scalar.lists.sddmm.panels", {4.45e-06, 8.63e-09, 1.03e-09, 5.2e-09, 0, 2.5e-11}},
    {"scalar.lists.spmm.octets", {1.3e-06, 7e-09, 0, 5.5e-10, 0, 2.5e-11}},
    {"scalar.lists.spmm.panels", {1.18e-06, 8.08e-09, 4.02e-10, 9.63e-10, 0, 2.5e-11}},
    {"scalar.lists.spmm.lookup", {1.31e-06, 1.19e-08, 5.01e-09, 4.64e-09, 0, 2.5e-11}},
};
// clang-format on

}  // namespace

CostModel default_cost_model() {
  CostModel model{};
  const std::map<std::string, double> single = {{"l2_bytes", 1 << 20},
                                                {"l3_bytes", 32 << 20},
                                                {"wake_seconds", 3e-5},
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
