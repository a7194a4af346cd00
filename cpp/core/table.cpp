// The kernel table, the CPU's levels, and the way from a row to its driver.
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "../cost/cost.h"
#include "drivers.h"

namespace spfmt {
namespace {

template <class T>
const Tiles<T>& tiles_for(Isa isa);

template <>
const Tiles<float>& tiles_for(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return avx512_tiles();
    case Isa::avx2:
      return avx2_tiles();
    default:
      return scalar_tiles_f32();
  }
}
template <>
const Tiles<double>& tiles_for(Isa) {
  return scalar_tiles_f64();
}

template <class T, Driver<T> kDriver>
void drive(const Kernel& kernel, const Plan& plan, const Args<T>& args, const Executor& executor) {
  const Choice choice = choose(kernel.isa, kernel.op, plan, args.in.cols, executor.threads);
  kDriver(tiles_for<T>(kernel.isa), plan, choice.variant, args,
          choice.threads > 1 ? executor : serial_executor());
}

struct Row {
  Op op;
  Layout layout;
  void (*f32)(const Kernel&, const Plan&, const Args<float>&, const Executor&);
  void (*f64)(const Kernel&, const Plan&, const Args<double>&, const Executor&);
};

#define SPFMT_ROW(op, layout, driver) \
  {op, layout, drive<float, driver<float>>, drive<double, driver<double>>}

constexpr Row kRows[] = {
    SPFMT_ROW(Op::spmm, Layout::lists, lists_spmm),
    SPFMT_ROW(Op::spmm_t, Layout::lists, lists_spmm_t),
    SPFMT_ROW(Op::sddmm, Layout::lists, lists_sddmm),
    SPFMT_ROW(Op::spmm, Layout::groups, groups_spmm),
    SPFMT_ROW(Op::spmm_t, Layout::groups, groups_spmm_t),
    SPFMT_ROW(Op::sddmm, Layout::groups, groups_sddmm),
};
#undef SPFMT_ROW

struct Format {
  const char* name;
  Layout layout;
};
constexpr Format kFormats[] = {
    {"condensed", Layout::lists}, {"nm", Layout::lists},
    {"csr", Layout::lists},       {"shuffled_block", Layout::groups},
    {"hrbp", Layout::groups},
};

std::vector<Kernel> make_table() {
  std::vector<Kernel> table;
  for (const Format& format : kFormats) {
    for (const Row& row : kRows) {
      if (row.layout != format.layout) continue;
      for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
        table.push_back({row.op, format.name, DType::f32, isa, row.layout, row.f32, nullptr});
      }
      table.push_back({row.op, format.name, DType::f64, Isa::scalar, row.layout, nullptr, row.f64});
    }
  }
  return table;
}

void run_serially(void*, int64_t n, void (*body)(void*, int64_t), void* arg) {
  for (int64_t i = 0; i < n; ++i) body(arg, i);
}

}  // namespace

Executor serial_executor() { return {1, nullptr, run_serially}; }

const std::vector<Kernel>& kernel_table() {
  static const std::vector<Kernel> table = make_table();
  return table;
}

const Kernel* find_kernel(Op op, const std::string& format, DType dtype, Isa isa) {
  for (const Kernel& k : kernel_table()) {
    if (k.op == op && k.dtype == dtype && k.isa == isa && format == k.format) return &k;
  }
  return nullptr;
}

const char* op_name(Op op) {
  constexpr const char* kNames[] = {"spmm", "spmm_t", "sddmm"};
  return kNames[static_cast<int>(op)];
}
const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"scalar", "avx2", "avx512"};
  return kNames[static_cast<int>(isa)];
}
const char* layout_name(Layout layout) {
  return layout == Layout::lists ? "lists" : "groups";
}
const char* variant_name(Variant variant) {
  constexpr const char* kNames[] = {"tokens", "octets", "panels"};
  return kNames[static_cast<int>(variant)];
}
const char* dtype_name(DType dtype) { return dtype == DType::f32 ? "float32" : "float64"; }

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
    if (std::strcmp(forced, isa_name(isa)) != 0) continue;
    if (isa_supported(isa)) return isa;
    throw std::invalid_argument(std::string("SPFMT_ISA=") + forced +
                                " asks for a level that this CPU does not have");
  }
  throw std::invalid_argument(std::string("SPFMT_ISA=") + forced +
                              " names no level; expected scalar, avx2 or avx512");
}

double plan_padding(const Plan& plan) {
  if (plan.layout() != Layout::lists || plan.nnz() == 0) return 1.0;
  const int widest = tiles_for<float>(active_isa()).widest_window;
  const SlicePack& pack = plan.slices(widest, serial_executor());
  return static_cast<double>(pack.packed()) / static_cast<double>(plan.nnz());
}

namespace {

void check_layout(const Kernel& kernel, const Plan& plan) {
  if (kernel.layout != plan.layout()) {
    throw std::invalid_argument("a kernel for another layout than the plan's");
  }
}

}  // namespace

void run(const Kernel& kernel, const Plan& plan, const Args<float>& args,
         const Executor& executor) {
  check_layout(kernel, plan);
  kernel.run_f32(kernel, plan, args, executor);
}
void run(const Kernel& kernel, const Plan& plan, const Args<double>& args,
         const Executor& executor) {
  check_layout(kernel, plan);
  kernel.run_f64(kernel, plan, args, executor);
}

}  // namespace spfmt
