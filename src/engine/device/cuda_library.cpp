#include "engine/device/cuda_library.h"

#include <dlfcn.h>

#include <filesystem>

#include "base/error.h"
#include "engine/device/cpu.h"
#include "engine/device/cuda_entry.h"

namespace ht::engine {

namespace {

constexpr const char* kLibrary = "libht_cuda.so";

// Asked of the driver itself: libtorch_cuda takes 0.4 GB of memory, for nothing where there is no device.
bool driver_has_device(std::string& why_not) {
  void* driver = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (driver == nullptr) {
    why_not = "this machine has no NVIDIA driver (libcuda.so.1 is not found)";
    return false;
  }
  using Init = int (*)(unsigned);
  using Count = int (*)(int*);
  const auto init = reinterpret_cast<Init>(::dlsym(driver, "cuInit"));
  const auto count = reinterpret_cast<Count>(::dlsym(driver, "cuDeviceGetCount"));
  int devices = 0;
  const int result = init == nullptr || count == nullptr ? -1 : init(0) != 0 ? init(0) : count(&devices);
  if (result == 0 && devices > 0) return true;
  why_not = "the NVIDIA driver finds no device (cuInit and cuDeviceGetCount: error " + std::to_string(result) + ", " +
            std::to_string(devices) + " devices; is CUDA_VISIBLE_DEVICES empty?)";
  return false;
}

const Device* load(std::string& why_not) {
  if (!driver_has_device(why_not)) return nullptr;
  const std::filesystem::path library = std::filesystem::read_symlink("/proc/self/exe").parent_path() / kLibrary;
  if (!std::filesystem::exists(library)) {
    why_not = library.string() + " does not exist: this build was made without nvcc";
    return nullptr;
  }
  void* handle = ::dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL);
  const auto entry = handle == nullptr ? nullptr : reinterpret_cast<CudaEntry>(::dlsym(handle, kCudaEntryName));
  if (entry == nullptr) {
    why_not = library.string() + " cannot be loaded: " + ::dlerror();
    return nullptr;
  }
  const CudaEntryResult result = entry(kCudaEntryVersion);
  if (result.device == nullptr) why_not = result.why_not;
  return result.device;
}

}  // namespace

const Device* load_cuda_device(std::string& why_not) {
  static std::string reason;
  static const Device* const device = load(reason);
  why_not = reason;
  return device;
}

const Device& choose_device(const std::string& wish, std::string& note) {
  note.clear();
  if (wish == "cpu") return cpu_device();
  if (wish != "auto" && wish != "cuda") {
    throw user_error("device " + wish + " is unknown, allowed are auto, cpu, cuda");
  }
  std::string why_not;
  if (wish == "auto" && !driver_has_device(why_not)) return cpu_device();
  if (const Device* device = load_cuda_device(why_not)) return *device;
  if (wish == "cuda") {
    throw user_error("device cuda cannot be used: " + why_not +
                     ". With \"device\": \"cpu\" or \"auto\" the CPU is taken");
  }
  note = "the CPU is taken though there is a GPU: " + why_not;
  return cpu_device();
}

}  // namespace ht::engine
