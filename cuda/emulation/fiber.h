// Fibers: the threads of a block take turns on one thread of the host.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

// What a switch saves: the stack pointer, and what AddressSanitizer wants to know of the stack.
struct Context {
  void* sp = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake = nullptr;
};

// Registers that a call preserves lie on the stack that is left; nothing else needs saving.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*save*/, void* /*load*/) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
      "movq %rsp, (%rdi); movq %rsi, %rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

inline void switch_to(Context& from, Context& to, [[maybe_unused]] bool forever = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(forever ? nullptr : &from.fake, to.bottom, to.size);
#endif
  switch_stacks(&from.sp, to.sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

// What a fiber does first; `home` is where it came from.
inline void arrive([[maybe_unused]] Context& home) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &home.bottom, &home.size);
#endif
}

// Stacks of one host thread, used again from block to block, with a guard page below each.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() {
    for (char* stack : stacks_) {
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(stack, kBytes);  // or it stays so for who has it next
#endif
      munmap(stack, kBytes);
    }
  }

  // Lets `fiber` start with entry(), on stack i.
  void prepare(size_t i, Context& fiber, void (*entry)()) {
    char* stack = at(i);
    fiber.bottom = stack + kGuard;
    fiber.size = kBytes - kGuard;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.bottom, fiber.size);
#endif
    // Tops lie in different cache sets: hundreds of stacks would share a few lines otherwise.
    void** top = reinterpret_cast<void**>(stack + kBytes - i * 17 * 64 % 16384) - 2;
    *top = reinterpret_cast<void*>(entry);  // the stack is 8 mod 16 behind a call, as it must be
    fiber.sp = top - 6;                     // six registers that the first switch pops
  }

  // After an error, unfinished fibers still lie on their stacks: those are leaked.
  void abandon() { stacks_.clear(); }

 private:
  static constexpr size_t kBytes = 256 << 10, kGuard = 4096;
  std::vector<char*> stacks_;

  char* at(size_t i) {
    while (stacks_.size() <= i) {
      void* p = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (p == MAP_FAILED || mprotect(p, kGuard, PROT_NONE)) throw std::bad_alloc();
      stacks_.push_back(static_cast<char*>(p));
    }
    return stacks_[i];
  }
};

}  // namespace emulation
