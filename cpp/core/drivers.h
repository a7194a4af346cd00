// One driver per (layout, op): panels, workspace and the split into parallel tiles. The variant and
// whether to use threads were chosen before (cost.h); sddmm has panels only.
#pragma once

#include "plan.h"
#include "spfmt.h"
#include "bodies.h"

namespace spfmt {

template <class T>
using Driver = void (*)(const Tiles<T>&, const Plan&, Variant, const Args<T>&, const Executor&);

// Y = A X by the kernels for small batches. `permutation` (or null) maps a position of A to a place
// in the values.
template <class T>
void lists_tokens(const Tiles<T>&, const Plan&, const int64_t* permutation, const Args<T>&,
                  const Executor&);
template <class T>
void lists_octets(const Tiles<T>&, const Plan&, const int64_t* permutation, const Args<T>&,
                  const Executor&);
template <class T>
void lists_spmm(const Tiles<T>&, const Plan&, Variant, const Args<T>&, const Executor&);
template <class T>
void lists_spmm_t(const Tiles<T>&, const Plan&, Variant, const Args<T>&, const Executor&);
template <class T>
void lists_sddmm(const Tiles<T>&, const Plan&, Variant, const Args<T>&, const Executor&);
template <class T>
void groups_spmm(const Tiles<T>&, const Plan&, Variant, const Args<T>&, const Executor&);
template <class T>
void groups_spmm_t(const Tiles<T>&, const Plan&, Variant, const Args<T>&, const Executor&);
template <class T>
void groups_sddmm(const Tiles<T>&, const Plan&, Variant, const Args<T>&, const Executor&);

}  // namespace spfmt
