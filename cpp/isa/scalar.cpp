// Scalar level: compiled with the base flags of the platform.
#include "../simd/scalar.h"

#include "../kernels/probe-inl.h"
#include "../kernels/table-inl.h"

namespace spfmt {
namespace {

// One register of the base instruction set, as far as probes use the interface: the compiler keeps
// ScalarSimd's arrays of lanes in memory, and their speed would be a ceiling that kernels break.
struct BaseSimd {
  using T = float;
  typedef float V __attribute__((vector_size(16)));

  static V zero() noexcept { return V{}; }
  static V set1(T x) noexcept { return V{x, x, x, x}; }
  static V load(const T* p) noexcept {
    V v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static V add(V a, V b) noexcept { return a + b; }
  static V fma(V a, V b, V c) noexcept { return a * b + c; }
  static T sum(V v) noexcept { return v[0] + v[1] + v[2] + v[3]; }
};

}  // namespace

const Bodies<float>& scalar_bodies_f32() { return bodies_of<ScalarSimd<float>>(); }
const Bodies<double>& scalar_bodies_f64() { return bodies_of<ScalarSimd<double>>(); }
const Probe& scalar_probe() { return probe_of<BaseSimd, 12, 8>(); }
}  // namespace spfmt
