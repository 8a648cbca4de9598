#include "server/futures/work_paths.h"

namespace ht::futures {

namespace fs = std::filesystem;
namespace wp = worker_protocol;

std::string* dir_of(wp::RequestBody& work) {
  if (auto* create = std::get_if<wp::CreateAdapter>(&work)) return &create->load_dir;
  if (auto* load = std::get_if<wp::LoadAdapter>(&work)) return &load->dir;
  if (auto* save = std::get_if<wp::SaveAdapter>(&work)) return &save->dir;
  if (auto* publish = std::get_if<wp::PublishVersion>(&work)) return &publish->dir;
  auto* sample = std::get_if<wp::Sample>(&work);
  return sample == nullptr ? nullptr : &sample->version_dir;
}

void make_relative(wp::RequestBody& work, const fs::path& data_dir) {
  std::string* dir = dir_of(work);
  if (dir == nullptr || !fs::path(*dir).is_absolute()) return;
  const fs::path below = fs::path(*dir).lexically_relative(data_dir);
  if (!below.empty() && *below.begin() != "..") *dir = below.string();
}

void make_absolute(wp::RequestBody& work, const fs::path& data_dir) {
  std::string* dir = dir_of(work);
  if (dir != nullptr && !dir->empty()) *dir = (data_dir / *dir).string();
}

}  // namespace ht::futures
