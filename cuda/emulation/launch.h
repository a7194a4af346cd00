// A grid of blocks, on one or more threads of the host.
#pragma once

#include <mutex>
#include <thread>

#include "block.h"

namespace emulation {

constexpr int kMostThreads = 1024;
constexpr size_t kMostShared = 227 << 10;
constexpr int kLaunchFailure = 719;  // cudaErrorLaunchFailure

inline thread_local std::string last_error;

inline void run_grid(dim3 grid, dim3 threads, size_t shared, const std::function<void()>& body) {
  const int64_t total = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  if (threads.x * threads.y * threads.z > kMostThreads || shared > kMostShared || total == 0 ||
      grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error("a launch that no device takes");
  }
  std::atomic<int64_t> next{0};
  std::mutex lock;
  std::string error;
  const auto work = [&] {
    thread_local Stacks stacks;  // launches after this one use them again
    for (int64_t i = next++; i < total; i = next++) {
      Block b;
      b.index = dim3(i % grid.x, i / grid.x % grid.y, i / (static_cast<int64_t>(grid.x) * grid.y));
      b.threads = threads;
      b.grid = grid;
      b.shared_bytes = shared;
      b.body = &body;
      try {
        run_block(b, stacks);
      } catch (const std::exception& e) {
        const std::lock_guard<std::mutex> guard(lock);
        if (error.empty()) error = e.what();
        next = total;
        stacks.abandon();
      }
    }
    block = nullptr;
  };
  std::vector<std::thread> helpers;
  for (int i = 1; i < settings.hosts; ++i) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  if (!error.empty()) throw std::runtime_error(error);
}

inline int launch(dim3 grid, dim3 threads, size_t shared, const std::function<void()>& body) {
  try {
    run_grid(grid, threads, shared, body);
    return 0;
  } catch (const std::exception& e) {
    last_error = e.what();
    return kLaunchFailure;
  }
}

}  // namespace emulation
