#include "server/futures/inputs.h"

#include <charconv>
#include <string>

#include "base/error.h"

namespace ht::futures {

namespace fs = std::filesystem;
namespace wp = worker_protocol;

namespace {

// What `work` loads; nullptr or empty: nothing.
template <typename Body>
auto* loaded_dir(Body& work) {
  if (auto* create = std::get_if<wp::CreateAdapter>(&work)) return &create->load_dir;
  auto* load = std::get_if<wp::LoadAdapter>(&work);
  return load == nullptr ? nullptr : &load->dir;
}

}  // namespace

Inputs::Inputs(fs::path dir, store::Durability durability) : dir_(std::move(dir)), durability_(durability) {
  fs::create_directories(dir_);
  for (const fs::directory_entry& entry : fs::directory_iterator(dir_)) {
    const std::string name = entry.path().filename().string();
    Number number = 0;
    const auto parsed = std::from_chars(name.data(), name.data() + name.size(), number);
    if (parsed.ec == std::errc() && parsed.ptr == name.data() + name.size()) kept_.insert(number);
  }
}

fs::path Inputs::path_of(Number number) const {
  return dir_ / std::to_string(number);
}

void Inputs::link_files(const fs::path& from, const fs::path& to) const {
  fs::remove_all(to);
  fs::create_directories(to);
  for (const fs::directory_entry& entry : fs::directory_iterator(from)) {
    if (!entry.is_regular_file()) continue;
    const fs::path file = to / entry.path().filename();
    std::error_code no_link;
    fs::create_hard_link(fs::canonical(entry.path()), file, no_link);
    if (!no_link) continue;
    fs::copy_file(entry.path(), file);
    if (durability_ == store::Durability::power) store::sync_path(file);
  }
  if (durability_ == store::Durability::process) return;
  store::sync_path(to);
  store::sync_path(dir_);
}

void Inputs::keep(Number number, const wp::RequestBody& work) {
  const std::string* from = loaded_dir(work);
  std::error_code absent;
  if (from == nullptr || from->empty() || !fs::is_directory(*from, absent)) return;
  try {
    link_files(*from, path_of(number));
  } catch (const std::exception& error) {
    std::error_code ignored;
    fs::remove_all(path_of(number), ignored);
    throw server_error("the files of " + *from + " cannot be kept for a recovery: " + error.what());
  }
  kept_.insert(number);
}

void Inputs::redirect(Number number, wp::RequestBody& work) const {
  std::string* dir = loaded_dir(work);
  if (dir != nullptr && kept_.contains(number)) *dir = path_of(number).string();
}

void Inputs::drop_if(const std::function<bool(Number)>& over) {
  std::erase_if(kept_, [&](Number number) {
    if (!over(number)) return false;
    std::error_code later;  // the next start tries again
    fs::remove_all(path_of(number), later);
    return true;
  });
}

}  // namespace ht::futures
