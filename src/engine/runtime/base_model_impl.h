#pragma once

#include "engine/models/dense_decoder.h"
#include "engine/runtime/base_model.h"

namespace ht::engine {

struct BaseModel::Impl {
  DenseDecoder model;
  EngineOptions options;
};

}  // namespace ht::engine
