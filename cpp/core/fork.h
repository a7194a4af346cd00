// What threads build and share must never be half built in a forked child: the thread that was
// building it does not exist there, and its lock would stay locked for ever.
#pragma once

namespace spfmt {

// Held while a cache is locked or something shared is being built. fork() waits until nobody holds
// one, and nobody takes one until it is done. One thread may hold several.
class NoFork {
 public:
  NoFork();
  ~NoFork();
  NoFork(const NoFork&) = delete;
  NoFork& operator=(const NoFork&) = delete;
};

}  // namespace spfmt
