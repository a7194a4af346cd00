// The few things that a kernel may use beyond C++: the same names for nvcc and for the emulation.
//
// Kernels keep to these, so that both compile them: C++17, shared memory through DYNAMIC_SHARED
// alone, no inline assembly, launches through LAUNCH. tests/test_cuda_*.py run them on the
// CPU (emulation/), where lanes that diverge, memory that is not there yet and accesses out of
// bounds are errors.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "emulation/device.h"
#endif

namespace spfmt::cuda {

// 16-bit numbers as they lie in memory.
struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};
template <class T>
struct __align__(2 * sizeof(T)) Pair {
  T x, y;
};

// Numbers side by side, that one instruction loads or stores.
template <class T, int n>
struct __align__(n * sizeof(T)) Vector {
  T at[n];
};
template <int n, class T>
__device__ __forceinline__ Vector<T, n> load_vector(const T* from) {
#ifndef __CUDACC__
  emulation::check_aligned(from, sizeof(Vector<T, n>));
#endif
  return *reinterpret_cast<const Vector<T, n>*>(from);
}
template <int n, class T>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, n>& v) {
#ifndef __CUDACC__
  emulation::check_aligned(to, sizeof(Vector<T, n>));
#endif
  *reinterpret_cast<Vector<T, n>*>(to) = v;
}

// Loops with a fixed count: all turns at once, or one after the other where they would hold more
// addresses than there are registers.
#ifdef __CUDACC__
#define SPFMT_UNROLL _Pragma("unroll")
#define SPFMT_ROLLED _Pragma("unroll 1")
#else
#define SPFMT_UNROLL
#define SPFMT_ROLLED
#endif

constexpr int kInvalidValue = 1;             // cudaErrorInvalidValue
constexpr int64_t kMostBlocks = 0x7fffffff;  // in a line

// ----------------------------------------------------------------------------------- conversions

__device__ __forceinline__ uint32_t bits_of(float f) {
  union {
    float f;
    uint32_t u;
  } v{f};
  return v.u;
}
__device__ __forceinline__ float float_of(uint32_t bits) {
  union {
    uint32_t u;
    float f;
  } v{bits};
  return v.f;
}

__device__ __forceinline__ float to_float(float f) { return f; }
__device__ __forceinline__ float to_float(bf16 b) {
  return float_of(static_cast<uint32_t>(b.bits) << 16);
}
__device__ __forceinline__ float to_float(half h) {
#ifdef __CUDACC__
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits));
  return f;
#else
  return emulation::float_of_half(h.bits);
#endif
}

// To nearest, ties to even; NaN stays NaN.
template <class T>
__device__ __forceinline__ T from_float(float f);
template <>
__device__ __forceinline__ float from_float<float>(float f) {
  return f;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float f) {
  const uint32_t u = bits_of(f), rounded = u + 0x7fffu + (u >> 16 & 1u);
  return bf16{static_cast<uint16_t>(f != f ? 0x7fffu : rounded >> 16)};
}
template <>
__device__ __forceinline__ half from_float<half>(float f) {
#ifdef __CUDACC__
  half h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(f));
  return h;
#else
  return half{emulation::half_of_float(f)};
#endif
}
// The bits of tf32: of float32's mantissa ten bits, to nearest, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float f) {
#ifdef __CUDACC__
  uint32_t u;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(u) : "f"(f));
  return u;
#else
  return emulation::tf32_of_float(f);
#endif
}

// --------------------------------------------------------------------------- asynchronous copies

// Sixteen, or four, bytes from global to shared memory; those from `valid` on become zero.
__device__ __forceinline__ void copy16(void* to, const void* from, int valid) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(valid)
               : "memory");
#else
  emulation::copy(to, from, 16, valid);
#endif
}
__device__ __forceinline__ void copy4(void* to, const void* from, int valid) {
#ifdef __CUDACC__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(valid)
               : "memory");
#else
  emulation::copy(to, from, 4, valid);
