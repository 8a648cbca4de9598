#pragma once

// The order of one model's requests: by number, whatever the order of arrival. A gap parks what is above it until the
// missing number arrives or is consumed. Entries stay after they ran, for as long as a recovery would need them again.

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "server/dispatch/dispatch.h"

namespace ht::dispatch {

// Of ending the worker, in points (Group::blame).
struct Suspicion {
  std::int64_t any = 0;    // it was running
  std::int64_t alone = 0;  // and nothing else was
};

struct Entry {
  Item item;
  bool sent = false;        // to the running worker
  bool executed = false;    // by the running worker
  bool mixed = false;       // forward: shared a micro-batch with a request that changes state
  bool unreadable = false;  // its record cannot be read again
  Suspicion suspicion;

  // A recovery runs it again although its outcome is known.
  bool replayable() const;
  // No recovery needs it.
  bool dead() const { return item.completed && !replayable(); }
};

class Lane {
 public:
  explicit Lane(std::string model) : model_(std::move(model)) {}

  const std::string& model() const { return model_; }
  std::int64_t horizon() const { return horizon_; }
  bool closed() const { return closed_; }
  std::map<std::int64_t, Entry>& entries() { return entries_; }
  const std::map<std::int64_t, Entry>& entries() const { return entries_; }
  const std::set<std::int64_t>& consumed() const { return consumed_; }
  NumberState state(std::int64_t seq) const;
  // Nothing without an outcome lies below it.
  bool all_wait_for(std::int64_t seq) const;

  Entry& add(const Item& item);
  void consume(std::int64_t seq);
  void erase(std::int64_t seq);
  // Takes out what was not sent and has no outcome; nothing but the drop may follow.
  std::vector<Entry> close(const std::set<RequestId>& kept = {});
  void set_horizon(std::int64_t horizon);
  void restore_closed();

  // The next entry for the worker, or nullptr.
  Entry* next_to_send();
  // The first one that the worker has and has not done.
  Entry* head();
  void mark_sent(Entry& entry);
  void mark_executed(Entry& entry);
  // The worker is gone: all of it must be sent again.
  void rewind();

  std::size_t in_flight = 0;
  std::size_t in_flight_bytes = 0;
  std::set<std::string> versions;  // made from this model
  // Not empty: the worker's adapter is not what its outcomes say, and why. What comes fails, until a load replaces it.
  std::string lost;

 private:
  void advance();

  std::string model_;
  std::map<std::int64_t, Entry> entries_;  // by number
  std::set<std::int64_t> consumed_;        // at or above the horizon
  std::int64_t horizon_ = 0;               // every lower number has arrived or was consumed
  std::int64_t cursor_ = 0;                // no lower number is to be sent
  bool closed_ = false;
};

}  // namespace ht::dispatch
