// AVX-512 level: compiled with -mavx512{f,bw,dq,vl}, entered only where the CPU has all; or, for
// tests (SPFMT_EMULATE=avx512), with -mavx2 -mfma.
#include "../simd/avx512.h"

#include "../kernels/probe-inl.h"
#include "../kernels/table-inl.h"

namespace spfmt {
const Bodies<float>& avx512_bodies() { return bodies_of<Avx512Simd>(); }
const Probe& avx512_probe() { return probe_of<Avx512Simd, 12, 8>(); }
}  // namespace spfmt
