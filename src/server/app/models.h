#pragma once

#include <string>

#include "server/app/options.h"
#include "server/tinker_api/catalogue.h"

namespace ht::app {

// The models of the command line, by canonical directory. Throws Error(user) for a directory that is none, an
// unsupported model and a name given to two directories.
tinker_api::Catalogue load_catalogue(const ServeOptions& options);

// A name for a directory's worker group and for its files, the same at every start.
std::string group_name(const std::string& base_dir);

}  // namespace ht::app
