// ONNX Runtime's own threads, lent to the core for one run of a node.
#pragma once

#include "../core/spfmt.h"
#include "ort_api.h"

namespace spfmt::ort {

struct Pool {
  const Api& api;
  const KernelContext* context;

  Executor executor(int threads) { return {threads, this, for_each}; }

  // The session's threads, as far as the machine has as many. ONNX Runtime does not tell: so many
  // bodies meet, each on a thread of its own, as arrive within half a millisecond.
  int count_threads();
  static int threads_of_machine();

  static void for_each(void* self, int64_t n, void (*body)(void*, int64_t), void* arg);
};

}  // namespace spfmt::ort
