#pragma once

#include "model_spec/config_fields.h"
#include "model_spec/model_spec.h"

namespace ht::model_spec {

// The rotary embedding of a config.json, as transformers' RotaryEmbeddingConfigMixin reads it: `rope_scaling` (older)
// over `rope_parameters` (newer), `rope_type` over `type`, rope_theta inside or beside.
RopeSpec read_rope(const ConfigFields& config, int head_dim, int max_position_embeddings);

}  // namespace ht::model_spec
