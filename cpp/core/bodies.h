// The serial pieces that an ISA level provides. Drivers split work and call these; the functions
// hold no threads, no allocation and no checks.
#pragma once

#include "../groups/bands.h"
#include "../groups/images.h"
#include "../groups/panels.h"
#include "../lists/images.h"
#include "../lists/lookup.h"
#include "../lists/octets.h"
#include "../lists/panels.h"
#include "images.h"
#include "samples.h"

namespace spfmt {

// Of one level and dtype. A variant whose functions are null is left to the next lower level.
template <class T>
struct Bodies {
  SampleBodies<T> samples;
  ImageBodies<T> images;
  LookupBodies<T> lookup;
  OctetBodies<T> octets;
  ListPanelBodies<T> list_panels;
  BandBodies<T> bands;
  GroupPanelBodies<T> group_panels;
  ListImageBodies<T> list_images;
  GroupImageBodies<T> group_images;
};

const Bodies<float>& scalar_bodies_f32();
const Bodies<double>& scalar_bodies_f64();
const Bodies<float>& avx2_bodies();
const Bodies<float>& avx512_bodies();

// A product of images with lists that stand for a plan's structure (lists/images.cpp).
class Plan;
template <class T>
void run_row_lists(const Bodies<T>&, const Plan&, const RowLists&, const Product&, const Executor&);

// The same with the rows of a plan's bands (groups/rows.cpp).
template <class T>
void run_band_rows(const Bodies<T>&, const Plan&, const Product&, const Executor&);

// Null where a level has none for the dtype.
template <class T>
const Bodies<T>* bodies_at(Isa isa);
template <>
const Bodies<float>* bodies_at(Isa isa);
template <>
const Bodies<double>* bodies_at(Isa isa);

}  // namespace spfmt
