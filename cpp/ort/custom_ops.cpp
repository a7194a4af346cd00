// The custom-op library: one ONNX operator per layout and kind of product on top of the core,
// running on ONNX Runtime's own threads.
#include <cstdio>
#include <map>
#include <mutex>

#include "node.h"

namespace spfmt::ort {
namespace {

constexpr const char* kDomain = "spfmt";
constexpr Fused kFused[] = {
    {Activation::none, ""},     {Activation::relu, "Relu"},
    {Activation::gelu, "Gelu"}, {Activation::gelu_tanh, "GeluTanh"},
    {Activation::silu, "Silu"},
};

void add(CustomOpDomain* domain, const Runtime& runtime, const Kind& kind) {
  for (const Structure& structure : structures()) {
    for (const Fused& fused : kFused) {
      for (const ElementType type : {ElementType::f32, ElementType::f64}) {
        check(runtime.api->CustomOpDomain_Add(domain,
                                              new SparseOp(runtime, structure, kind, fused, type)));
      }
    }
  }
}

// One domain per ONNX Runtime in the process. Sessions refer to it until they end, and nobody says
// when that is, so it is never released.
CustomOpDomain* domain_of(const Runtime& runtime) {
  static std::mutex mutex;
  static auto& domains = *new std::map<Runtime, CustomOpDomain*>;
  const std::lock_guard<std::mutex> lock(mutex);
  CustomOpDomain*& domain = domains[runtime];
  if (domain != nullptr) return domain;
  const Api& api = *runtime.api;
  CustomOpDomain* fresh = nullptr;
  check(api.CreateCustomOpDomain(kDomain, &fresh));
  for (const Kind* kind : {&kLinear, &kConv, &kConvAdd}) add(fresh, runtime, *kind);
  return domain = fresh;
}

// The functions of the newest version that both know. The runtime's name tells which that is: asked
// for one that it lacks, it would complain on the user's terminal.
Runtime runtime_of(const ApiBase& base) {
  int major = 0, minor = 0;
  std::sscanf(base.GetVersionString(), "%d.%d", &major, &minor);
  const bool shows_shapes = major > 1 || (major == 1 && minor >= static_cast<int>(kShapesVersion));
  return {base.GetApi(shows_shapes ? kShapesVersion : kApiVersion), shows_shapes};
}

}  // namespace
}  // namespace spfmt::ort

// Sets who hears of every run, from the thread that runs it; null for nobody. Whoever heard before
// may be called once more by every run that has begun. spfmt.onnx.kernels_run shows the choices of
// kernels by it.
extern "C" __attribute__((visibility("default"))) void spfmt_ort_listen(
    spfmt::ort::Listener hears) {
  spfmt::ort::listener.store(hears, std::memory_order_release);
}

// ONNX Runtime calls it when the library is registered.
extern "C" __attribute__((visibility("default"))) spfmt::ort::Status* RegisterCustomOps(
    spfmt::ort::SessionOptions* options, const spfmt::ort::ApiBase* base) {
  using namespace spfmt::ort;
  const Runtime runtime = runtime_of(*base);
  const Api* api = runtime.api;
  if (api == nullptr) {
    // CreateStatus has been the first function since the first release.
    return base->GetApi(1)->CreateStatus(
        ErrorCode::fail, "spfmt: expected ONNX Runtime 1.17 or later; upgrade onnxruntime");
  }
  return guarded(*api, "RegisterCustomOps",
                 [&] { check(api->AddCustomOpDomain(options, domain_of(runtime))); });
}
