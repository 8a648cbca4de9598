#pragma once

#include <string>

#include "server/tinker_api/routing.h"

namespace ht::tinker_api {

struct NewModel {
  std::string base_model;  // as the client named it
  std::string base_dir;
  model_spec::LoraConfig lora;
  std::string path;      // tinker:// path it is loaded from; empty for a fresh one
  std::string load_dir;  // its files
  bool load_optimizer = false;
};

// Registers <session>:train:<model_seq_id> of the request and submits its creation. Natural key: that id.
http::Response submit_new_model(Context& context, const http::Request& request, const Fields& fields,
                                futures::Operation operation, NewModel model);

}  // namespace ht::tinker_api
