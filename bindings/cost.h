// Adds the cost model to the module; see cost.cpp.
#pragma once

#include <pybind11/pybind11.h>

void bind_cost(pybind11::module_& m);
