// The bodies of one level, for one SIMD interface.
#pragma once

#include "../core/bodies.h"
#include "activation-inl.h"
#include "groups_bands-inl.h"
#include "groups_images-inl.h"
#include "groups_panels-inl.h"
#include "images-inl.h"
#include "lists_images-inl.h"
#include "lists_lookup-inl.h"
#include "lists_octets-inl.h"
#include "lists_panels-inl.h"
#include "samples-inl.h"

namespace spfmt {
namespace {

template <class S>
const Bodies<typename S::T>& bodies_of() noexcept {
  static constexpr Bodies<typename S::T> kBodies = {
      {pack<S>, unpack<S>, activate<S>},
      image_bodies<S>(),
      lookup_bodies<S>(),
      octet_bodies<S>(),
      list_panel_bodies<S>(),
      band_bodies<S>(),
      group_panel_bodies<S>(),
      list_image_bodies<S>(),
      group_image_bodies<S>(),
  };
  return kBodies;
}

}  // namespace
}  // namespace spfmt
