#pragma once

#include <cstdint>
#include <random>

#include "model_spec/lora_sites.h"
#include "server/tinker_api/json_fields.h"

namespace ht::tinker_api {

// The request's `lora_config`; an absent seed is drawn. Error(user) for a rank that is no power of two in [1, 256] and
// for an adapter that trains nothing.
model_spec::LoraConfig decode_lora_config(const Fields& body);

// Error(user) unless the request's `optimizer_config` is absent or adamw.
void check_optimizer_config(const Fields& body);

// 64 random bits.
inline std::uint64_t draw_seed() {
  thread_local std::mt19937_64 generator{std::random_device{}() | std::uint64_t{std::random_device{}()} << 32};
  return generator();
}

}  // namespace ht::tinker_api
