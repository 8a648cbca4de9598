#pragma once

// The files that a journalled request reads: a checkpoint is its owner's to delete or overwrite, and a recovery that
// runs the request again must find it as it was. Hard links (copies where there can be none) in a directory a request.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <set>

#include "server/store/journal.h"
#include "worker_protocol/messages.h"

namespace ht::futures {

class Inputs {
 public:
  using Number = worker_protocol::RequestId;

  // Finds what an earlier process kept in `dir`.
  Inputs(std::filesystem::path dir, store::Durability durability);

  // Keeps the files of the checkpoint that `work` loads; nothing for other work, or when there is no such directory.
  // Throws Error(server) when they cannot be kept (disk full); nothing remains then.
  void keep(Number number, const worker_protocol::RequestBody& work);
  // Makes `work` read what was kept for it.
  void redirect(Number number, worker_protocol::RequestBody& work) const;
  void drop_if(const std::function<bool(Number)>& over);

 private:
  std::filesystem::path path_of(Number number) const;
  void link_files(const std::filesystem::path& from, const std::filesystem::path& to) const;

  std::filesystem::path dir_;
  store::Durability durability_;
  std::set<Number> kept_;
};

}  // namespace ht::futures
