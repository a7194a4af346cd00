// What the library offers: a C ABI, for callers that bring pointers, a device and a stream.
//
// Matrices are features by samples, as everywhere in spfmt: samples are contiguous, `stride` counts
// the elements from a feature to the next. All pointers but those of the structs themselves are the
// device's. Calls are asynchronous on `stream` of the current device, allocate nothing, and may be
// captured in a graph. They return 0 or a cudaError_t, whose text spfmt_cuda_error() gives.
//
// Callers have checked shapes and indices (spfmt::validate of the plan): kernels do not.
#pragma once

#include <cstdint>

namespace spfmt::cuda {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// Of float32 operands: products of ten bits (tf32), or of the sums of two such numbers, which is
// float32 but for the last bits.
enum class Precision : int { float32 = 0, tf32 = 1 };

// Groups (cpp/core/spfmt.h), cut into tiles: up to `most_rows` rows of a group, which is 16, 64 or
// 128. The values of a tile are those of its bands, one behind the other: with `rows` = 16 b + s,
// value (i, j), of row i and column j, lies at value + 16 cols (i / 16) + j n + i % 16, where n is
// 16 in the first b bands and s in the last one.
struct Tile {
  int64_t value;
  int32_t row, rows;  // rows row_perm[row .. row + rows]
  int32_t col, cols;  // columns col_indices[col .. col + cols], in any order
};

// Up to 64 of a tile's columns, all within one chunk of the matrix's columns, ascending. Of a
// convolution, columns are channels, a piece has those of one cell of the kernel, and a pixel of dX
// gets what a pixel of dY gives that lies so many below and to the right.
struct Piece {
  Tile tile;
  int32_t first, count;  // ascending[first .. first + count]
  int32_t down, across;
};

// What a column of a convolution's weight sees: a channel of the pixel so many below and to the
// right of `stride` times the result's.
struct Tap {
  int32_t channel;
  int16_t down, across;
};

struct Tiles {
  int64_t rows, cols;
  int32_t count;
  int32_t most_rows, most_cols;  // of a tile
  int32_t chunk;                 // columns that a block of spmm_t owns
  const Tile* tile;
  const int32_t* row_perm;
  const int32_t* col_indices;
  const Tap* tap;              // of convolutions, instead of col_indices
  const int32_t* ascending;    // of every list, its places 0 .. cols - 1 by their columns
  const int32_t* sorted_cols;  // and these columns
  const Piece* piece;          // chunk after chunk, and in each by tile
  const int32_t* piece_ptr;    // chunk c has piece[piece_ptr[c] .. piece_ptr[c + 1]]; of a
                               // convolution c is chunk + chunks (s_x a + b) for pixels (a, b) of
                               // dX, modulo the strides s_y and s_x
};

// Maps of images as a matrix with samples side by side: row `channel` c + `row` h + `column` w has
// those of pixel (h, w) of channel c. Rows lie `stride` elements apart; sixteen bytes are copied at
// once where all operands' strides and addresses are multiples of that, and elements otherwise.
struct Maps {
  int32_t channels, height, width, batch;
  int32_t channel, row, column;
  int32_t stride;
};

// Lists (cpp/core/spfmt.h), or the transpose of some: then position p holds value source[p].
struct Lists {
  int64_t rows, cols;
  const int32_t* indptr;
  const int32_t* col_indices;
  const int32_t* source;  // or null
};

}  // namespace spfmt::cuda

