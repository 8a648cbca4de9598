#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/sampling/step.h"

namespace ht::engine {

// A row of the packed batch whose logits are wanted.
struct LogitsRow {
  std::int64_t packed_row = 0;
  std::size_t step_row = 0;  // index into the step's rows
  int chunk_row = 0;         // row of the step row's tokens
  bool draws = false;        // the step row's draws are taken here
  bool scores = false;       // inside Score's range
};

// The rows of `row` that need logits, appended to `wanted`; its first token is row `packed_begin` of the batch.
void append_logits_rows(const StepRow& row, std::size_t step_row, std::int64_t packed_begin,
                        std::vector<LogitsRow>& wanted);

// Sizes every array of `result` for `row`.
void prepare_result(const StepRow& row, StepRowResult& result);

// Draws and scores from one row's logits (of the whole vocabulary) into its places of `result`. Rows of one step may
// run on several threads. Returns false when the logits are not finite.
bool fill_result(const StepRow& row, const LogitsRow& where, std::span<const float> logits, StepRowResult& result);

}  // namespace ht::engine
