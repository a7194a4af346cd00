// How kernels keep arrays of registers in registers.
#pragma once

// Before a loop over accumulators. GCC decides which arrays live in registers before it unrolls
// loops of its own accord, and keeps a copy of the others on the stack.
#define SPFMT_UNROLL _Pragma("GCC unroll 64")

namespace spfmt {
namespace {

// A pointer that GCC does not look through: it would keep an offset in a register for every element
// of a tile, and most of them on the stack.
template <class T>
inline const T* opaque(const T* p) noexcept {
  asm("" : "+r"(p));
  return p;
}

}  // namespace
}  // namespace spfmt
