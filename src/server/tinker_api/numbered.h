#pragma once

// Requests that carry (model_id, seq_id): whatever happens, their number is used up.

#include <functional>
#include <string>
#include <string_view>

#include "server/tinker_api/routing.h"

namespace ht::tinker_api {

// 2^53: what every JSON reader keeps exactly.
inline constexpr std::int64_t kMaxSeqId = std::int64_t{1} << 53;

// The body as JSON. For one that is none, consumes the number that can still be read in it, then throws Error(user).
json::object parse_numbered_body(Context& context, const http::Request& request);

struct Numbered {
  sessions::Model model;
  const ServedModel* served = nullptr;
  futures::Submission submission;  // all but context, work and failure
};

// Looks the model up. Throws HttpError 404 for an unknown model, Error(user) for a bad number or a session that is
// over.
Numbered begin_numbered(Context& context, futures::Operation operation, const std::string& model_id,
                        std::int64_t seq_id, std::string fingerprint);

// Submits; an Error(user) that `build` throws becomes the failed future of a valid number. `build` sets work and
// context.
http::Response submit_numbered(Context& context, Numbered numbered, const std::function<void(Numbered&)>& build);

// The two above for a JSON body.
http::Response numbered_json(Context& context, const http::Request& request, futures::Operation operation,
                             const std::function<void(Numbered&, const Fields&)>& build);

}  // namespace ht::tinker_api
