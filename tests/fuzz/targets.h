#pragma once

// One function a parser of bytes that come from elsewhere. Each takes any input: a refusal (ht::Error) is swallowed,
// any other exception, crash, leak or broken promise is a finding.

#include <span>
#include <string_view>

namespace ht::fuzz {

void safetensors(std::string_view input);       // a file's bytes
void model_config(std::string_view input);      // config.json
void worker_frames(std::string_view input);     // what a worker sends or gets
void forward_backward(std::string_view input);  // protobuf body
void json_bodies(std::string_view input);       // asample, create_model, and numbers of broken bodies
void zstd_bodies(std::string_view input);       // compressed body
void tinker_path(std::string_view input);       // tinker://…
void journal_file(std::string_view input);      // a segment
// Records of the input's making, then a change somewhere that the input names: what is replayed is what was appended.
void journal_damage(std::string_view input);
void journal_record(std::string_view input);  // one record's payload

struct Target {
  std::string_view name;
  void (*run)(std::string_view input);
};
std::span<const Target> targets();

// Throws std::logic_error: a promise of the parser's header is broken.
void require(bool promise, const char* text);

}  // namespace ht::fuzz
