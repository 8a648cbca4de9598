#include "server/tinker_api/lora_request.h"

#include <bit>

#include "base/error.h"

namespace ht::tinker_api {
namespace {

constexpr std::int64_t kMaxRank = 256;

}  // namespace

model_spec::LoraConfig decode_lora_config(const Fields& body) {
  const Fields fields = body.object("lora_config");
  model_spec::LoraConfig lora;
  const std::int64_t rank = fields.optional_integer("rank").value_or(lora.rank);
  if (rank < 1) throw user_error("lora_config.rank must be positive, got " + std::to_string(rank));
  if (rank > kMaxRank || !std::has_single_bit(static_cast<std::uint64_t>(rank))) {
    throw user_error("lora_config.rank must be a power of 2 from 1 to 256, got " + std::to_string(rank));
  }
  lora.rank = static_cast<int>(rank);
  const json::value* seed = fields.find("seed");
  lora.seed = !seed               ? draw_seed()
              : seed->is_uint64() ? seed->get_uint64()
                                  : static_cast<std::uint64_t>(fields.integer("seed"));
  lora.train_attn = fields.boolean("train_attn", true);
  lora.train_mlp = fields.boolean("train_mlp", true);
  lora.train_unembed = fields.boolean("train_unembed", true);
  if (!lora.train_attn && !lora.train_mlp && !lora.train_unembed) {
    throw user_error("lora_config trains nothing: at least one of train_attn, train_mlp, train_unembed must be true");
  }
  return lora;
}

void check_optimizer_config(const Fields& body) {
  if (!body.optional_object("optimizer_config")) return;
  const std::string type = body.object("optimizer_config").text("type");
  if (type == "dimuon") throw user_error("optimizer dimuon is not supported by this server; allowed: adamw");
  if (type != "adamw") throw user_error("optimizer \"" + type + "\" is unknown; allowed: adamw");
}

}  // namespace ht::tinker_api
