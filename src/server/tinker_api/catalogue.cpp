#include "server/tinker_api/catalogue.h"

#include <algorithm>

#include "base/error.h"

namespace ht::tinker_api {

void Catalogue::add(ServedModel model) {
  if (model.names.empty()) throw user_error("the base model in " + model.base_dir + " has no name");
  for (const std::string& name : model.names) {
    const ServedModel* other = find(name);
    if (other && other->base_dir != model.base_dir) {
      throw user_error("the model name \"" + name + "\" stands for both " + other->base_dir + " and " + model.base_dir);
    }
  }
  for (ServedModel& known : models_) {
    if (known.base_dir != model.base_dir) continue;
    for (std::string& name : model.names) {
      if (std::find(known.names.begin(), known.names.end(), name) == known.names.end()) {
        known.names.push_back(std::move(name));
      }
    }
    return;
  }
  models_.push_back(std::move(model));
}

const ServedModel* Catalogue::find(std::string_view name) const {
  for (const ServedModel& model : models_) {
    if (std::find(model.names.begin(), model.names.end(), name) != model.names.end()) return &model;
  }
  return nullptr;
}

const ServedModel* Catalogue::find_dir(std::string_view base_dir) const {
  for (const ServedModel& model : models_) {
    if (model.base_dir == base_dir) return &model;
  }
  return nullptr;
}

const ServedModel& Catalogue::served(std::string_view name) const {
  if (const ServedModel* model = find(name)) return *model;
  std::string names;
  for (const ServedModel& model : models_) {
    for (const std::string& known : model.names) names += (names.empty() ? "" : ", ") + known;
  }
  throw user_error("base model \"" + std::string(name) +
                   "\" is not served here; served: " + (names.empty() ? "none" : names));
}

}  // namespace ht::tinker_api
