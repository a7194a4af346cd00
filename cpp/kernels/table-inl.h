// The table of tile functions of one level, for one SIMD interface.
#pragma once

#include "activation-inl.h"
#include "samples-inl.h"
#include "row_groups-inl.h"
#include "lists_octets-inl.h"
#include "lists_lookup-inl.h"
#include "lists_panels-inl.h"

namespace spfmt {
namespace {

template <class S>
const Tiles<typename S::T>& tiles_of() noexcept {
  static constexpr Tiles<typename S::T> kTiles = {
      pack<S>,          unpack<S>,         activate<S>,        lists_panel<S>,
      stage_tokens<S>,  slices_tokens<S>,  S::kSliceTokens,    S::kWidestWindow,
      lists_octet<S>,   lists_sddmm<S>,    groups_panel<S>,    S::kTokens,
      groups_tokens<S>, groups_t_panel<S>, groups_t_tokens<S>, groups_sddmm<S>,
  };
  return kTiles;
}

}  // namespace
}  // namespace spfmt
