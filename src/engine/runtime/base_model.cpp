#include <utility>

#include "engine/device/cpu.h"
#include "engine/runtime/base_model_impl.h"

namespace ht::engine {

BaseModel::BaseModel(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
BaseModel::~BaseModel() = default;

std::unique_ptr<BaseModel> BaseModel::load(
    const std::filesystem::path& dir, const EngineOptions& options,
    const std::function<void(double fraction, const std::string& text)>& progress) {
  initialize_cpu(options.threads);
  const model_spec::ModelSpec spec = model_spec::read_model_spec(dir);
  WeightSource weights(options.device != nullptr ? *options.device : cpu_device(), dir,
                       model_spec::num_parameters(spec), progress);
  return std::unique_ptr<BaseModel>(
      new BaseModel(std::make_unique<Impl>(Impl{DenseDecoder::load(spec, weights), options})));
}

const model_spec::ModelSpec& BaseModel::spec() const {
  return impl_->model.spec;
}
const EngineOptions& BaseModel::options() const {
  return impl_->options;
}
const Device& BaseModel::device() const {
  return impl_->model.device;
}
bool BaseModel::has_16_bit_copy() const {
  return impl_->model.head.unembedding.packed.defined();
}

}  // namespace ht::engine