extern "C" {

// The text of an error; of the emulation, where it happened.
const char* spfmt_cuda_error(int code);
// How many devices there are, 0 without a driver.
int spfmt_cuda_devices();
// Makes a device the current one for the calls of this thread. The library has a CUDA runtime of
// its own, which need not know what the caller's says.
int spfmt_cuda_use(int device);

// out (cols, rows) = in (rows, cols), transposed and rounded to another dtype.
int spfmt_cuda_transpose(int from, int to, const void* in, int64_t in_stride, int64_t rows,
                         int64_t cols, void* out, int64_t out_stride, void* stream);

// y (R, n) = A x (C, n) + bias, float32 (R), or null.
int spfmt_cuda_groups_spmm(int dtype, int precision, const spfmt::cuda::Tiles* a,
                           const void* values, const void* x, int64_t x_stride, int64_t n,
                           const float* bias, void* y, int64_t y_stride, void* stream);
// The same for 16-bit dtypes and tiles of 64 and 128 rows, on compute capability 9.0. Experimental.
int spfmt_cuda_groups_spmm_sm90(int dtype, int precision, const spfmt::cuda::Tiles* a,
                                const void* values, const void* x, int64_t x_stride, int64_t n,
                                const float* bias, void* y, int64_t y_stride, void* stream);
// dx (C, n) = A^T dy (R, n).
int spfmt_cuda_groups_spmm_t(int dtype, int precision, const spfmt::cuda::Tiles* a,
                             const void* values, const void* dy, int64_t dy_stride, int64_t n,
                             void* dx, int64_t dx_stride, void* stream);
// values (parts, nnz) float32, whose sum is dy (R, n) x (C, n)^T at the structure: part p is that
// of a share of the samples.
int spfmt_cuda_groups_sddmm(int dtype, int precision, const spfmt::cuda::Tiles* a, const void* dy,
                            int64_t dy_stride, const void* x, int64_t x_stride, int64_t n,
                            int32_t parts, int64_t nnz, float* values, void* stream);

// y = A * x + bias, a convolution with stride {s_y, s_x}.
int spfmt_cuda_groups_conv(int dtype, int precision, const spfmt::cuda::Tiles* a,
                           const void* values, const void* x, const spfmt::cuda::Maps* x_maps,
                           const int32_t* stride, const float* bias, void* y,
                           const spfmt::cuda::Maps* y_maps, void* stream);
// The same, where groups_spmm_sm90 is.
int spfmt_cuda_groups_conv_sm90(int dtype, int precision, const spfmt::cuda::Tiles* a,
                                const void* values, const void* x, const spfmt::cuda::Maps* x_maps,
                                const int32_t* stride, const float* bias, void* y,
                                const spfmt::cuda::Maps* y_maps, void* stream);
// dx, its gradient of the input.
int spfmt_cuda_groups_conv_t(int dtype, int precision, const spfmt::cuda::Tiles* a,
                             const void* values, const void* dy, const spfmt::cuda::Maps* dy_maps,
                             const int32_t* stride, void* dx, const spfmt::cuda::Maps* dx_maps,
                             void* stream);
// values (parts, nnz) float32, whose sum is its gradient of the values.
int spfmt_cuda_groups_conv_sampled(int dtype, int precision, const spfmt::cuda::Tiles* a,
                                   const void* dy, const spfmt::cuda::Maps* dy_maps, const void* x,
                                   const spfmt::cuda::Maps* x_maps, const int32_t* stride,
                                   int32_t parts, int64_t nnz, float* values, void* stream);

// y (n, R) = x (n, C) A^T + bias for up to 16 samples: here, features are contiguous.
int spfmt_cuda_lists_small(int dtype, const spfmt::cuda::Lists* a, const void* values,
                           const void* x, int64_t x_stride, int64_t n, const float* bias, void* y,
                           int64_t y_stride, void* stream);
// y (R, n) = A x (C, n) + bias. Of transposed lists it is dx = A^T dy.
int spfmt_cuda_lists_spmm(int dtype, const spfmt::cuda::Lists* a, const void* values, const void* x,
                          int64_t x_stride, int64_t n, const float* bias, void* y, int64_t y_stride,
                          void* stream);
// values (nnz) float32 = dy (R, n) x (C, n)^T at the structure; lists without `source`.
int spfmt_cuda_lists_sddmm(int dtype, const spfmt::cuda::Lists* a, const void* dy,
                           int64_t dy_stride, const void* x, int64_t x_stride, int64_t n,
                           float* values, void* stream);
}
