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
