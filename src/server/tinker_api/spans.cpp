#include "server/tinker_api/spans.h"

#include <vector>

#include "base/error.h"
#include "server/tinker_api/tensor.h"

namespace ht::tinker_api {
namespace {

using Spans = google::protobuf::RepeatedPtrField<tinker_public::ProvenanceSpan>;

// Which of the `length` positions were sampled.
std::vector<bool> tile(const Spans& spans, const std::string& name, std::int64_t length, const std::string& loss) {
  if (spans.empty()) throw user_error(name + " is missing: loss " + loss + " needs the provenance of every position");
  std::vector<bool> sampled;
  for (const tinker_public::ProvenanceSpan& span : spans) {
    if (span.span_case() == tinker_public::ProvenanceSpan::SPAN_NOT_SET) {
      throw user_error(name + " has a span that is neither prompt_tokens nor sampled_tokens");
    }
    const bool is_sampled = span.has_sampled_tokens();
    const std::int64_t count = is_sampled ? span.sampled_tokens().length() : span.prompt_tokens().length();
    const std::int64_t offset = is_sampled ? span.sampled_tokens().offset() : span.prompt_tokens().offset();
    if (count < 0 || offset < 0 || count > length - static_cast<std::int64_t>(sampled.size())) {
      throw user_error(name + " has a span with offset " + std::to_string(offset) + " and length " +
                       std::to_string(count) + "; the spans must tile exactly " + std::to_string(length) +
                       " positions");
    }
    sampled.insert(sampled.end(), static_cast<std::size_t>(count), is_sampled);
  }
  if (static_cast<std::int64_t>(sampled.size()) != length) {
    throw user_error(name + " covers " + std::to_string(sampled.size()) + " positions of " + std::to_string(length));
  }
  return sampled;
}

}  // namespace

void check_spans(const tinker_public::Datum& datum, const std::string& name, std::int64_t length,
                 const std::string& loss) {
  tile(datum.model_input_spans(), name + ": model_input_spans", length, loss);
  const std::vector<bool> sampled = tile(datum.loss_fn_input_spans(), name + ": loss_fn_input_spans", length, loss);
  const auto found = datum.loss_fn_inputs().find("advantages");
  if (found == datum.loss_fn_inputs().end()) return;
  std::vector<float> advantages;
  append_floats(view_tensor(found->second, name + ": advantages", length), advantages);
  std::size_t i = 0;
  while (i < advantages.size() && (advantages[i] == 0 || sampled[i])) ++i;
  if (i < advantages.size()) {
    throw user_error(name + ": advantages[" + std::to_string(i) + "] = " + std::to_string(advantages[i]) +
                     " stands on a prompt position; loss " + loss + " allows only 0 there");
  }
}

}  // namespace ht::tinker_api
