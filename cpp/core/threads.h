// The one way from drivers to threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>

#include "spfmt.h"

namespace spfmt {

// The executor's threads are not ours: an exception that left `body` there would end the process.
// The first one is kept for the caller, and what has not begun by then is left out.
template <class Body>
struct Guarded {
  const Body& body;
  std::atomic<bool> failed{false};
  std::exception_ptr error{};

  static void run(void* self, int64_t i) noexcept {
    Guarded& g = *static_cast<Guarded*>(self);
    if (g.failed.load(std::memory_order_relaxed)) return;
    try {
      g.body(i);
    } catch (...) {
      if (!g.failed.exchange(true)) g.error = std::current_exception();
    }
  }
};

template <class Body>
void for_each(const Executor& executor, int64_t n, const Body& body) {
  if (n <= 0) return;
  if (n == 1 || executor.threads <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  Guarded<Body> guarded{body};
  executor.for_each(executor.context, n, Guarded<Body>::run, &guarded);
  if (guarded.error) std::rethrow_exception(guarded.error);
}

// body(begin, end) over [0, n) in pieces of at most `step`.
template <class Body>
void for_ranges(const Executor& executor, int64_t n, int64_t step, const Body& body) {
  step = std::max<int64_t>(1, step);
  for_each(executor, (n + step - 1) / step,
           [&](int64_t i) { body(i * step, std::min(n, (i + 1) * step)); });
}

// Pieces small enough to balance: about eight per thread, all in one when serial.
inline int64_t range_step(const Executor& executor, int64_t n) {
  return executor.threads <= 1 ? n : (n + 8 * executor.threads - 1) / (8 * executor.threads);
}

}  // namespace spfmt
