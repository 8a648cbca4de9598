#pragma once

namespace ht::scheduler {

enum class Turn { none, train, sample };

// Whose slice is next on the compute thread. While both have work they share its time; a sample waits for one
// micro-batch at most, whatever the debts are.
class Turns {
 public:
  // `sampling_share` of the time, in (0, 1).
  explicit Turns(double sampling_share) : sampling_share_(sampling_share) {}

  Turn choose(bool train_ready, bool sample_ready);
  void spent(Turn turn, double seconds);
  // Seconds of sampling that are due inside a micro-batch that has run for `seconds` (without sampling) since the last
  // slices in it: none before kInsideAfterSeconds.
  double sampling_due_inside(double seconds) const;

  static constexpr double kInsideAfterSeconds = 0.05;

 private:
  double sampling_share_;
  double train_owed_ = 0;  // seconds of training that sampling has taken since training's last turn, by the share
  Turn last_ = Turn::none;
};

}  // namespace ht::scheduler
