// From a node's constant inputs to a checked structure: the only place where numbers from a
// file become addresses. It knows no functions of ONNX Runtime, so it can be tested without one.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../core/spfmt.h"
#include "ort_api.h"

namespace spfmt::ort {

// A tensor of the file, row-major. Shape and data agree: ONNX Runtime guarantees that.
struct Tensor {
  ElementType type;
  std::vector<int64_t> shape;
  const void* data;
};

// What a node holds besides X and bias, in the order that its Structure names.
struct Constants {
  int64_t rows, cols;  // of the weight as a matrix
  std::vector<Tensor> inputs;
};

// One layout: its part of an operator's signature, between X and bias, and how to read it.
struct Structure {
  const char* name;                 // what operators begin with
  std::vector<const char*> inputs;  // values first, a vector in the order of the layout
  // Throws std::invalid_argument, naming what is wrong, for anything but a sound structure.
  std::shared_ptr<const Plan> (*read)(const Constants&);
};

const std::vector<Structure>& structures();

}  // namespace spfmt::ort
