#pragma once

#include <string>
#include <utility>
#include <vector>

#include "server/dispatch/dispatch.h"
#include "server/futures/futures.h"
#include "server/http/http.h"
#include "server/tinker_api/catalogue.h"

namespace ht::app {

using Groups = std::vector<std::pair<dispatch::GroupOptions, dispatch::GroupStatus>>;

bool all_ready(const Groups& groups);

// 200 {"status": "ok", …} when every worker is ready, else 503 {"status": "loading", …}; both with each model's names,
// state ("stopped", "loading", "restoring", "ready", "waiting"), progress 0…1, text, last error and number of restarts;
// of a ready worker its memory plan, what it takes and took at most (rss_bytes, peak_rss_bytes), and its counters.
http::Response health(const tinker_api::Catalogue& catalogue, const Groups& groups,
                      const futures::Futures::Counts& counts);

}  // namespace ht::app
