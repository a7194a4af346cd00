#include "fork.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>

namespace spfmt {
namespace {

std::atomic<int> holders{0};
std::atomic<bool> forking{false};
thread_local int held = 0;

void before_fork() {
  forking.store(true);
  while (holders.load() > (held > 0 ? 1 : 0)) sched_yield();
}
void after_fork() { forking.store(false); }

[[maybe_unused]] const int registered = pthread_atfork(before_fork, after_fork, after_fork);

}  // namespace

NoFork::NoFork() {
  if (held++ > 0) return;
  holders.fetch_add(1);
  while (forking.load()) {  // step back, or fork() would wait for us and we for it
    holders.fetch_sub(1);
    while (forking.load()) sched_yield();
    holders.fetch_add(1);
  }
}
NoFork::~NoFork() {
  if (--held == 0) holders.fetch_sub(1);
}

}  // namespace spfmt
