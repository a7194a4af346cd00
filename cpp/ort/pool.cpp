#include "pool.h"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

#include "runtime.h"

namespace spfmt::ort {

int Pool::count_threads() {
  struct Meeting {
    std::mutex mutex;
    std::vector<std::thread::id> present;
    const std::chrono::steady_clock::time_point end =
        std::chrono::steady_clock::now() + std::chrono::microseconds(500);

    size_t join() {
      const std::lock_guard<std::mutex> lock(mutex);
      const auto me = std::this_thread::get_id();
      if (std::find(present.begin(), present.end(), me) == present.end()) present.push_back(me);
      return present.size();
    }
  } meeting;
  const int most = threads_of_machine();
  meeting.present.reserve(most);  // no body may throw
  const auto body = [](void* arg, int64_t) {
    Meeting& meeting = *static_cast<Meeting*>(arg);
    const auto all = static_cast<size_t>(threads_of_machine());
    while (meeting.join() < all && std::chrono::steady_clock::now() < meeting.end) {
      std::this_thread::yield();
    }
  };
  for_each(this, most, body, &meeting);
  return static_cast<int>(meeting.present.size());
}

int Pool::threads_of_machine() {
  // Asking costs microseconds, more than a small product: a system call or a file under /sys.
  static const int threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  return threads;
}

void Pool::for_each(void* self, int64_t n, void (*body)(void*, int64_t), void* arg) {
  struct Call {
    void (*body)(void*, int64_t);
    void* arg;
  } call{body, arg};
  const auto one = [](void* user, size_t i) {
    const Call& c = *static_cast<Call*>(user);
    c.body(c.arg, static_cast<int64_t>(i));
  };
  const Pool& pool = *static_cast<Pool*>(self);
  // Thrown at once: else layouts and values half packed would be kept for the requests to come.
  check(pool.api.KernelContext_ParallelFor(pool.context, one, static_cast<size_t>(n), 0, &call));
}

}  // namespace spfmt::ort
