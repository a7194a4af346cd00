// What a product will cost on this machine, and the choices that follow: which variant of a kernel
// runs, and whether threads are worth waking.
//
// A cost is linear in six terms of the workload (`Terms`), so it can be fitted to a few timed runs
// and read by people. Coefficients are compiled in and may be replaced by a calibration file, which
// every library that holds this core reads at first use (see cost_file.cpp).
//
// The variant depends on the model, the structure and the batch alone, never on the threads:
// variants may round differently, and the number of threads must not change a bit.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../core/spfmt.h"

namespace spfmt {

// Samples up to which lanes may run over rows: what one vector holds of a feature side by side.
constexpr int64_t kMostTokens = kRowTile;

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

Summary summarize(const Lists& view);
Summary summarize(const Groups& view);

// The terms of a cost in order: `call` is 1; the others count, in vectors of 16 elements or bytes,
//   operands    elements of X and Y, with samples that only fill a vector
//   stream      weight vectors loaded; where lanes run over samples, weights or vectors of X
//   multiply    multiply-adds
//   beyond_l2   bytes of weights that come from behind the L2 cache; beyond_l3 likewise
constexpr int kTerms = 6;
using Terms = std::array<double, kTerms>;
extern const std::array<const char*, kTerms> kTermNames;

struct CostModel {
  // Seconds per unit of each term: [isa][layout][op][variant]. spmm_t of lists is spmm of the
  // transposed lists, and not every variant exists; the entries in between stay zero.
  Terms kernels[3][2][3][kVariants];
  // The dense layer that spfmt is compared with: the fastest library found at calibration.
  Terms dense;
  double l2_bytes, l3_bytes;
  double wake_seconds;  // handing work to threads and waiting for the last
  // Share of each further thread that is won: t threads do 1 + (t - 1) * efficiency.
  double efficiency, dense_efficiency;
};

// How a product would run.
struct Choice {
  Variant variant;
  int threads;
  double seconds;  // predicted, values packed already
};

Terms kernel_terms(const CostModel& model, Variant variant, const Summary& summary, int64_t batch);
Terms dense_terms(const CostModel& model, int64_t rows, int64_t cols, int64_t batch);

double kernel_seconds(const CostModel& model, Isa isa, Op op, Variant variant,
                      const Summary& summary, int64_t batch, int threads);
double dense_seconds(const CostModel& model, int64_t rows, int64_t cols, int64_t batch,
                     int threads);

// sddmm has panels only, octets exist for lists only, and batches above kMostTokens are panels.
bool has_variant(Layout layout, Op op, Variant variant, int64_t batch);

// The fastest variant, and all of `threads` threads or one.
Choice choose(const CostModel& model, Isa isa, Op op, const Summary& summary, int64_t batch,
              int threads);

// The same for a plan under the model in use; `force_variant` overrides the variant.
Choice choose(Isa isa, Op op, const Plan& plan, int64_t batch, int threads);
// The structure that a product works on: spmm_t of lists uses the transposed lists.
const Summary& summary_of(const Plan& plan, Op op);

// Makes products that are called from this thread run one variant wherever it exists; calibration
// and tests compare variants by it. None returns to the model's choice.
void force_variant(std::optional<Variant> forced);

// The model in use: of `cost_file()` if there is a sound one, else the defaults.
const CostModel& cost_model();
// Takes effect for every product that begins afterwards.
void set_cost_model(const CostModel& model);
CostModel default_cost_model();

// Names of all coefficients, such as "avx512.lists.spmm.tokens.stream", and their places.
std::vector<std::pair<std::string, double*>> coefficients(CostModel& model);

// The CPU that a calibration holds for: its name, family, model and stepping.
std::string cpu_key();
// Where this CPU's calibration is kept: a file in $SPFMT_CACHE_DIR, $XDG_CACHE_HOME/spfmt or
// ~/.cache/spfmt. Empty when none of the three is set.
std::string cost_file();

// Reading a calibration: lines "key value"; see cost_file.cpp.
struct Calibration {
  CostModel model;
  std::string date;     // as written; empty for the defaults
  std::string levels;   // the instruction sets that were measured, the others hold defaults
  std::string ignored;  // why a file that exists is not used; empty otherwise
};
Calibration read_calibration(const std::string& path);
std::string format_calibration(const CostModel& model, const std::string& date,
                               const std::string& levels);

}  // namespace spfmt
