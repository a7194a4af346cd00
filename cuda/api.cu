// What the device says: how many there are, what went wrong, how much shared memory a kernel may
// have.
#include "api.h"

#include "device.h"

#ifdef __CUDACC__
#include <map>
#include <mutex>
#include <utility>

namespace spfmt::cuda {

constexpr int kAlways = 48 << 10;  // bytes that every kernel may have

int allow_shared(const void* kernel, int bytes) {
  if (bytes <= kAlways) return cudaSuccess;
  static std::mutex lock;
  static std::map<std::pair<const void*, int>, int> allowed;  // of each kernel on each device
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard<std::mutex> guard(lock);
  int& most = allowed[{kernel, device}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) most = bytes;
  return error;
}

int current_device(Device* out) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&out->processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&out->shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  return error;
}

}  // namespace spfmt::cuda

extern "C" const char* spfmt_cuda_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

extern "C" int spfmt_cuda_devices() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

extern "C" int spfmt_cuda_use(int device) { return cudaSetDevice(device); }
#else
extern "C" const char* spfmt_cuda_error(int code) {
  return code == spfmt::cuda::kInvalidValue ? "invalid argument" : emulation::last_error.c_str();
}

extern "C" int spfmt_cuda_devices() { return 1; }

extern "C" int spfmt_cuda_use(int device) { return device == 0 ? 0 : spfmt::cuda::kInvalidValue; }

// How the next launches run: `order` "forward", "reverse" or a number that seeds it, copies late or
// at once, blocks on so many threads.
extern "C" void emulate(const char* order, int late, int hosts) {
  using emulation::Settings;
  const bool number = order[0] >= '0' && order[0] <= '9';
  emulation::settings.order = number            ? Settings::seeded
                              : order[0] == 'r' ? Settings::reverse
                                                : Settings::forward;
  emulation::settings.seed = number ? std::atoi(order) : 0;
  emulation::settings.late = late;
  emulation::settings.hosts = hosts;
}

// Switches, mma, ldmatrix and bank conflicts since the last call.
extern "C" void emulated(int64_t* out) {
  emulation::Counts& c = emulation::counts;
  std::atomic<int64_t>* all[] = {&c.switches, &c.mma, &c.ldmatrix, &c.conflicts};
  for (int i = 0; i < 4; ++i) out[i] = all[i]->exchange(0);
}
#endif
