// Public header of the spfmt core: structures, plans and the three products.
//
// The core knows neither Python nor torch nor ONNX Runtime. A caller describes a structure with one
// of two plain views, builds a Plan from it once, and runs products on raw arrays. Whoever calls
// brings the threads (Executor), so one build serves OpenMP and ONNX Runtime's pool alike.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace spfmt {

enum class Op : int { spmm = 0, spmm_t = 1, sddmm = 2 };
enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2 };
enum class DType : int { f32 = 0, f64 = 1 };
enum class Layout : int { lists = 0, groups = 1 };
// Applied to A X + bias. gelu is exact (erf), gelu_tanh its approximation by tanh.
enum class Activation : int { none = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4 };
// What the lanes of a product run over: rows of the structure (a few tokens at a time), or samples
// (eight at a time, which row lists alone can do, or panels of up to 64). Which one runs is chosen
// by cost (cost.h).
enum class Variant : int { tokens = 0, octets = 1, panels = 2 };
constexpr int kVariants = 3;

// Rows are cut into tiles of at most this many rows (one 512-bit register of float32).
constexpr int kRowTile = 16;

// Every row lists its columns; condensed, N:M and CSR lower to this.
//
//   indptr       0   2 2     5          row r owns positions indptr[r] .. indptr[r + 1]
//   col_indices  1 4 | 0 3 7            ascending inside a row
//   values       a b | c d e            same order
struct Lists {
  int64_t rows, cols;
  const int64_t* indptr;       // (rows + 1)
  const int32_t* col_indices;  // (indptr[rows])
};

// Tiles of 1..16 rows share one column list; shuffled block and HRBP lower to this.
//
//   tile t: rows    row_perm[row_ptr[t] .. row_ptr[t + 1]]           (n rows)
//           columns col_indices[col_begin[t] .. col_end[t]]          (several tiles may share a
//           list) values[value_ptr[t] + j * n + i]   is column j, row i: column after column
//
// Every row of the matrix is in exactly one tile, so products write each output exactly once.
struct Groups {
  int64_t rows, cols, tiles, col_count;
  const int32_t* row_perm;     // (rows), a permutation
  const int64_t* row_ptr;      // (tiles + 1)
  const int64_t* col_begin;    // (tiles)
  const int64_t* col_end;      // (tiles)
  const int32_t* col_indices;  // (col_count), unique inside a tile
  const int64_t* value_ptr;    // (tiles + 1)
};

// Empty when the view is sound, else what is wrong. Every index is checked: kernels do not.
std::string validate(const Lists& view);
std::string validate(const Groups& view);

// Runs body(arg, i) for i in [0, n) on at most `threads` threads and returns when all are done.
// A body does not throw.
struct Executor {
  int threads;
  void* context;
  void (*for_each)(void* context, int64_t n, void (*body)(void* arg, int64_t i), void* arg);
};

Executor serial_executor();

// A dense operand: `rows` features by `cols` samples, element strides of any size.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;
};

// A structure with the kernels' private layouts of it, which are built on first use and cached.
// Safe to use from several threads. Views are copied.
class Plan;
std::shared_ptr<const Plan> make_plan(const Lists& view);
std::shared_ptr<const Plan> make_plan(const Groups& view);
int64_t plan_nnz(const Plan& plan);
// Bytes of the structure and of every layout built from it so far.
int64_t plan_nbytes(const Plan& plan);
// Places per nonzero of the layout that small batches use at the active level: 1 without padding,
// and for row groups, which have none. The layout is built if it is not yet.
double plan_padding(const Plan& plan);

// `values` of this version were seen before: packed copies of them are reused. kNoVersion: never.
constexpr int64_t kNoVersion = -1;

struct Kernel;

// What a product works on. spmm: in = X, out = Y. spmm_t: in = dY, out = dX.
// sddmm: in = dY, in2 = X, and `values` receives the gradient (plan_nnz elements).
template <class T>
struct Args {
  T* values;
  int64_t values_version;
  Matrix<const T> in;
  Matrix<const T> in2;
  Matrix<T> out;
  const T* bias;          // (rows) or null; spmm only
  Activation activation;  // spmm only
};

// One row of the kernel table: (op, format, dtype, ISA) and the function that computes it.
struct Kernel {
  Op op;
  const char* format;
  DType dtype;
  Isa isa;
  Layout layout;
  void (*run_f32)(const Kernel&, const Plan&, const Args<float>&, const Executor&);
  void (*run_f64)(const Kernel&, const Plan&, const Args<double>&, const Executor&);
};

const std::vector<Kernel>& kernel_table();
const char* op_name(Op op);
const char* isa_name(Isa isa);
const char* layout_name(Layout layout);
const char* variant_name(Variant variant);
const char* dtype_name(DType dtype);

// Levels this CPU and operating system can execute.
bool isa_supported(Isa isa);
// Whether this build runs a level's kernels in other instructions (simd/emulated.h): the results
// are the level's, the speed is not. Never so but in test builds.
bool isa_emulated(Isa isa);
// The level in use: the best supported one that is not emulated, or what SPFMT_ISA forces.
// Throws std::invalid_argument when SPFMT_ISA names no level or one the CPU lacks.
Isa active_isa();

// The row for (op, format, dtype, isa), or null.
const Kernel* find_kernel(Op op, const std::string& format, DType dtype, Isa isa);

// Throws std::invalid_argument where the kernel is for another layout than the plan's,
// std::bad_alloc when memory for workspace or a private layout cannot be had, and
// std::length_error where 256 rows hold 2^31 values or more; the executor never sees any of them.
void run(const Kernel& kernel, const Plan& plan, const Args<float>& args, const Executor& executor);
void run(const Kernel& kernel, const Plan& plan, const Args<double>& args,
         const Executor& executor);

// Greedy grouping of rows for packing: an order of the rows in which every 16 consecutive rows have
// like counts, so that padding each chunk to its fullest row wastes little. counts: (rows, chunks)
// row-major, nonzeros per chunk of columns. Deterministic.
std::vector<int32_t> group_rows_by_counts(const uint8_t* counts, int64_t rows, int64_t chunks);

}  // namespace spfmt
