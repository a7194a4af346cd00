// Public header of the spfmt core: structures, plans, and the descriptor of a product.
//
// The core knows neither Python nor torch nor ONNX Runtime, nor any format: a caller describes a
// structure with one of two plain layouts, builds a Plan from it once, and runs Products on raw
// arrays. Whoever calls brings the threads (Executor), so one build serves OpenMP and ONNX
// Runtime's pool alike.
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
constexpr int kOps = 3, kIsas = 3, kDTypes = 2, kLayouts = 2;

constexpr int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

// ------------------------------------------------------------------------------------ structures

// Every row lists its columns.
//
//   indptr       0   2 2     5          row r owns positions indptr[r] .. indptr[r + 1]
//   col_indices  1 4 | 0 3 7            ascending inside a row
//   values       a b | c d e            same order
struct Lists {
  int64_t rows, cols;
  const int64_t* indptr;       // (rows + 1)
  const int32_t* col_indices;  // (indptr[rows])
};

// Rows of a band: an interchange constant that vector registers and tensor cores of every width
// read as it is.
constexpr int kBandRows = 16;

// Bands of 1 .. kBandRows rows, each with one list of columns.
//
//   band b: rows    row_perm[row_ptr[b] .. row_ptr[b + 1]]           (n rows)
//           columns col_indices[col_begin[b] .. col_end[b]]          (shared inside a group)
//           values[value_ptr[b] + j * n + i]   is column j, row i: column after column
//
// Every row of the matrix is in exactly one band, so products write each output exactly once.
struct Groups {
  int64_t rows, cols, bands, col_count;
  const int32_t* row_perm;     // (rows), a permutation
  const int64_t* row_ptr;      // (bands + 1)
  const int64_t* col_begin;    // (bands)
  const int64_t* col_end;      // (bands)
  const int32_t* col_indices;  // (col_count), unique inside a band
  const int64_t* value_ptr;    // (bands + 1)
};

// Empty when the layout is sound, else what is wrong. Every index is checked: kernels do not.
std::string validate(const Lists& lists);
std::string validate(const Groups& groups);

// A structure with what the kernels have made of it, which is built on first use and kept. Safe to
// use from several threads, and in a forked child. The arrays are copied.
class Plan;
std::shared_ptr<const Plan> make_plan(const Lists& lists);
std::shared_ptr<const Plan> make_plan(const Groups& groups);
int64_t plan_nnz(const Plan& plan);
int64_t plan_rows(const Plan& plan);
int64_t plan_cols(const Plan& plan);
Layout plan_layout(const Plan& plan);
// Bytes of the structure and of all that was built from it so far.
int64_t plan_nbytes(const Plan& plan);
// Places per nonzero of the placement that small batches use at the active level: 1 without
// padding, and for groups, which have none. It is built if it is not there yet.
double plan_padding(const Plan& plan);

// -------------------------------------------------------------------------------------- products

// Features by samples in the caller's memory, strides in elements, of any size. A vector is one
// sample.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;
};

// The same with its dtype told at run time. Of images, rows are channels, columns images, and a
// product's geometry tells the sizes of the maps; `y_stride` and `x_stride` lead through them.
struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0, cols = 1;
  int64_t row_stride = 1, col_stride = 0;
  int64_t y_stride = 0, x_stride = 0;

  template <class T>
  Matrix<T> as() const {
    return {static_cast<T*>(data), rows, cols, row_stride, col_stride};
  }
};

// `constant` of values that may be written between two products: they are read where they lie, or
// compared whole with what was packed.
constexpr int64_t kChanging = -1;
// `constant` of values that are written before each product, as in training: no variant of packed
// values is chosen.
constexpr int64_t kWritten = -2;

// One axis of the maps of a convolution: cell k of the kernel meets the number at
// o * stride + k * dilation - padding of X in output o; numbers outside of X are zeros.
struct Axis {
  int64_t size = 1;  // of the maps of X
  int64_t out = 1;   // of the maps of Y
  int64_t kernel = 1, stride = 1, padding = 0, dilation = 1;

  bool operator==(const Axis& o) const {
    return size == o.size && out == o.out && kernel == o.kernel && stride == o.stride &&
           padding == o.padding && dilation == o.dilation;
  }
};

// A convolution of images. Column (c * y.kernel + ky) * x.kernel + kx of the structure is cell
// (ky, kx) of channel c; rows fall into `groups` equal runs, each with channels of its own.
struct Geometry {
  Axis y, x;
  int64_t groups = 1;

  int64_t cells() const { return y.kernel * x.kernel; }
  bool operator==(const Geometry& o) const { return y == o.y && x == o.x && groups == o.groups; }
};

struct Scales;  // of values in low precision: none yet

// One product with a plan's structure, and all there is to say of it.
//
//   spmm    out = f(A in + bias + add)      in (cols, n), out and add (rows, n)
//   spmm_t  out = A^T in              in (rows, n), out (cols, n)
//   sddmm   values = (in in2^T) at the structure     in = dY (rows, n), in2 = X (cols, n)
//
// With a geometry, of n images: A is the kernel of a convolution, X has groups * cols / cells
// channels of size.y x size.x numbers, and Y rows channels of out.y x out.x.
struct Product {
  Op op = Op::spmm;
  View values;                   // (nnz or more), contiguous; the first nnz are in use
  int64_t constant = kChanging;  // a number >= 0 promises: equal numbers, equal content
  View in, in2, out;
  View bias;                                 // (rows), contiguous, or without data; spmm only
  View add;                                  // or without data; spmm of images only, not `out`
  Activation activation = Activation::none;  // spmm only
  const Geometry* geometry = nullptr;
  const Scales* scales = nullptr;
};

// Empty when a product fits the plan and a kernel exists for its dtypes, else what is wrong.
std::string check(const Plan& plan, const Product& product);

// Runs body(arg, i) for i in [0, n) on at most `threads` threads and returns when all are done.
// A body does not throw.
struct Executor {
  int threads;
  void* context;
  void (*for_each)(void* context, int64_t n, void (*body)(void* arg, int64_t i), void* arg);
};

Executor serial_executor();

// Computes a product that check() has nothing against, at level `isa` or the next lower one that
// has a kernel. Throws std::bad_alloc when memory for workspace or a packed placement cannot be
// had, and std::length_error where offsets of 32 bits do not suffice: 256 rows that hold 2^31
// values or more, images too large, convolutions of as many values; the executor never sees them.
void run(Isa isa, const Plan& plan, const Product& product, const Executor& executor);

// ----------------------------------------------------------------------------------------- table

// One row of the kernel table: what exists at which level.
struct Kernel {
  Op op;
  bool images;  // whether it is a product with a geometry
  Layout layout;
  DType dtype;
  Isa isa;
};

const std::vector<Kernel>& kernel_table();
const char* name_of(Op op, bool images = false);
const char* name_of(Isa isa);
const char* name_of(Layout layout);
const char* name_of(DType dtype);

// Levels this CPU and operating system can execute.
bool isa_supported(Isa isa);
// Whether this build runs a level's kernels in other instructions (simd/emulated.h): the results
// are the level's, the speed is not. Never so but in test builds.
bool isa_emulated(Isa isa);
// The level in use: the best supported one that is not emulated, or what SPFMT_ISA forces.
// Throws std::invalid_argument when SPFMT_ISA names no level or one the CPU lacks.
Isa active_isa();

}  // namespace spfmt
