// Linear layers: Y (..., out_features) of X (..., in_features).
#include <climits>

#include "node.h"

namespace spfmt::ort {
namespace {

int64_t extent(const SparseOp& op, const KernelInfo* node, const char* name) {
  return attribute(*op.runtime.api, node, name, 0, INT32_MAX);
}

class Linear : public Node {
 public:
  Linear(const SparseOp& op, const KernelInfo* node)
      : Node(op, node, extent(op, node, "out_features"), extent(op, node, "in_features")) {
    // One sample makes the kernel pack the values for small batches: the first should not pay.
    const int64_t size = size_of(dtype());
    std::vector<char> x(cols() * size), y(rows() * size);
    run(isa(), plan(), filled(product(), x.data(), y.data(), 1), serial_executor());
  }

  void compute(KernelContext* context) const override {
    Input x = operand(context, 0, "X");
    const int64_t batch = batch_of(x.shape);
    x.shape.back() = rows();
    void* y = result(context, x.shape);
    if (batch == 0 || rows() == 0) return;
    run_on(context, filled(product(context), data_of(api(), x.value), y, batch));
  }

 private:
  Product filled(Product p, const void* x, void* y, int64_t batch) const {
    p.in = {const_cast<void*>(x), dtype(), cols(), batch, 1, cols()};
    p.out = {y, dtype(), rows(), batch, 1, rows()};
    return p;
  }

  // The leading dimensions of X and their product.
  int64_t batch_of(const std::vector<int64_t>& shape) const {
    if (shape.empty() || shape.back() != cols()) {
      throw std::invalid_argument("X: expected a last dimension of " + std::to_string(cols()));
    }
    int64_t batch = 1;
    for (size_t i = 0; i + 1 < shape.size(); ++i) batch *= shape[i];
    return batch;
  }
};

// Y is X with its last dimension replaced by the length of the bias; symbolic names are kept.
void infer_linear(const SparseOp& op, const ShapeInferContext* context) {
  const Api& api = *op.runtime.api;
  const Info x = Info::input(api, context, 0);
  std::vector<int64_t> shape = x.shape();
  if (shape.empty()) return;  // X of unknown rank: so is Y
  std::vector<const char*> names = x.names();
  const std::vector<int64_t> rows = Info::input(api, context, op.bias_index()).shape();
  shape.back() = rows.size() == 1 ? rows[0] : -1;
  names.back() = "";
  infer(api, context, x, shape, names);
}

}  // namespace

const Kind kLinear = {"Linear", false,
                      [](const SparseOp& op, const KernelInfo* node) -> std::unique_ptr<Node> {
                        return std::make_unique<Linear>(op, node);
                      },
                      infer_linear};

}  // namespace spfmt::ort
