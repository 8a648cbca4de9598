#pragma once

// The directory that a request reads or writes: its path below the data directory in the journal, so that the data
// directory may be moved, and absolute for the worker.

#include <filesystem>
#include <string>

#include "worker_protocol/messages.h"

namespace ht::futures {

// nullptr: this work names none.
std::string* dir_of(worker_protocol::RequestBody& work);

// A path that lies elsewhere stays absolute.
void make_relative(worker_protocol::RequestBody& work, const std::filesystem::path& data_dir);
void make_absolute(worker_protocol::RequestBody& work, const std::filesystem::path& data_dir);

}  // namespace ht::futures
