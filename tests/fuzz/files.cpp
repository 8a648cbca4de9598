// Files of a model directory and of checkpoints.

#include <cmath>
#include <string>
#include <vector>

#include "base/error.h"
#include "model_spec/memory_plan.h"
#include "model_spec/model_spec.h"
#include "safetensors/safetensors.h"
#include "scratch_dir.h"
#include "server/checkpoints/checkpoints.h"
#include "targets.h"

namespace ht::fuzz {

void safetensors(std::string_view input) {
  static const ScratchDir scratch("safetensors");
  const auto file = scratch.write("model.safetensors", input);
  try {
    const auto checkpoint = safetensors::Checkpoint::open_file(file);
    for (const std::string& name : checkpoint.names()) {
      require(checkpoint.contains(name), "a listed tensor is missing");
      const safetensors::TensorView& view = checkpoint.at(name);
      std::size_t elements = 1;
      for (const std::int64_t size : view.shape) elements *= static_cast<std::size_t>(size);
      require(view.bytes == elements * safetensors::size_of(view.dtype), "bytes differ from shape and dtype");
      require(view.bytes <= input.size(), "a tensor is larger than its file");
      unsigned sum = 0;
      for (std::size_t i = 0; i < view.bytes; ++i) sum += std::to_integer<unsigned>(view.data[i]);
      require(sum < ~0U, "unreachable: the sum keeps the reads");
      if (view.shape.size() != 1 && view.shape.size() != 2) continue;
      std::vector<float> values(elements);
      try {
        safetensors::read_rows_f32(view, 0, view.shape[0], values.data());
      } catch (const Error&) {  // integers
      }
    }
  } catch (const Error&) {
  }
}

void model_config(std::string_view input) {
  static const ScratchDir scratch("model_config");
  scratch.write("config.json", input);
  try {
    const auto spec = model_spec::read_model_spec(scratch.path());
    require(spec.hidden_size > 0 && spec.vocab_size > 0 && spec.num_hidden_layers > 0, "a size is not positive");
    require(spec.num_attention_heads > 0 && spec.num_key_value_heads > 0 && spec.head_dim > 0,
            "heads are not positive");
    require(spec.num_attention_heads % spec.num_key_value_heads == 0, "query heads do not divide into key/value heads");
    require(spec.sliding_window.size() == static_cast<std::size_t>(spec.num_hidden_layers), "not a window a layer");
    require(std::isfinite(spec.rms_norm_eps) && std::isfinite(spec.rope.theta), "a constant is not finite");
    require(model_spec::num_parameters(spec) > 0, "no parameters");
  } catch (const Error&) {
  }
}

void tinker_path(std::string_view input) {
  try {
    const auto path = checkpoints::TinkerPath::parse(input);
    require(path.str() == input, "a path is not what it was parsed from");
    require(path.name.find('/') == std::string::npos && path.name != ".." && !path.name.empty(),
            "a name leads elsewhere");
    require(path.run.find('/') == std::string::npos && path.run != ".." && !path.run.empty(), "a run leads elsewhere");
  } catch (const Error&) {
  }
  try {
    checkpoints::check_name(input);
    require(input.find('/') == std::string_view::npos && input.front() != '.', "a name leads elsewhere");
  } catch (const Error&) {
  }
}

}  // namespace ht::fuzz
