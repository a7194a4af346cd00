// AVX2 level: compiled with -mavx2 -mfma, entered only where the CPU has both.
#include "../simd/avx2.h"

#include "../kernels/probe-inl.h"
#include "../kernels/table-inl.h"

namespace spfmt {
const Bodies<float>& avx2_bodies() { return bodies_of<Avx2Simd>(); }
const Probe& avx2_probe() { return probe_of<Avx2Simd, 6, 4>(); }
}  // namespace spfmt
