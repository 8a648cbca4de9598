#include "engine/device/cpu.h"

#include <ATen/Parallel.h>
#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <string>
#include <thread>

#include "base/error.h"
#include "engine/device/cpu_attention.h"
#include "kernels/cpu/cpu_table.h"
#include "kernels/reference/reference_table.h"

namespace ht::engine {

namespace {

// Every step allocates and frees the same large tensors. By default glibc maps and unmaps each of them, and the kernel
// clears their pages every time; so memory is kept for the next step instead, in one arena for all threads.
void keep_freed_memory() {
  mallopt(M_ARENA_MAX, 1);
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the largest that glibc takes
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
}

// The number in a file, or in the line of it that begins with `name`; the maximum when there is none.
std::uint64_t read_number(const std::string& file, const std::string& name = "") {
  std::ifstream stream(file);
  std::string word;
  while (stream >> word) {
    if (!name.empty() && word != name) continue;
    if (!name.empty() && !(stream >> word)) break;
    char* end = nullptr;
    const std::uint64_t value = std::strtoull(word.c_str(), &end, 10);
    if (end != word.c_str()) return value;
    break;
  }
  return std::numeric_limits<std::uint64_t>::max();
}

// Free memory by /proc/meminfo and the cgroup's limit.
std::uint64_t available_memory() {
  std::uint64_t available = read_number("/proc/meminfo", "MemAvailable:");
  if (available != std::numeric_limits<std::uint64_t>::max()) available *= 1024;
  const std::uint64_t limit = read_number("/sys/fs/cgroup/memory.max");
  const std::uint64_t used = read_number("/sys/fs/cgroup/memory.current");
  if (limit != std::numeric_limits<std::uint64_t>::max() && used <= limit)
    available = std::min(available, limit - used);
  return available == std::numeric_limits<std::uint64_t>::max() ? std::uint64_t{4} << 30 : available;
}

// A device whose tensors lie in this process's memory.
class HostDevice final : public Device {
 public:
  HostDevice(at::ScalarType dtype, const HtKernelTable& kernels, bool decode_kernels)
      : dtype_(dtype), kernels_(kernels), decode_kernels_(decode_kernels) {}

  std::string name() const override {
    const std::string threads = std::to_string(at::get_num_threads());
    return (decode_kernels_ ? "cpu, " : std::string("cpu, ") + kernels_.name + ", ") + threads + " threads";
  }
  at::Device torch_device() const override { return at::kCPU; }
  at::ScalarType compute_dtype() const override { return dtype_; }
  const HtKernelTable& kernels() const override { return kernels_; }
  HtStream stream() const override { return nullptr; }
  Memory memory() const override {
    return {available_memory(), static_cast<std::uint64_t>(::sysconf(_SC_PHYS_PAGES)) *
                                    static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE))};
  }
  bool has_decode_kernels() const override { return decode_kernels_; }
  at::Tensor attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const AttentionRanges& ranges, std::int64_t window,
                               std::vector<at::Tensor>& saved) const override {
    return cpu_attention_forward(q, k, v, ranges, window, saved);
  }
  void attention_backward(const at::Tensor& grad_o, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& o, const AttentionRanges& ranges, std::int64_t window,
                          const std::vector<at::Tensor>& saved, at::Tensor& dqkv) const override {
    cpu_attention_backward(grad_o, q, k, v, o, ranges, window, saved, dqkv);
  }

 private:
  at::ScalarType dtype_;
  const HtKernelTable& kernels_;
  bool decode_kernels_;
};

}  // namespace

const Device& cpu_device() {
  static const HostDevice device(at::kFloat, *ht_cpu_kernels(), true);
  return device;
}

const Device& reference_device(at::ScalarType dtype) {
  static const HostDevice float_device(at::kFloat, *ht_reference_kernels(HT_F32), false);
  static const HostDevice bf16_device(at::kBFloat16, *ht_reference_kernels(HT_BF16), false);
  if (dtype != at::kFloat && dtype != at::kBFloat16) {
    throw server_error(std::string("there are no reference kernels for ") + c10::toString(dtype));
  }
  return dtype == at::kFloat ? float_device : bf16_device;
}

void initialize_cpu(int threads) {
  keep_freed_memory();
  __builtin_cpu_init();
  std::string missing;
  if (!__builtin_cpu_supports("avx2")) missing += " AVX2";
  if (!__builtin_cpu_supports("fma")) missing += " FMA";
  if (!__builtin_cpu_supports("bmi2")) missing += " BMI2";
  if (!missing.empty()) {
    throw server_error("this processor lacks" + missing +
                       ": the CPU engine needs x86-64-v3 (Intel Haswell or AMD Excavator and later)");
  }
  const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  at::set_num_threads(threads > 0 ? threads : cores);
}

}  // namespace ht::engine
