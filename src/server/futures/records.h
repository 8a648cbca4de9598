#pragma once

// The journal's records (proto/journal.proto) from and to the room's structs.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "journal.pb.h"
#include "server/dispatch/dispatch.h"
#include "server/futures/futures.h"

namespace ht::futures {

namespace pb = hosted_tinker::journal;

std::int64_t unix_ms();
// A request's id, as clients know it.
std::string id_of(std::uint64_t number);

// `work`: the encoded worker request; ignored for a failed submission.
std::string submitted_record(std::uint64_t number, const Submission& submission, std::string work);
std::string consumed_record(const std::string& model_id, std::int64_t seq_id);
std::string completed_record(std::uint64_t number, const Outcome& outcome, dispatch::Effect effect,
                             std::int64_t time_ms);
std::string micro_batch_record(const std::string& base_dir, const worker_protocol::MicroBatch& micro_batch);
std::string compositions_record(const std::string& base_dir,
                                const std::vector<worker_protocol::MicroBatch>& micro_batches);
std::string snapshot_record(const std::string& base_dir, const dispatch::SnapshotCut& cut);
std::string session_ended_record(const std::string& session_id, const std::vector<std::string>& model_ids,
                                 const std::string& reason);

// Throws Error(server) for bytes that are no record.
pb::Record parse_record(std::string_view bytes);

// Without the work.
Submission submission_of(const pb::Submitted& record);
Outcome outcome_of(const pb::Completed& record);
dispatch::Effect effect_of(const pb::Completed& record);
std::size_t size_of(const Outcome& outcome);
worker_protocol::MicroBatch micro_batch_of(const pb::MicroBatch& record);
dispatch::SnapshotCut cut_of(const pb::SnapshotTaken& record);
void put_cut(const std::string& base_dir, const dispatch::SnapshotCut& cut, pb::SnapshotTaken& record);
dispatch::Dispatch::LaneState lane_of(const pb::Lane& record);
void put_lane(const dispatch::Dispatch::LaneState& lane, pb::Lane& record);

}  // namespace ht::futures
