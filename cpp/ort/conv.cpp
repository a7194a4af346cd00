// Convolutions: Y (N, out_channels, Ho, Wo) of X (N, in_channels, H, W), as ONNX's Conv with the
// same attributes; those that it may leave out are required here, so that no default can differ.
#include <climits>

#include "node.h"

namespace spfmt::ort {
namespace {

constexpr int64_t kMost = int64_t{1} << 30;  // the core adds sizes up

// One axis of the attributes.
struct Along {
  int64_t kernel, stride, before, after, dilation;

  int64_t reach() const { return dilation * (kernel - 1) + 1; }
  bool fits(int64_t size) const { return size + before + after >= reach(); }
  int64_t out(int64_t size) const { return (size + before + after - reach()) / stride + 1; }
  bool keeps() const { return stride == 1 && before + after == reach() - 1; }
};

// An attribute of two integers (y, x), or of four as ONNX orders padding (y0, x0, y1, x1), by axes.
Along along(size_t i, const std::vector<int64_t>& kernel, const std::vector<int64_t>& strides,
            const std::vector<int64_t>& pads, const std::vector<int64_t>& dilations) {
  return {kernel[i], strides[i], pads[i], pads[i + 2], dilations[i]};
}

struct Attributes {
  int64_t rows, channels, groups;
  Along y, x;

  static Attributes read(const Api& api, const KernelInfo* node) {
    const auto kernel = attributes(api, node, "kernel_shape", 2, 1, kMost);
    const auto strides = attributes(api, node, "strides", 2, 1, kMost);
    const auto pads = attributes(api, node, "pads", 4, 0, kMost);
    const auto dilations = attributes(api, node, "dilations", 2, 1, kMost);
    const Attributes a{attribute(api, node, "out_channels", 0, INT32_MAX),
                       attribute(api, node, "in_channels", 0, INT32_MAX),
                       attribute(api, node, "group", 1, INT32_MAX),
                       along(0, kernel, strides, pads, dilations),
                       along(1, kernel, strides, pads, dilations)};
    if (a.rows % a.groups != 0 || a.channels % a.groups != 0) {
      throw std::invalid_argument("group: got " + std::to_string(a.groups) +
                                  ", expected a divisor of in_channels and out_channels");
    }
    for (const Along& axis : {a.y, a.x}) {
      if (axis.kernel * axis.dilation > kMost) {
        throw std::invalid_argument("dilations: expected a kernel that reaches no further than " +
                                    std::to_string(kMost));
      }
    }
    return a;
  }

  // Columns of the weight as a matrix.
  int64_t cols() const {
    const int64_t cells = y.kernel * x.kernel;
    if (cells > INT32_MAX || channels / groups * cells > INT32_MAX) {
      throw std::invalid_argument("kernel_shape: expected fewer than 2^31 weights per row");
    }
    return channels / groups * cells;
  }
};

class Conv : public Node {
 public:
  Conv(const SparseOp& op, const KernelInfo* node)
      : Conv(op, node, Attributes::read(*op.runtime.api, node)) {}

  void compute(KernelContext* context) const override {
    const Input x = operand(context, 0, "X");
    const std::vector<int64_t>& n = x.shape;
    if (n.size() != 4 || n[1] != is_.channels) {
      throw std::invalid_argument("X: expected images (N, " + std::to_string(is_.channels) +
                                  ", H, W)");
    }
    const Geometry geometry{axis("height", is_.y, n[2]), axis("width", is_.x, n[3]), is_.groups};
    const std::vector<int64_t> out{n[0], rows(), geometry.y.out, geometry.x.out};
    void* y = result(context, out);
    if (n[0] == 0 || rows() == 0) return;
    Product p = product(context);
    p.in = images(const_cast<void*>(data_of(api(), x.value)), n);
    p.out = images(y, out);
    p.geometry = &geometry;
    if (op().kind->adds) p.add = addend(context, out);
    const std::string error = spfmt::check(plan(), p);
    if (!error.empty()) throw std::invalid_argument(error);
    run_on(context, p);
  }

 private:
  Conv(const SparseOp& op, const KernelInfo* node, const Attributes& is)
      : Node(op, node, is.rows, is.cols()), is_(is) {}

  static Axis axis(const char* name, const Along& a, int64_t size) {
    if (size > kMost || !a.fits(size)) {
      throw std::invalid_argument(std::string("X: got a ") + name + " of " + std::to_string(size) +
                                  ", expected at least " +
                                  std::to_string(a.reach() - a.before - a.after) +
                                  ", what the kernel reaches over, and at most 2^30");
    }
    return {size, a.out(size), a.kernel, a.stride, a.before, a.dilation};
  }

  View addend(KernelContext* context, const std::vector<int64_t>& shape) const {
    const Input z = operand(context, op().bias_index() + 1, "addend");
    if (z.shape != shape) throw std::invalid_argument("addend: expected the shape of Y");
    return images(const_cast<void*>(data_of(api(), z.value)), shape);
  }

  View images(void* data, const std::vector<int64_t>& n) const {
    return {data, dtype(), n[1], n[0], n[2] * n[3], n[1] * n[2] * n[3], n[3], 1};
  }

  const Attributes is_;
};

// Channels from the bias, sizes of the maps as far as they are known; a map that keeps its size
// keeps the size's name, as the batch does.
void infer_conv(const SparseOp& op, const ShapeInferContext* context) {
  const Api& api = *op.runtime.api;
  const Info x = Info::input(api, context, 0);
  const Info bias = Info::input(api, context, op.bias_index());
  std::vector<int64_t> shape = x.shape();
  std::vector<const char*> names = x.names();
  if (shape.empty()) {  // X of unknown rank
    shape.assign(4, -1);
    names.assign(4, "");
  }
  if (shape.size() != 4) return;  // is refused when it runs
  const std::vector<int64_t> rows = bias.shape();
  shape[1] = rows.size() == 1 ? rows[0] : -1;
  names[1] = "";
  const auto known = [&](const char* name, size_t count, int64_t least) {
    return known_attributes(api, context, name, count, least, kMost);
  };
  const auto kernel = known("kernel_shape", 2, 1), strides = known("strides", 2, 1),
             pads = known("pads", 4, 0), dilations = known("dilations", 2, 1);
  // What is out of range is refused when the node is made.
  const bool complete = !kernel.empty() && !strides.empty() && !pads.empty() && !dilations.empty();
  for (size_t i = 0; i < 2; ++i) {
    int64_t& size = shape[i + 2];
    const int64_t given = std::exchange(size, -1);
    const char* name = std::exchange(names[i + 2], "");
    if (!complete) continue;
    const Along a = along(i, kernel, strides, pads, dilations);
    if (a.keeps()) {
      size = given;
      names[i + 2] = name;
    } else if (given >= 0 && given <= kMost && a.fits(given)) {
      size = a.out(given);
    }
  }
  infer(api, context, x, shape, names);
}

}  // namespace

namespace {

std::unique_ptr<Node> make_conv(const SparseOp& op, const KernelInfo* node) {
  return std::make_unique<Conv>(op, node);
}

}  // namespace

const Kind kConv = {"Conv", false, make_conv, infer_conv};
const Kind kConvAdd = {"ConvAdd", true, make_conv, infer_conv};

}  // namespace spfmt::ort
