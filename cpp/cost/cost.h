// What a product will cost on this machine, and the choices that follow: which variant of a kernel
// runs, and whether threads are worth waking.
//
// A cost is linear in six terms of the workload (`Terms`), so it can be fitted to a few timed runs
// and read by people. Coefficients are compiled in: fitted to one CPU they choose as well on
// others, for what decides is how the variants' costs compare.
//
// The variant depends on the model, the structure and the batch alone, never on the threads:
// variants may round differently, and the number of threads must not change a bit.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../core/spfmt.h"

namespace spfmt {

// Samples up to which lanes may run over rows: what one vector holds of a feature side by side.
constexpr int64_t kSmallBatch = 16;

struct Variant;  // core/variant.h
constexpr int kMostVariants = 8;

// What the model knows of a structure.
struct Summary {
  Layout layout;
  int64_t rows, cols, nnz;
  // Weight vectors of 16 lanes, one per row, that one pass over the structure loads. Groups: the
  // widths of all tiles. Lists: the steps of slices of 16 rows, padding included, estimated from a
  // sample of neighbouring rows, so that it never depends on what was built before.
  int64_t vectors;
  // Lists: weights that octets hold, padding included, estimated likewise. Groups have none.
  int64_t octet_places;
};

Summary summarize(const Lists& lists);
Summary summarize(const Groups& groups);

// What a product asks for, whatever its structure.
struct Work {
  Op op;
  int64_t batch;
  DType dtype = DType::f32;
  bool packs = true;                   // whether a variant of packed values may be chosen
  const Geometry* geometry = nullptr;  // of images
};

// The terms of a cost in order: `call` is 1; the others count, in vectors of 16 elements or bytes,
//   operands    elements of X and Y, with samples that only fill a vector; of images with padding
//   stream      weight vectors loaded; where lanes run over samples, weights or vectors of X
//   multiply    multiply-adds
//   beyond_l2   bytes of weights that come from behind the L2 cache; beyond_l3 likewise
constexpr int kTerms = 6;
using Terms = std::array<double, kTerms>;
extern const std::array<const char*, kTerms> kTermNames;

struct CostModel {
  // Seconds per unit of each term: [isa][variant][op]. spmm_t of lists is spmm of the transposed
  // lists, and not every variant takes every op; the entries in between stay zero.
  Terms kernels[kIsas][kMostVariants][kOps];
  // The dense layers that spfmt is compared with. Convolutions by the CPU's level: [isa][op].
  Terms dense;
  Terms dense_images[kIsas][kOps];
  Terms winograd;  // the dense convolution's other way, at the level that has it
  double l2_bytes, l3_bytes;
  double wake_seconds;  // handing work to threads and waiting for the last
  // Share of each further thread that is won: t threads do 1 + (t - 1) * efficiency.
  double efficiency, dense_efficiency;
};

// How a product would run.
struct Choice {
  const Variant* variant;
  Isa isa;  // whose bodies serve
  int threads;
  double seconds;  // predicted, values packed already
};

// What variants count their terms by. `bytes` are those of the weights, which `passes` walks read.
Terms terms_of(const CostModel&, const Work&, double operands, double stream, double multiply,
               double bytes, double passes);
// Lanes over the rows of vectors, a few samples at a time.
Terms row_terms(const CostModel&, const Summary&, const Work&);
// Lanes over panels of samples; `stream` differs.
Terms panel_terms(const CostModel&, const Summary&, const Work&, double stream);
Terms dense_terms(const CostModel&, int64_t rows, int64_t cols, int64_t batch);

// What kernels count of one image of a work's geometry.
struct ImageCounts {
  int64_t height, width;  // outputs that one place of the weight adds to; of dX those of a phase
  int64_t row;            // numbers of a frame from one row of outputs to the next
  double operands;        // numbers of the maps of X, padded, and of Y
};
ImageCounts image_counts(int64_t rows, int64_t cols, const Work&);
// Images that are multiplied row by row of lists; lists/images.cpp.
Terms row_list_terms(const CostModel&, const Summary&, const Work&);
// Of a dense convolution, computed directly or by Winograd's F(2x2, 3x3).
Terms dense_image_terms(const CostModel&, int64_t rows, int64_t cols, const Work&, bool winograd);

double kernel_seconds(const CostModel&, Isa, const Variant&, const Summary&, const Work&,
                      int threads);
double dense_seconds(const CostModel&, int64_t rows, int64_t cols, int64_t batch, int threads);
// The faster way of a dense convolution on a CPU whose best level is `isa`.
double dense_image_seconds(const CostModel&, Isa isa, int64_t rows, int64_t cols, const Work&,
                           int threads);

// The fastest variant at a level, and all of `threads` threads or one.
Choice choose(const CostModel&, Isa, const Summary&, const Work&, int threads);
// The same for a plan under the model in use.
Choice choose(Isa, const Plan&, const Work&, int threads);

// Makes products that are called from this thread run the variant of this name wherever it exists:
// comparisons and tests of variants do. Empty returns to the model's choice.
void force_variant(const std::string& name);

// The model in use: the defaults, unless another was set.
const CostModel& cost_model();
// Takes effect for every product that begins afterwards.
void set_cost_model(const CostModel& model);
CostModel default_cost_model();

constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Names of all coefficients, such as "avx512.lists.spmm.lookup.stream", and their places.
std::vector<std::pair<std::string, double*>> coefficients(CostModel& model);

}  // namespace spfmt
