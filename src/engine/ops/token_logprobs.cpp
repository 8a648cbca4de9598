#include "engine/ops/token_logprobs.h"

#include <ATen/ATen.h>

#include <vector>

#include "engine/ops/host_data.h"
#include "engine/ops/parallel_rows.h"

namespace ht::engine {

namespace {

// The targets of rows [row_begin, row_begin + rows) where the kernels read them.
struct DeviceTargets {
  DeviceTargets(const Device& device, const RowTargets& targets, std::int64_t row_begin, std::int64_t rows)
      : first(targets.offsets[static_cast<std::size_t>(row_begin)]),
        count(targets.offsets[static_cast<std::size_t>(row_begin + rows)] - first) {
    ids = host_data(targets.targets.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count)))
              .to(device.torch_device());
    relative.assign(targets.offsets.begin() + row_begin, targets.offsets.begin() + row_begin + rows + 1);
    for (std::int64_t& offset : relative) offset -= first;
    offsets = host_data(std::span<const std::int64_t>(relative)).to(device.torch_device());
  }

  HtTargets kernel_arguments() const {
    return {ids.const_data_ptr<std::int32_t>(), offsets.const_data_ptr<std::int64_t>()};
  }

  std::int64_t first, count;  // in RowTargets::targets
  std::vector<std::int64_t> relative;
  at::Tensor ids, offsets;
};

}  // namespace

at::Tensor logsumexp_rows(const Device& device, const at::Tensor& logits) {
  const HtKernelTable& kernels = device.kernels();
  const std::int64_t rows = logits.size(0), vocab = logits.size(1);
  at::Tensor lse = at::empty({rows}, logits.options());
  const float* x = logits.const_data_ptr<float>();
  float* out = lse.data_ptr<float>();
  launch_rows(kernels, rows, vocab, [&](std::int64_t begin, std::int64_t end) {
    kernels.logsumexp(device.stream(), x, vocab, out, begin, end);
  });
  return lse;
}

void gather_logprobs(const Device& device, const at::Tensor& logits, const at::Tensor& lse, const RowTargets& targets,
                     std::int64_t row_begin, float* logprobs) {
  const HtKernelTable& kernels = device.kernels();
  const std::int64_t rows = logits.size(0), vocab = logits.size(1);
  const DeviceTargets on_device(device, targets, row_begin, rows);
  const HtTargets arguments = on_device.kernel_arguments();
  const at::Tensor host = at::from_blob(logprobs + on_device.first, {on_device.count}, at::kFloat);
  at::Tensor out = lse.is_cpu() ? host : at::empty({on_device.count}, lse.options());
  const float* x = logits.const_data_ptr<float>();
  const float* l = lse.const_data_ptr<float>();
  launch_rows(kernels, rows, 1, [&, to = out.data_ptr<float>()](std::int64_t begin, std::int64_t end) {
    kernels.gather_logprobs(device.stream(), x, vocab, l, &arguments, to, begin, end);
  });
  if (!lse.is_cpu()) host.copy_(out);
}

at::Tensor logprobs_backward(const Device& device, at::Tensor& logits, const at::Tensor& lse, const RowTargets& targets,
                             std::int64_t row_begin, const float* dlogprobs) {
  const HtKernelTable& kernels = device.kernels();
  const std::int64_t rows = logits.size(0), vocab = logits.size(1);
  const DeviceTargets on_device(device, targets, row_begin, rows);
  const HtTargets arguments = on_device.kernel_arguments();
  const at::Tensor d =
      host_data(std::span<const float>(dlogprobs + on_device.first, static_cast<std::size_t>(on_device.count)))
          .to(device.torch_device());
  at::Tensor out = device.compute_dtype() == at::kFloat ? logits : at::empty({rows, vocab}, device.options());
  const float* x = logits.const_data_ptr<float>();
  const float* l = lse.const_data_ptr<float>();
  const float* dp = d.const_data_ptr<float>();
  launch_rows(kernels, rows, vocab, [&, to = out.data_ptr()](std::int64_t begin, std::int64_t end) {
    kernels.dlogits(device.stream(), x, to, vocab, l, &arguments, dp, begin, end);
  });
  return out;
}

at::Tensor token_logprobs_reference(const at::Tensor& logits, const RowTargets& targets) {
  const at::Tensor logprobs = at::log_softmax(logits, 1);
  std::vector<at::Tensor> picked;
  for (std::int64_t r = 0; r < logits.size(0); ++r) {
    const auto row = static_cast<std::size_t>(r);
    for (std::int64_t t = targets.offsets[row]; t < targets.offsets[row + 1]; ++t) {
      picked.push_back(logprobs[r][targets.targets[static_cast<std::size_t>(t)]]);
    }
  }
  return at::stack(picked);
}

}  // namespace ht::engine
