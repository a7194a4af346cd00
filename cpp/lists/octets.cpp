// Small batches of Lists products with eight samples as lanes.
#include <algorithm>
#include <vector>

#include "../core/drivers.h"
#include "octet_pack.h"
#include "../core/threads.h"

namespace spfmt {
namespace {

// Eight samples of X, tile after tile, a feature of zeros behind each.
template <class T>
void stage(const Tiles<T>& tiles, const RowOctets& a, Strided<const T> x, int64_t cols, int n,
           T* to) {
  for (int64_t t = 0; t < a.tiles; ++t, to += (a.width + 1) * kOctet) {
    const int64_t first = std::min(cols, t * a.width), features = std::min(a.width, cols - first);
    tiles.pack({x.data + first * x.feature_stride, x.feature_stride, x.sample_stride},
               {to, features, kOctet, n}, 0, features);
    std::fill_n(to + a.width * kOctet, kOctet, T(0));
  }
}

}  // namespace

template <class T>
void lists_octets(const Tiles<T>& tiles, const Plan& plan, const int64_t* permutation,
                  const Args<T>& args, const Executor& executor) {
  const OctetPack& pack = plan.octets();
  const RowOctets& a = pack.view;
  const auto packed =
      pack.values.get(args.values_version, sizeof(T) * pack.packed(), [&](Buffer& buffer) {
        pack_octet_values(pack, permutation, args.values, buffer.as<T>(), executor);
      });
  const int64_t octets = (args.in.cols + kOctet - 1) / kOctet;
  const int64_t staged = a.tiles * (a.width + 1) * kOctet;  // elements per octet
  const Workspace x(sizeof(T) * staged * octets);
  const auto samples = [&](int64_t o) {
    return static_cast<int>(std::min<int64_t>(kOctet, args.in.cols - o * kOctet));
  };
  for (int64_t o = 0; o < octets; ++o) {
    const T* from = args.in.data + o * kOctet * args.in.col_stride;
    stage(tiles, a, {from, args.in.row_stride, args.in.col_stride}, args.in.rows, samples(o),
          x.as<T>() + o * staged);
  }
  for_each(executor, a.chunks, [&](int64_t chunk) {
    const int64_t row = chunk * kOctetRows;
    const int rows = static_cast<int>(std::min(kOctetRows, plan.rows() - row));
    for (int64_t o = 0; o < octets; ++o) {
      const Strided<T> y{
          args.out.data + row * args.out.row_stride + o * kOctet * args.out.col_stride,
          args.out.row_stride, args.out.col_stride};
      tiles.lists_octet(a, packed->template as<T>(), x.as<T>() + o * staged, samples(o), chunk,
                        rows, args.bias ? args.bias + row : nullptr, args.activation, y);
    }
  });
}

template void lists_octets(const Tiles<float>&, const Plan&, const int64_t*, const Args<float>&,
                           const Executor&);
template void lists_octets(const Tiles<double>&, const Plan&, const int64_t*, const Args<double>&,
                           const Executor&);

}  // namespace spfmt
