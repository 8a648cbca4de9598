#include "server/app/health.h"

#include <boost/json/array.hpp>
#include <boost/json/object.hpp>
#include <boost/json/serialize.hpp>

#include <algorithm>
#include <string_view>

namespace ht::app {

namespace json = boost::json;
using dispatch::GroupState;

namespace {

std::string_view name_of(GroupState state) {
  switch (state) {
    case GroupState::stopped:
      return "stopped";
    case GroupState::loading:
      return "loading";
    case GroupState::restoring:
      return "restoring";
    case GroupState::ready:
      return "ready";
    case GroupState::waiting:
      return "waiting";
  }
  return "unknown";
}

json::object describe(const worker_protocol::StatusResult& counters) {
  return {{"queued_training", counters.queued_training},     {"running_sequences", counters.running_sequences},
          {"waiting_sequences", counters.waiting_sequences}, {"cache_blocks_total", counters.cache_blocks_total},
          {"cache_blocks_free", counters.cache_blocks_free}, {"micro_batches", counters.micro_batches},
          {"decode_steps", counters.decode_steps},           {"trained_tokens", counters.trained_tokens},
          {"sampled_tokens", counters.sampled_tokens},       {"preemptions", counters.preemptions},
          {"adapter_bytes", counters.adapter_bytes},         {"adapter_bytes_limit", counters.adapter_bytes_limit},
          {"version_bytes", counters.version_bytes}};
}

json::object describe(const tinker_api::ServedModel* served, const dispatch::GroupOptions& options,
                      const dispatch::GroupStatus& status) {
  json::object model;
  json::array names;
  if (served != nullptr) {
    for (const std::string& name : served->names) names.emplace_back(name);
    model["max_seq_len"] = served->max_seq_len;
  }
  model["names"] = std::move(names);
  model["worker"] = options.name;
  model["state"] = name_of(status.state);
  model["progress"] = status.progress;
  model["text"] = status.text;
  model["restarts"] = status.restarts;
  if (!status.last_error.empty()) model["last_error"] = status.last_error;
  if (status.info) {
    model["device"] = status.info->device;
    model["memory_plan"] = status.info->memory_plan;
  }
  model["snapshot_failures"] = status.snapshot_failures;
  if (status.counters) {
    model["rss_bytes"] = status.counters->rss_bytes;
    model["peak_rss_bytes"] = status.counters->peak_rss_bytes;
    model["counters"] = describe(*status.counters);
  }
  return model;
}

}  // namespace

bool all_ready(const Groups& groups) {
  return std::all_of(groups.begin(), groups.end(),
                     [](const auto& group) { return group.second.state == GroupState::ready; });
}

http::Response health(const tinker_api::Catalogue& catalogue, const Groups& groups,
                      const futures::Futures::Counts& counts) {
  const bool ready = all_ready(groups);
  json::array models;
  for (const auto& [options, status] : groups) {
    models.push_back(describe(catalogue.find_dir(options.base_dir), options, status));
  }
  json::object requests;
  requests["parked"] = counts.parked;
  requests["queued"] = counts.queued;
  requests["running"] = counts.running;
  requests["done"] = counts.done;
  json::object body;
  body["status"] = ready ? "ok" : "loading";
  body["version"] = HT_VERSION;
  body["models"] = std::move(models);
  body["requests"] = std::move(requests);
  http::Response response;
  response.status = ready ? 200 : 503;
  response.body = json::serialize(body);
  return response;
}

}  // namespace ht::app
