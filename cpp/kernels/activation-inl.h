// Activations of finished results, in place. Included once per ISA level.
//
// With t = |x| the smooth ones are built from e = exp(-something) in [0, 1], which neither
// overflows nor cancels, so results for negative x keep their relative accuracy where 1 + erf and 1
// + tanh lose it. Largest errors over all float32 with normal results, in units of the last place
// against float64: relu 0, silu 4, gelu_tanh 5, gelu 7 (tests/test_activations.py). NaN stays NaN,
// and infinities have their limits: f(-inf) = -0, where x * sigmoid(x) computed literally is NaN.
#pragma once

#include "../core/samples.h"

namespace spfmt {
namespace {

constexpr float kLower = 0x1p-64f;

// 2^64 exp(x) for x <= 0 within 1 ulp: x = n ln 2 + r (Cody and Waite), and a minimax polynomial of
// relative error 3e-9 in r. Raised, because exp(x) alone becomes denormal, which costs precision
// where x exp(x) is still normal, and tens of cycles per operation.
template <class S, class V = typename S::V>
inline V raised_exp(V x) noexcept {
  constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147182f, kLn2Rest = -1.90465430e-9f;
  constexpr float kQ[] = {0x1.6a2434p-10f, 0x1.1239e2p-7f, 0x1.5558f2p-5f, 0x1.555492p-3f,
                          0x1.fffffcp-2f};
  x = S::max(S::set1(-130.0f), x);  // by which no result is left
  const V n = S::round(S::mul(x, S::set1(kLog2e)));
  V r = S::fma(n, S::set1(-kLn2), x);
  r = S::fma(n, S::set1(-kLn2Rest), r);
  V q = S::set1(kQ[0]);
  for (int i = 1; i < 5; ++i) q = S::fma(q, r, S::set1(kQ[i]));
  const V m = S::add(S::set1(1.0f), S::fma(S::mul(r, r), q, r));
  return S::scale(m, S::add(n, S::set1(64.0f)));
}

// x * weight, the weight raised where x is negative.
template <class S, class V = typename S::V>
inline V weigh(V x, V raised, V positive) noexcept {
  const V one = S::set1(1.0f);
  return S::mul(S::mul(x, S::if_negative(x, raised, positive)),
                S::if_negative(x, S::set1(kLower), one));
}

// x * sigmoid(v), where v has the sign of x and e = 2^64 exp(-|v|).
template <class S, class V = typename S::V>
inline V gate(V x, V e) noexcept {
  const V scale = S::div(S::set1(1.0f), S::fma(e, S::set1(kLower), S::set1(1.0f)));
  return weigh<S>(x, S::mul(e, scale), scale);
}

template <class S, class V = typename S::V>
inline V silu(V x) noexcept {
  const V e = raised_exp<S>(S::sub(S::zero(), S::magnitude(x)));
  return gate<S>(S::max(S::set1(-110.0f), x), e);
}

// x sigmoid(v), v = 2 sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks and Gimpel 2016). v is a sum of
// two floats: e = exp(-v) multiplies the relative error of v by v, which goes up to 100.
template <class S, class V = typename S::V>
inline V gelu_tanh(V x) noexcept {
  const V k0 = S::set1(0x1.988454p+0f), k1 = S::set1(0x1.2444f2p-4f);
  const V k0_rest = S::set1(-0x1.857936p-25f), k1_rest = S::set1(0x1.49b16ap-29f);
  const V t = S::min(S::set1(11.0f), S::magnitude(x));  // at 11 the result has become -0 or x
  const V h = S::mul(t, t), h_rest = S::fma(t, t, S::sub(S::zero(), h));
  const V m = S::mul(k1, h), m_rest = S::fma(k1, h, S::sub(S::zero(), m));
  const V q = S::add(k0, m), added = S::sub(q, k0);
  V q_rest = S::add(S::sub(k0, S::sub(q, added)), S::sub(m, added));
  q_rest = S::add(S::add(q_rest, m_rest), S::fma(k1, h_rest, S::fma(k1_rest, h, k0_rest)));
  const V v = S::mul(t, q);
  const V v_rest = S::fma(t, q_rest, S::fma(t, q, S::sub(S::zero(), v)));
  const V e = raised_exp<S>(S::sub(S::zero(), v));
  return gate<S>(S::max(S::set1(-11.0f), x), S::fma(e, S::sub(S::zero(), v_rest), e));
}

// x Phi(x). Phi(-t) = exp(-t^2 / 2) R(1 / (1 + 0.3 t)) with R a minimax polynomial of relative
// error 3e-9 on t <= 14.5; t^2 is a sum of two floats, as in gelu_tanh.
template <class S, class V = typename S::V>
inline V gelu(V x) noexcept {
  constexpr float kR[] = {-0.02001933939754963f, 0.10888803005218506f,  -0.21908244490623474f,
                          0.1782458871602012f,   -0.06664502620697021f, 0.08815155178308487f,
                          0.08175354450941086f,  0.10930106043815613f,  0.1197357103228569f,
                          0.1196703165769577f,   7.068044283187191e-07f};
  const V one = S::set1(1.0f), half = S::set1(-0.5f);
  const V t = S::min(S::set1(15.0f), S::magnitude(x));
  const V h = S::mul(t, t), h_rest = S::fma(t, t, S::sub(S::zero(), h));
  const V s = S::div(one, S::fma(t, S::set1(0.3f), one));
  V r = S::set1(kR[0]);
  for (int i = 1; i < 11; ++i) r = S::fma(r, s, S::set1(kR[i]));
  const V e = raised_exp<S>(S::mul(h, half));
  const V tail = S::mul(S::fma(e, S::mul(h_rest, half), e), r);
  return weigh<S>(S::max(S::set1(-15.0f), x), tail, S::fma(tail, S::set1(-kLower), one));
}

// The scalar level in float64: rounded to float32 the result is the nearest one but for rare ties.
template <class S>
inline double libm_activation(Activation kind, double x) noexcept {
  constexpr double kSqrtHalf = 0.70710678118654752440, kSlope = 1.5957691216057307117;
  double v = x;  // silu
  switch (kind) {
    case Activation::relu:
      return 0.0 > x ? 0.0 : x;
    case Activation::gelu:
      return (x < -40.0 ? -40.0 : x) * 0.5 * S::erfc(-kSqrtHalf * x);
    case Activation::gelu_tanh:
      v = kSlope * x * (1.0 + 0.044715 * x * x);
      break;
    default:
      break;
  }
  const double e = S::exp(v < 0.0 ? v : -v);
  return (x < -1000.0 ? -1000.0 : x) * ((v < 0.0 ? e : 1.0) / (1.0 + e));
}

template <class S, Activation kKind, class V = typename S::V>
inline V activation_of(V x) noexcept {
  if constexpr (kKind == Activation::none) {
    return x;
  } else if constexpr (S::kLibm) {
    for (auto& lane : x.lane) {
      lane = static_cast<typename S::T>(libm_activation<S>(kKind, static_cast<double>(lane)));
    }
    return x;
  } else {
    switch (kKind) {
      case Activation::relu:
        return S::max(S::zero(), x);
      case Activation::gelu:
        return gelu<S>(x);
      case Activation::gelu_tanh:
        return gelu_tanh<S>(x);
      default:
        return silu<S>(x);
    }
  }
}

// body(f) with the activation as a constant.
template <class Body>
__attribute__((always_inline)) inline void with_activation(Activation kind,
                                                           const Body& body) noexcept {
  switch (kind) {
    case Activation::none:
      return body(std::integral_constant<Activation, Activation::none>{});
    case Activation::relu:
      return body(std::integral_constant<Activation, Activation::relu>{});
    case Activation::gelu:
      return body(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh:
      return body(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::silu:
      return body(std::integral_constant<Activation, Activation::silu>{});
  }
}

// `rows` names the rows of y, null: 0 .. n - 1. `width` is a multiple of kLanes.
template <class S, Activation kKind, class T = typename S::T>
void activate_rows(T* y, int64_t ldy, int64_t width, const int32_t* rows, int64_t n) noexcept {
  for (int64_t i = 0; i < n; ++i) {
    T* row = y + (rows ? rows[i] : i) * ldy;
    for (int64_t b = 0; b < width; b += kLanes) {
      S::store(row + b, activation_of<S, kKind>(S::load(row + b)));
    }
  }
}

template <class S, class T = typename S::T>
void activate(Activation kind, T* y, int64_t ldy, int64_t width, const int32_t* rows,
              int64_t n) noexcept {
  if (kind == Activation::none) return;
  with_activation(kind,
                  [&](auto f) { activate_rows<S, decltype(f)::value>(y, ldy, width, rows, n); });
}

template <class S, class V = typename S::V>
inline V activated(Activation kind, V v) noexcept {
  if (kind == Activation::none) return v;
  typename S::T lane[kLanes];
  S::store(lane, v);
  activate<S>(kind, lane, kLanes, kLanes, nullptr, 1);
  return S::load(lane);
}

// Four vectors, a sample each, to the rows that they belong to, four samples side by side.
template <class S, class T = typename S::T>
inline void store_quads(const typename S::V* sum, const int32_t* row, int rows, T* y,
                        int64_t stride) noexcept {
  if (rows == kLanes) {
    S::store_quads(sum, [&](int i, auto quad) { quad(y + row[i] * stride); });
  } else {
    S::store_quads(sum, [&](int i, auto quad) {
      if (i < rows) quad(y + row[i] * stride);
    });
  }
}

// The end of a product with N samples: lanes, with bias and activation, to the rows of Y that they
// belong to, whose order is arbitrary. `quads`: the samples of a row are contiguous, with room for
// N rounded up to four, which are written together.
template <class S, int N, class T = typename S::T>
inline void scatter_rows(const typename S::V* out, const int32_t* row, int rows, const T* bias,
                         Activation kind, Strided<T> y, bool quads) noexcept {
  T add[kLanes] = {};
  if (bias) {
    for (int i = 0; i < rows; ++i) add[i] = bias[row[i]];
  }
  const auto start = S::load(add);
  if (quads) {
    constexpr int kQuads = (N + 3) / 4;
    typename S::V sum[4 * kQuads];
    SPFMT_UNROLL
    for (int b = 0; b < 4 * kQuads; ++b) {
      sum[b] = b < N ? activated<S>(kind, S::add(out[b], start)) : S::zero();
    }
    SPFMT_UNROLL
    for (int q = 0; q < kQuads; ++q) {
      store_quads<S>(sum + 4 * q, row, rows, y.data + 4 * q, y.feature_stride);
    }
    return;
  }
  for (int b = 0; b < N; ++b) {
    T lane[kLanes];
    S::store(lane, activated<S>(kind, S::add(out[b], start)));
    T* to = y.data + b * y.sample_stride;
    for (int i = 0; i < rows; ++i) to[row[i] * y.feature_stride] = lane[i];
  }
}

}  // namespace
}  // namespace spfmt
