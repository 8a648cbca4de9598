// Snapshots of a worker group: when a cut is taken, when it may stand in for requests, and what it lets go.
//
// A cut's directory is known by its path below Options::snapshot_dir, so that a data directory may be moved.

#include <fmt/format.h>
#include <algorithm>
#include <boost/crc.hpp>
#include <filesystem>
#include <utility>

#include "base/logging.h"
#include "server/dispatch/group.h"
#include "server/store/journal.h"

namespace ht::dispatch {

namespace wp = worker_protocol;
using std::chrono::milliseconds;

namespace {

void remove_tree(const std::filesystem::path& dir) {
  std::error_code ignored;
  std::filesystem::remove_all(dir, ignored);
}

}  // namespace

std::filesystem::path Group::absolute(const std::string& cut_dir) const {
  return options_.snapshot_dir / cut_dir;
}

// A name of the base directory that is one path segment.
std::string Group::snapshot_root() const {
  boost::crc_32_type crc;
  crc.process_bytes(group_.base_dir.data(), group_.base_dir.size());
  return fmt::format("{:08x}", crc.checksum());
}

void Group::remove_unused_snapshots() {
  const std::filesystem::path used = snapshot_dir_.empty() ? std::filesystem::path() : absolute(snapshot_dir_);
  std::filesystem::create_directories(absolute(snapshot_root()));
  for (const auto& entry : std::filesystem::directory_iterator(absolute(snapshot_root()))) {
    if (entry.path() != used) remove_tree(entry.path());
  }
}

void Group::maybe_snapshot() {
  if (state_ != GroupState::ready || care_ != Care::none || cut_ || std::chrono::steady_clock::now() < next_snapshot_)
    return;
  if (since_cut_.compute_seconds < options_.snapshot_after_seconds &&
      since_cut_.bytes < options_.snapshot_after_bytes && since_cut_.requests < options_.snapshot_after_requests) {
    return;
  }
  // A cut would make a lost state the one that a recovery brings back.
  if (std::any_of(lanes_.begin(), lanes_.end(), [](const auto& lane) { return !lane.second.lost.empty(); })) return;
  std::erase_if(lanes_, [](const auto& lane) { return lane.second.closed() && lane.second.entries().empty(); });
  PendingCut cut;
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  cut.cut.dir = fmt::format("{}/{}-{}", snapshot_root(), std::chrono::duration_cast<milliseconds>(now).count(),
                            ++snapshots_made_);
  cut.inside = since_cut_;
  const std::filesystem::path dir = absolute(cut.cut.dir);
  std::error_code error;
  std::filesystem::create_directories(dir, error);
  if (error) {
    spdlog::error("{}: cannot make {}: {}", group_.name, dir.string(), error.message());
    return postpone_snapshot();
  }
  // What is done now is inside; the answer may name later requests.
  for (const auto& [model, lane] : lanes_) {
    for (const auto& [seq, entry] : lane.entries()) {
      if (!entry.executed) break;
      cut.cut.covered[model] = seq;
    }
  }
  snapshot_ = send_control(wp::Snapshot{dir.string()});
  cut_ = std::move(cut);
}

void Group::on_snapshot(const wp::Reply& reply) {
  if (!cut_) return;
  const auto* done = std::get_if<wp::Done>(&reply.body);
  const auto* result = done == nullptr ? nullptr : std::get_if<wp::SnapshotResult>(&done->body);
  if (result == nullptr) {
    spdlog::error("{}: no snapshot: {}", group_.name, failure_of(reply));
    discard_cut();
    return postpone_snapshot();
  }
  for (const auto& [adapter, last] : result->last_request) {
    const auto found = index_.find(last);
    if (found == index_.end()) continue;  // an older cut covers it
    auto& covered = cut_->cut.covered.try_emplace(found->second.lane->model(), found->second.seq).first->second;
    covered = std::max(covered, found->second.seq);
  }
  for (const std::string& version : result->versions_on_disk) {
    if (const auto found = versions_.find(version); found != versions_.end()) found->second.on_disk = true;
  }
  // A version inside the cut can be made again only as long as the requests before it are kept: its files come first.
  for (const auto& [model, seq] : cut_->cut.covered) {
    for (const auto& [number, entry] : lane(model).entries()) {
      if (number > seq || entry.item.kind != Kind::publish) continue;
      const auto version = versions_.find(entry.item.version);
      if (version != versions_.end() && !version->second.on_disk && !version->second.failed) {
        discard_cut();
        return snapshot_after(options_.snapshot_retry);
      }
    }
  }
  cut_->answered = true;
  try_adopt();
}

// A result that the worker sent before the cut may still be on its way on another stream.
void Group::try_adopt() {
  if (!cut_ || !cut_->answered || cut_->syncing) return;
  for (const auto& [model, seq] : cut_->cut.covered) {
    for (const auto& [number, entry] : lane(model).entries()) {
      if (number > seq) break;
      if (!entry.item.completed) return;
    }
  }
  // The worker synced the files; their names are ours to sync.
  cut_->syncing = true;
  auto sync = [dir = absolute(cut_->cut.dir), root = absolute(snapshot_root())] {
    store::sync_path(dir);
    store::sync_path(root);
  };
  file_work_.post(std::move(sync), [this, current = epoch_, epoch = *epoch_](const std::exception_ptr& thrown) {
    if (*current != epoch) return;  // the worker ended, and the cut is gone
    try {
      if (thrown) std::rethrow_exception(thrown);
      adopt();
    } catch (const std::exception& error) {
      spdlog::error("{}: the snapshot could not be journalled: {}", group_.name, error.what());
      discard_cut();
      postpone_snapshot();
    }
  });
}

void Group::adopt() {
  events_.snapshot(group_.base_dir, cut_->cut);
  const PendingCut adopted = *std::exchange(cut_, std::nullopt);
  snapshot_pause_ = milliseconds(0);
  const std::string replaced = std::exchange(snapshot_dir_, adopted.cut.dir);
  if (!replaced.empty()) remove_behind(replaced);
  drop_covered(adopted.cut);
  since_cut_.compute_seconds -= adopted.inside.compute_seconds;
  since_cut_.bytes -= adopted.inside.bytes;
  since_cut_.requests -= adopted.inside.requests;
  maybe_snapshot();
}

void Group::remove_behind(const std::string& cut_dir) {
  file_work_.post([dir = absolute(cut_dir)] { remove_tree(dir); }, [](const std::exception_ptr&) {});
}

void Group::discard_cut() {
  if (!cut_) return;
  remove_behind(cut_->cut.dir);
  cut_.reset();
}

// Each failure doubles the pause: a full disk must not make a snapshot of all adapters a second.
void Group::postpone_snapshot() {
  ++status_.snapshot_failures;
  snapshot_pause_ = std::clamp(2 * snapshot_pause_, options_.snapshot_retry, options_.snapshot_retry_max);
  snapshot_after(snapshot_pause_);
}

void Group::snapshot_after(milliseconds pause) {
  next_snapshot_ = std::chrono::steady_clock::now() + pause;
  snapshot_timer_.expires_at(next_snapshot_);
  snapshot_timer_.async_wait([this, current = epoch_, epoch = *epoch_](const boost::system::error_code& cancelled) {
    if (!cancelled && *current == epoch) maybe_snapshot();
  });
}

void Group::drop_covered(const SnapshotCut& cut) {
  for (const auto& [model, seq] : cut.covered) {
    Lane* of = find_lane(model);
    if (of == nullptr) continue;
    while (!of->entries().empty() && of->entries().begin()->first <= seq) {
      const Item item = of->entries().begin()->second.item;
      if (item.kind == Kind::publish && versions_.contains(item.version)) {
        Version& version = versions_[item.version];
        version.on_disk = true;
        version.made = !version.failed;  // a recovery has not seen it made
      }
      forget(*of, item.seq);
    }
  }
  prune_micro_batches();
}

// A cut has no partly executed request: a micro-batch is inside it or not.
void Group::prune_micro_batches() {
  std::size_t kept = 0, cursor = replay_cursor_;
  for (std::size_t i = 0; i < micro_batches_.size(); ++i) {
    const auto& slices = micro_batches_[i].slices;
    if (std::any_of(slices.begin(), slices.end(), [&](const auto& slice) { return index_.contains(slice.request); })) {
      if (kept != i) micro_batches_[kept] = std::move(micro_batches_[i]);
      ++kept;
    } else if (i < replay_cursor_) {
      --cursor;
    }
  }
  micro_batches_.resize(kept);
  replay_cursor_ = cursor;
}

void Group::restore_snapshot(const SnapshotCut& cut) {
  snapshot_dir_ = cut.dir;
  for (const auto& [model, seq] : cut.covered) {
    if (seq != kDropSeq) lane(model).set_horizon(seq + 1);
  }
  drop_covered(cut);
}

}  // namespace ht::dispatch