#endif
}
__device__ __forceinline__ void copy_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulation::copy_commit();
#endif
}
// Until at most `left` groups of this thread's copies are under way. Other threads see what was
// copied behind a barrier.
template <int left>
__device__ __forceinline__ void copy_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
#else
  emulation::copy_wait(left);
#endif
}

// ------------------------------------------------------------------------------------- fragments

#ifdef __CUDACC__
#define SPFMT_WHERE
#else
#define SPFMT_WHERE , const emulation::Where& where = emulation::Where::current()
#endif

// Four 8x8 matrices of 16-bit elements in shared memory: lane 8m + i brings row i of matrix m, and
// gets of each the elements (lane / 4, 2 (lane % 4)) and the next.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row SPFMT_WHERE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
#else
  emulation::ldmatrix<false>(r, row, where);
#endif
}
// The same of each matrix transposed.
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], const void* row SPFMT_WHERE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
#else
  emulation::ldmatrix<true>(r, row, where);
#endif
}

#ifdef __CUDACC__
#define SPFMT_MMA(types)                                        \
  asm volatile("mma.sync.aligned." types                        \
               " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "       \
               "{%0,%1,%2,%3};"                                 \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif

// D += A B in float32, A (16, 16) and B (16, 8) of bf16 or half. With g = lane / 4 and
// t = lane % 4, register i of A holds (g + 8 (i % 2), 2t + 8 (i / 2)) and the next column, register
// i of B (2t + 8i, g) and the next row, and number i of D (g + 8 (i / 2), 2t + i % 2).
__device__ __forceinline__ void mma(bf16, float (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t* b SPFMT_WHERE) {
#ifdef __CUDACC__
  SPFMT_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
#else
  emulation::mma<16, emulation::Unpack16<emulation::float_of_bf16>>(d, a, b, where);
#endif
}
__device__ __forceinline__ void mma(half, float (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t* b SPFMT_WHERE) {
#ifdef __CUDACC__
  SPFMT_MMA("m16n8k16.row.col.f32.f16.f16.f32");
#else
  emulation::mma<16, emulation::Unpack16<emulation::float_of_half>>(d, a, b, where);
#endif
}
// The same of tf32, A (16, 8) and B (8, 8): register i of A holds (g + 8 (i % 2), t + 4 (i / 2)),
// register i of B (t + 4i, g).
__device__ __forceinline__ void mma(float, float (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t* b SPFMT_WHERE) {
#ifdef __CUDACC__
  SPFMT_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
#else
  emulation::mma<8, emulation::UnpackTf32>(d, a, b, where);
#endif
}

// ------------------------------------------------------------------- four warps, capability 9.0

// The first address from `p` on that is a multiple of so many bytes.
template <int bytes>
__device__ __forceinline__ unsigned char* aligned_shared(unsigned char* p) {
#ifdef __CUDACC__
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(p));
#else
  const auto at = reinterpret_cast<uintptr_t>(p);
#endif
  return p + (bytes - at % bytes) % bytes;
}

// Before the first group_mma that reads what this thread's asynchronous copies, or stores, wrote;
// other threads' are seen behind a barrier.
__device__ __forceinline__ void group_sees_copies() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// Before group_mma, where its sums may have been touched.
__device__ __forceinline__ void group_begin() {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void group_commit() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until all products of this thread's group are done: before that, sums and operands are in use.
__device__ __forceinline__ void group_wait() {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#else
  emulation::group_wait();
#endif
}

#ifdef __CUDACC__
// Where an operand lies: rows of 128 bytes along the sums' direction, swizzled, eight rows of the
// depth in 1024 bytes and the next eight behind them, the next 64 elements `beside` bytes further.
__device__ __forceinline__ uint64_t group_operand(const unsigned char* p, int beside) {
  const auto at = static_cast<uint64_t>(__cvta_generic_to_shared(p));
  const auto of = [](uint64_t bytes) { return bytes >> 4 & 0x3fff; };
  return of(at) | of(static_cast<uint64_t>(beside)) << 16 | of(1024) << 32 | uint64_t{1} << 62;
}
#define SPFMT_EIGHT(d)                                                                      \
  "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), \
      "+f"(d[1][2]), "+f"(d[1][3])
#define SPFMT_GROUP_MMA(types)                                                                     \
  asm volatile(                                                                                    \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." types                                         \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"   \
      "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,"   \
      "%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, 1, 1, " \
      "1, 1, 1;"                                                                                   \
      : SPFMT_EIGHT(d[0]), SPFMT_EIGHT(d[1]), SPFMT_EIGHT(d[2]), SPFMT_EIGHT(d[3]),                \
        SPFMT_EIGHT(d[4]), SPFMT_EIGHT(d[5]), SPFMT_EIGHT(d[6]), SPFMT_EIGHT(d[7])                 \
      : "l"(group_operand(a, beside)), "l"(group_operand(b, beside)))
#endif

// D += A B in float32, A (64, 16) and B (16, 128), of 128 threads whose warps have 16 rows each; a
// warp's numbers lie as those of sixteen mma beside each other. Operands are read, and sums
// written, at any time until group_wait().
__device__ __forceinline__ void group_mma(bf16, float (&d)[8][2][4], const unsigned char* a,
                                          const unsigned char* b, int beside SPFMT_WHERE) {
#ifdef __CUDACC__
  SPFMT_GROUP_MMA("bf16.bf16");
#else
  emulation::group_mma<emulation::float_of_bf16>(d, a, b, beside, where);
#endif
}
__device__ __forceinline__ void group_mma(half, float (&d)[8][2][4], const unsigned char* a,
                                          const unsigned char* b, int beside SPFMT_WHERE) {
#ifdef __CUDACC__
  SPFMT_GROUP_MMA("f16.f16");
#else
  emulation::group_mma<emulation::float_of_half>(d, a, b, beside, where);
#endif
}

// ------------------------------------------------------------------------------- lanes and blocks

constexpr uint32_t kAllLanes = 0xffffffffu;

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int bits SPFMT_WHERE) {
#ifdef __CUDACC__
  return __shfl_xor_sync(kAllLanes, value, bits);
#else
  return emulation::shuffle(kAllLanes, value, emulation::lane() ^ bits, where);
#endif
}
template <class T>
__device__ __forceinline__ T shuffle(T value, int source SPFMT_WHERE) {
#ifdef __CUDACC__
  return __shfl_sync(kAllLanes, value, source);
#else
  return emulation::shuffle(kAllLanes, value, source, where);
#endif
}

// What the current device has: multiprocessors, and the most bytes of shared memory of a block.
// current_device() returns a cudaError_t.
struct Device {
  int processors, shared;
};

// kernel<<<grid, threads, shared bytes, stream>>>(arguments); a cudaError_t.
#ifdef __CUDACC__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define LAUNCH(kernel, grid, threads, shared, stream, ...)                                   \
  [&]() -> int {                                                                             \
    if (const int error = ::spfmt::cuda::allow_shared(reinterpret_cast<const void*>(kernel), \
                                                      static_cast<int>(shared))) {           \
      return error;                                                                          \
    }                                                                                        \
    (kernel)<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);     \
    return static_cast<int>(cudaGetLastError());                                             \
  }()
// Lets a kernel have more than 48 KiB of shared memory on the current device; api.cu.
int allow_shared(const void* kernel, int bytes);
int current_device(Device* out);
#else
#define DYNAMIC_SHARED(name) unsigned char* const name = emulation::block->shared
#define LAUNCH(kernel, grid, threads, shared, stream, ...) \
  ((void)(stream), emulation::launch(grid, threads, shared, [&] { (kernel)(__VA_ARGS__); }))
// Few multiprocessors, so that blocks have more to do than fits them once.
inline int current_device(Device* out) {
  *out = {3, static_cast<int>(emulation::kMostShared)};
  return 0;
}
#endif

}  // namespace spfmt::cuda
