// The coefficients, fitted on one core of a Zen 5 (1 MiB of L2, 32 MiB of L3) by least squares of
// relative errors. Ones fitted to other CPUs chose this one's variants 1.6 % (lists) and 0.5 %
// (groups) worse than a fit of its own, which was not worth a file of each machine's own;
// `python -m benchmarks.advise` shows how well they do.
//
// Convolutions (conv2d, dense ones too) were fitted by `python -m benchmarks.fit` on one core of an
// AMD EPYC without AVX-512, shared with others: avx2 and scalar rows of images, and avx2 rows of
// torch's dense convolution. Not fitted: avx512 rows, which are the avx2 rows with half the time
// for operands, streams and multiplications; scalar.dense rows, four times that of multiplications;
// and avx512.dense.winograd, read off four timings of torch on a Zen 4. Run the fit again where
// kernels of images change.
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
    {"avx2.dense.conv2d", {1.71e-05, 1.04e-08, 3.07e-10, 5.15e-10, 1.44e-10, 2.5e-11}},
    {"avx2.dense.conv2d_input", {2.34e-05, 1.83e-08, 6.51e-09, 4.65e-10, 9.66e-11, 2.5e-11}},
    {"avx2.dense.conv2d_weight", {2.16e-05, 3.99e-09, 0, 6.65e-10, 1.05e-10, 2.5e-11}},
    {"avx2.groups.conv2d.images", {4.65e-05, 5.4e-09, 2.45e-09, 5.82e-10, 0, 2.5e-11}},
    {"avx2.groups.conv2d.rows", {4.54e-05, 9.13e-09, 1.93e-09, 9e-10, 3.37e-11, 2.5e-11}},
    {"avx2.groups.conv2d_input.images", {5.82e-05, 1.1e-08, 0, 1.06e-09, 2.28e-11, 2.5e-11}},
    {"avx2.groups.conv2d_input.rows", {5.79e-05, 3.21e-09, 1.28e-09, 1.13e-09, 1.19e-10, 2.5e-11}},
    {"avx2.groups.conv2d_weight.images", {4.96e-05, 5.16e-09, 9.22e-09, 5.06e-10, 0, 2.5e-11}},
    {"avx2.groups.conv2d_weight.rows", {4.76e-05, 1.46e-08, 1.75e-09, 1.08e-09, 1.01e-10, 2.5e-11}},
    {"avx2.groups.sddmm.panels", {1.73e-06, 8.35e-11, 1.41e-09, 4.53e-10, 5.34e-11, 2.5e-11}},
    {"avx2.groups.spmm.bands", {6.97e-07, 2.19e-09, 2e-10, 1.66e-10, 3.31e-12, 2.5e-11}},
    {"avx2.groups.spmm.panels", {9.24e-07, 1.41e-09, 1.05e-11, 2.77e-10, 6.62e-13, 2.5e-11}},
    {"avx2.groups.spmm_t.bands", {6.7e-07, 4.57e-09, 1.58e-09, 2.63e-10, 8.72e-13, 2.5e-11}},
    {"avx2.groups.spmm_t.panels", {8.43e-07, 1.84e-09, 6.63e-10, 2.24e-10, 0, 2.5e-11}},
    {"avx2.lists.conv2d.images", {4.88e-05, 9.42e-09, 1.2e-09, 9.47e-10, 2.45e-11, 2.5e-11}},
    {"avx2.lists.conv2d_input.images", {5.89e-05, 3.82e-09, 1.24e-09, 1.11e-09, 1.75e-10, 2.5e-11}},
    {"avx2.lists.conv2d_weight.images", {4.78e-05, 1.44e-08, 1.32e-09, 1.11e-09, 5.12e-12, 2.5e-11}},
    {"avx2.lists.sddmm.panels", {6.95e-07, 2.54e-09, 3.27e-10, 2.67e-10, 0, 2.5e-11}},
    {"avx2.lists.spmm.lookup", {7.07e-07, 8.6e-09, 2.43e-10, 1.55e-09, 0, 2.5e-11}},
    {"avx2.lists.spmm.octets", {7.75e-07, 1.51e-09, 0, 1.72e-10, 0, 2.5e-11}},
    {"avx2.lists.spmm.panels", {7.51e-07, 1.59e-09, 1.11e-10, 3.08e-10, 0, 2.5e-11}},
    {"avx512.dense.conv2d", {1.71e-05, 5.19e-09, 1.53e-10, 2.58e-10, 1.44e-10, 2.5e-11}},
    {"avx512.dense.conv2d_input", {2.34e-05, 9.16e-09, 3.26e-09, 2.33e-10, 9.66e-11, 2.5e-11}},
    {"avx512.dense.conv2d_weight", {2.16e-05, 1.99e-09, 0, 3.33e-10, 1.05e-10, 2.5e-11}},
    {"avx512.dense.winograd", {1e-05, 4.5e-08, 1e-08, 4.5e-10, 0, 2.5e-11}},
    {"avx512.groups.conv2d.images", {4.65e-05, 2.7e-09, 1.22e-09, 2.91e-10, 0, 2.5e-11}},
    {"avx512.groups.conv2d.rows", {4.54e-05, 4.56e-09, 9.67e-10, 4.5e-10, 3.37e-11, 2.5e-11}},
    {"avx512.groups.conv2d_input.images", {5.82e-05, 5.51e-09, 0, 5.3e-10, 2.28e-11, 2.5e-11}},
    {"avx512.groups.conv2d_input.rows", {5.79e-05, 1.6e-09, 6.39e-10, 5.65e-10, 1.19e-10, 2.5e-11}},
    {"avx512.groups.conv2d_weight.images", {4.96e-05, 2.58e-09, 4.61e-09, 2.53e-10, 0, 2.5e-11}},
    {"avx512.groups.conv2d_weight.rows", {4.76e-05, 7.32e-09, 8.73e-10, 5.4e-10, 1.01e-10, 2.5e-11}},
    {"avx512.groups.sddmm.panels", {1.25e-06, 6.31e-10, 1.07e-09, 2.24e-10, 3.63e-11, 2.5e-11}},
    {"avx512.groups.spmm.bands", {7.51e-07, 2.31e-09, 2.35e-10, 1.38e-10, 1.91e-12, 2.5e-11}},
    {"avx512.groups.spmm.panels", {9.05e-07, 1.15e-09, 1.2e-10, 1.27e-10, 0, 2.5e-11}},
    {"avx512.groups.spmm_t.bands", {6.32e-07, 1e-08, 1.06e-09, 2.08e-10, 1.02e-11, 2.5e-11}},
    {"avx512.groups.spmm_t.panels", {8.44e-07, 1.22e-09, 5.7e-10, 1.36e-10, 3.31e-12, 2.5e-11}},
    {"avx512.lists.conv2d.images", {4.88e-05, 4.71e-09, 6e-10, 4.73e-10, 2.45e-11, 2.5e-11}},
    {"avx512.lists.conv2d_input.images", {5.89e-05, 1.91e-09, 6.22e-10, 5.55e-10, 1.75e-10, 2.5e-11}},
    {"avx512.lists.conv2d_weight.images", {4.78e-05, 7.18e-09, 6.62e-10, 5.57e-10, 5.12e-12, 2.5e-11}},
    {"avx512.lists.sddmm.panels", {7.25e-07, 1.59e-09, 2.47e-10, 2.17e-10, 0, 2.5e-11}},
    {"avx512.lists.spmm.lookup", {6.77e-07, 5.26e-09, 5.73e-10, 1.36e-10, 0, 2.5e-11}},
    {"avx512.lists.spmm.octets", {7.56e-07, 1.6e-09, 0, 1.68e-10, 0, 2.5e-11}},
    {"avx512.lists.spmm.panels", {7.31e-07, 6.57e-10, 9.12e-11, 2.42e-10, 0, 2.5e-11}},
    {"dense", {3.01e-06, 3.9e-10, 3.17e-10, 1.17e-10, 1.23e-12, 2.5e-11}},
    {"scalar.dense.conv2d", {1e-05, 1e-08, 1e-08, 2e-09, 0, 2.5e-11}},
    {"scalar.dense.conv2d_input", {1e-05, 1e-08, 1e-08, 2e-09, 0, 2.5e-11}},
    {"scalar.dense.conv2d_weight", {1e-05, 1e-08, 1e-08, 2e-09, 0, 2.5e-11}},
    {"scalar.groups.conv2d.images", {4.65e-05, 5.86e-09, 0, 1.94e-09, 0, 2.5e-11}},
    {"scalar.groups.conv2d.rows", {4.93e-05, 8.45e-09, 2.63e-09, 1.73e-09, 2.74e-10, 2.5e-11}},
    {"scalar.groups.conv2d_input.images", {5.8e-05, 1.35e-08, 2.6e-08, 6.95e-09, 1.68e-09, 2.5e-11}},
    {"scalar.groups.conv2d_input.rows", {5.93e-05, 3.14e-09, 1.33e-09, 2.03e-09, 2.51e-10, 2.5e-11}},
    {"scalar.groups.conv2d_weight.images", {5.09e-05, 6.47e-09, 3.05e-08, 1.65e-09, 0, 2.5e-11}},
    {"scalar.groups.conv2d_weight.rows", {5.02e-05, 9.73e-09, 2.24e-09, 9.08e-09, 5.06e-10, 2.5e-11}},
    {"scalar.groups.sddmm.panels", {2.52e-06, 0, 3.83e-09, 1.92e-09, 1.34e-10, 2.5e-11}},
    {"scalar.groups.spmm.bands", {8.4e-07, 7.17e-09, 3.83e-10, 6.32e-10, 1.22e-11, 2.5e-11}},
    {"scalar.groups.spmm.panels", {8.85e-07, 5.95e-09, 0, 7.11e-10, 7.68e-12, 2.5e-11}},
    {"scalar.groups.spmm_t.bands", {5.97e-07, 1.66e-08, 5.75e-09, 7.95e-10, 3.48e-11, 2.5e-11}},
    {"scalar.groups.spmm_t.panels", {7.79e-07, 5.96e-09, 1.11e-09, 7.07e-10, 1.61e-12, 2.5e-11}},
    {"scalar.lists.conv2d.images", {4.84e-05, 9.99e-09, 1.45e-09, 1.72e-09, 0, 2.5e-11}},
    {"scalar.lists.conv2d_input.images", {5.76e-05, 4.37e-09, 1.95e-09, 1.98e-09, 4.87e-10, 2.5e-11}},
    {"scalar.lists.conv2d_weight.images", {4.9e-05, 1.88e-08, 1.07e-09, 9.09e-09, 6.67e-10, 2.5e-11}},
    {"scalar.lists.sddmm.panels", {1.72e-07, 1.61e-08, 5.28e-10, 3.27e-09, 0, 2.5e-11}},
    {"scalar.lists.spmm.lookup", {6.94e-07, 4.86e-09, 1.42e-09, 4.93e-09, 0, 2.5e-11}},
    {"scalar.lists.spmm.octets", {8.1e-07, 5.09e-09, 0, 3.87e-10, 1.79e-12, 2.5e-11}},
    {"scalar.lists.spmm.panels", {7.22e-07, 5.6e-09, 4.23e-12, 7.45e-10, 0, 2.5e-11}},
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
