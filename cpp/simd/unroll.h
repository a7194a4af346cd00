// How kernels keep arrays of registers in registers.
#pragma once

// Before a loop over accumulators. GCC decides which arrays live in registers before it unrolls
// loops of its own accord, and keeps a copy of the others on the stack.
#define SPFMT_UNROLL _Pragma("GCC unroll 64")
