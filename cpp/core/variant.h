// The rows of the table of variants: the ways in which products are computed.
//
// A variant is one file under lists/ or groups/ that holds its packing, its driver and its row, and
// one file under kernels/ with the serial bodies that each level compiles. Its row is listed in
// the table below, its bodies in core/bodies.h and kernels/table-inl.h.
#pragma once

#include <initializer_list>
#include <iterator>

#include "../cost/cost.h"
#include "bodies.h"
#include "plan.h"

namespace spfmt {

struct Variant {
  const char* name;
  Layout layout;
  unsigned ops;           // one bit per Op
  bool geometry;          // whether it takes products of images
  int64_t largest_batch;  // samples
  bool packs;             // whether it multiplies with packed values only
  Terms (*terms)(const CostModel&, const Summary&, const Work&);
  // Whether a level has the bodies for a dtype of its own; where not, the next lower one serves.
  bool (*exists)(Isa, DType);
  // Computes a product at a level that has the bodies.
  void (*run)(Isa, const Plan&, const Product&, const Executor&);

  bool takes(const Work& work) const {
    return does(work.op) && work.batch <= largest_batch && geometry == (work.geometry != nullptr);
  }
  // Whether it computes this product of some batch.
  bool does(Op op) const { return (ops >> static_cast<int>(op) & 1) != 0; }
};

// Every variant; where two are predicted to take the same time, the later one runs.
extern const Variant kListPanels, kListOctets, kListLookup, kListImages, kGroupPanels, kGroupBands,
    kGroupRows, kGroupImages;
inline constexpr const Variant* kVariants[] = {&kListPanels, &kListOctets,  &kListLookup,
                                               &kListImages, &kGroupPanels, &kGroupBands,
                                               &kGroupRows,  &kGroupImages};
static_assert(std::size(kVariants) <= kMostVariants);

// The row of a variant V with
//
//   static bool exists<T>(const Bodies<T>&)
//   static void run<T>(const Bodies<T>&, const Plan&, const Product&, const Executor&)
//   static Terms terms(const CostModel&, const Summary&, const Work&)
template <class V>
struct VariantOf {
  template <class T>
  static bool has(Isa isa) {
    const Bodies<T>* bodies = bodies_at<T>(isa);
    return bodies != nullptr && V::exists(*bodies);
  }
  static bool exists(Isa isa, DType dtype) {
    return dtype == DType::f64 ? has<double>(isa) : has<float>(isa);
  }
  static void run(Isa isa, const Plan& plan, const Product& p, const Executor& executor) {
    if (p.values.dtype == DType::f64) {
      V::run(*bodies_at<double>(isa), plan, p, executor);
    } else {
      V::run(*bodies_at<float>(isa), plan, p, executor);
    }
  }
  static constexpr Variant row(const char* name, Layout layout, std::initializer_list<Op> ops,
                               bool geometry, int64_t largest_batch, bool packs) {
    unsigned bits = 0;
    for (const Op op : ops) bits |= 1u << static_cast<int>(op);
    return {name, layout, bits, geometry, largest_batch, packs, V::terms, exists, run};
  }
};

}  // namespace spfmt
