// Scalar level: compiled with the base flags of the platform.
#include "../simd/scalar.h"

#include "../kernels/table-inl.h"

namespace spfmt {
const Tiles<float>& scalar_tiles_f32() { return tiles_of<ScalarSimd<float>>(); }
const Tiles<double>& scalar_tiles_f64() { return tiles_of<ScalarSimd<double>>(); }
}  // namespace spfmt
