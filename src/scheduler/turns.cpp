#include "scheduler/turns.h"

#include <algorithm>

namespace ht::scheduler {

Turn Turns::choose(bool train_ready, bool sample_ready) {
  if (!train_ready || !sample_ready) {
    // Nobody competes: nothing is owed.
    train_owed_ = 0;
    last_ = train_ready ? Turn::train : sample_ready ? Turn::sample : Turn::none;
    return last_;
  }
  // A sampling slice follows every micro-batch; sampling goes on until it has had its share of that micro-batch's time.
  const bool sampling_used_up = last_ == Turn::sample && train_owed_ >= 0;
  last_ = sampling_used_up ? Turn::train : Turn::sample;
  return last_;
}

void Turns::spent(Turn turn, double seconds) {
  if (turn == Turn::train) {
    train_owed_ -= seconds * sampling_share_;
  } else if (turn == Turn::sample) {
    train_owed_ += seconds * (1 - sampling_share_);
    // A long slice is not held against sampling beyond one like it.
    train_owed_ = std::min(train_owed_, seconds);
  }
}

double Turns::sampling_due_inside(double seconds) const {
  return seconds < kInsideAfterSeconds ? 0 : seconds * sampling_share_ / (1 - sampling_share_);
}

}  // namespace ht::scheduler
