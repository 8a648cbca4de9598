#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace ht::worker {

// manifest.json of a snapshot directory; written last, so a directory without it is no snapshot.
struct SnapshotManifest {
  struct Adapter {
    std::string adapter;
    std::string file;  // engine::save_adapter_state, in the snapshot's directory
    std::uint64_t last_request = 0;
  };
  struct Version {
    std::string version;
    std::string dir;
  };
  std::uint64_t next_micro_batch = 1;
  std::vector<Adapter> adapters;
  std::vector<Version> versions;
};

// Atomic: temporary file, fsync, rename. Throws Error(server).
void write_manifest(const SnapshotManifest& manifest, const std::filesystem::path& dir);
// Throws Error(server) naming the directory and what is wrong.
SnapshotManifest read_manifest(const std::filesystem::path& dir);

}  // namespace ht::worker
