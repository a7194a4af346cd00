// One driver per (layout, op): regimes, panels, workspace and the split into parallel tiles.
#pragma once

#include "plan.h"
#include "spfmt.h"
#include "tiles.h"

namespace spfmt {

template <class T>
using Driver = void (*)(const Tiles<T>&, const Plan&, const Args<T>&, const Executor&);

template <class T>
void lists_spmm(const Tiles<T>&, const Plan&, const Args<T>&, const Executor&);
template <class T>
void lists_spmm_t(const Tiles<T>&, const Plan&, const Args<T>&, const Executor&);
template <class T>
void lists_sddmm(const Tiles<T>&, const Plan&, const Args<T>&, const Executor&);
template <class T>
void groups_spmm(const Tiles<T>&, const Plan&, const Args<T>&, const Executor&);
template <class T>
void groups_spmm_t(const Tiles<T>&, const Plan&, const Args<T>&, const Executor&);
template <class T>
void groups_sddmm(const Tiles<T>&, const Plan&, const Args<T>&, const Executor&);

}  // namespace spfmt
