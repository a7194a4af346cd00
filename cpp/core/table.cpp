// The table of variants, the CPU's levels, and the way from a product to its kernel.
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "variant.h"

namespace spfmt {

template <>
const Bodies<float>* bodies_at(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return &avx512_bodies();
    case Isa::avx2:
      return &avx2_bodies();
    default:
      return &scalar_bodies_f32();
  }
}
template <>
const Bodies<double>* bodies_at(Isa isa) {
  return isa == Isa::scalar ? &scalar_bodies_f64() : nullptr;
}

namespace {

bool exists(const Kernel& k) {
  for (const Variant* v : kVariants) {
    const bool fits = v->layout == k.layout && v->does(k.op) && v->geometry == k.images;
    if (fits && v->exists(k.isa, k.dtype)) return true;
  }
  return false;
}

std::vector<Kernel> make_table() {
  std::vector<Kernel> table;
  for (const bool images : {false, true}) {
    for (int layout = 0; layout < kLayouts; ++layout) {
      for (int op = 0; op < kOps; ++op) {
        for (int dtype = 0; dtype < kDTypes; ++dtype) {
          for (int isa = 0; isa < kIsas; ++isa) {
            const Kernel k{static_cast<Op>(op), images, static_cast<Layout>(layout),
                           static_cast<DType>(dtype), static_cast<Isa>(isa)};
            if (exists(k)) table.push_back(k);
          }
        }
      }
    }
  }
  return table;
}

void run_serially(void*, int64_t n, void (*body)(void*, int64_t), void* arg) {
  for (int64_t i = 0; i < n; ++i) body(arg, i);
}

// Whether a result has no elements.
bool is_empty(const Plan& plan, const Product& p) {
  if (p.op == Op::sddmm) return plan.nnz() == 0;
  if (p.out.rows == 0 || p.out.cols == 0) return true;
  if (p.geometry == nullptr) return false;
  const Axis &y = p.geometry->y, &x = p.geometry->x;
  return p.op == Op::spmm ? y.out == 0 || x.out == 0 : y.size == 0 || x.size == 0;
}

}  // namespace

Executor serial_executor() { return {1, nullptr, run_serially}; }

const std::vector<Kernel>& kernel_table() {
  static const std::vector<Kernel> table = make_table();
  return table;
}

const char* name_of(Op op, bool images) {
  constexpr const char* kNames[] = {"spmm",   "spmm_t",       "sddmm",
                                    "conv2d", "conv2d_input", "conv2d_weight"};
  return kNames[static_cast<int>(op) + (images ? kOps : 0)];
}
const char* name_of(Isa isa) {
  constexpr const char* kNames[] = {"scalar", "avx2", "avx512"};
  return kNames[static_cast<int>(isa)];
}
const char* name_of(Layout layout) { return layout == Layout::lists ? "lists" : "groups"; }
const char* name_of(DType dtype) { return dtype == DType::f32 ? "float32" : "float64"; }

bool isa_emulated([[maybe_unused]] Isa isa) {
#ifdef SPFMT_EMULATE_AVX512
  return isa == Isa::avx512;
#else
  return false;
#endif
}

bool isa_supported(Isa isa) {
  // __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the registers.
  switch (isa) {
    case Isa::avx512:
      if (isa_emulated(isa)) return isa_supported(Isa::avx2);
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    default:
      return true;
  }
}

Isa active_isa() {
  const char* forced = std::getenv("SPFMT_ISA");
  const Isa levels[] = {Isa::avx512, Isa::avx2, Isa::scalar};
  if (forced == nullptr || *forced == '\0') {
    for (const Isa isa : levels) {
      if (isa_supported(isa) && !isa_emulated(isa)) return isa;
    }
  }
  for (const Isa isa : levels) {
    if (std::strcmp(forced, name_of(isa)) != 0) continue;
    if (isa_supported(isa)) return isa;
    throw std::invalid_argument(std::string("SPFMT_ISA=") + forced +
                                " asks for a level that this CPU does not have");
  }
  throw std::invalid_argument(std::string("SPFMT_ISA=") + forced +
                              " names no level; expected scalar, avx2 or avx512");
}

double plan_padding(const Plan& plan) {
  if (plan.layout() != Layout::lists || plan.nnz() == 0) return 1.0;
  return lookup_padding(plan, bodies_at<float>(active_isa())->lookup.widest_window);
}

void run(Isa isa, const Plan& plan, const Product& p, const Executor& executor) {
  if (is_empty(plan, p)) return;
  const Work work{p.op, p.in.cols, p.values.dtype, p.constant != kWritten, p.geometry};
  const Choice choice = choose(isa, plan, work, executor.threads);
  choice.variant->run(choice.isa, plan, p, choice.threads > 1 ? executor : serial_executor());
}

}  // namespace spfmt
