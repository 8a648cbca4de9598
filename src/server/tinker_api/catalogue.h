#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "model_spec/model_spec.h"

namespace ht::tinker_api {

// A base model that this server offers.
struct ServedModel {
  std::vector<std::string> names;  // the first is the one shown; the others are aliases
  std::string base_dir;            // canonical directory
  model_spec::ModelSpec spec;
  int max_seq_len = 0;  // tokens of a datum, or of prompt and answer together
};

class Catalogue {
 public:
  // Throws Error(user) for a model without a name, or a name that stands for another directory already. The same
  // directory again adds its names.
  void add(ServedModel model);

  // nullptr when nobody has that name or directory.
  const ServedModel* find(std::string_view name) const;
  const ServedModel* find_dir(std::string_view base_dir) const;
  // Error(user) naming what is served.
  const ServedModel& served(std::string_view name) const;
  const std::vector<ServedModel>& models() const { return models_; }

 private:
  std::vector<ServedModel> models_;
};

}  // namespace ht::tinker_api
