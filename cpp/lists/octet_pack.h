// Building RowOctets from Lists, and bringing values into their order.
#pragma once

#include <memory>
#include <vector>

#include "../core/plan.h"

namespace spfmt {

std::unique_ptr<OctetPack> make_octets(const Lists& lists);

// Places per nonzero of make_octets(lists), estimated from a few chunks of rows; at least 1.
double octet_padding(const Lists& lists);

// Values in the order of the steps, zero where there are none. `permutation` (or null) maps a
// position of the lists to a place in `values`.
template <class T>
void pack_octet_values(const OctetPack& pack, const int64_t* permutation, const T* values,
                       T* packed, const Executor& executor);

}  // namespace spfmt
