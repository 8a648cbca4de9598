#include "server/futures/records.h"

#include <chrono>
#include <utility>

namespace ht::futures {
namespace {

void put_failed(const Failed& failed, pb::Failed& record) {
  record.set_category(static_cast<int>(failed.category));
  record.set_message(failed.message);
}

void put_micro_batch(const worker_protocol::MicroBatch& micro_batch, pb::MicroBatch& record) {
  record.set_number(micro_batch.number);
  for (const auto& slice : micro_batch.slices) {
    pb::Slice& added = *record.add_slices();
    added.set_request(slice.request);
    added.set_datum_begin(slice.datum_begin);
    added.set_datum_end(slice.datum_end);
  }
}

Failed failed_of(const pb::Failed& record) {
  return {static_cast<ErrorCategory>(record.category()), record.message()};
}

}  // namespace

std::string id_of(std::uint64_t number) {
  return "r" + std::to_string(number);
}

std::int64_t unix_ms() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::system_clock::now().time_since_epoch())
      .count();
}

std::string submitted_record(std::uint64_t number, const Submission& submission, std::string work) {
  pb::Record record;
  pb::Submitted& to = *record.mutable_submitted();
  to.set_number(number);
  to.set_operation(static_cast<std::uint32_t>(submission.operation));
  to.set_session_id(submission.session_id);
  to.set_model_id(submission.model_id);
  to.set_seq_id(submission.seq_id);
  to.set_sampler_id(submission.sampler_id);
  to.set_base_dir(submission.base_dir);
  to.set_natural_key(submission.natural_key);
  to.set_fingerprint(submission.fingerprint);
  to.set_context(submission.context);
  to.set_time_ms(unix_ms());
  if (submission.failure) {
    put_failed(*submission.failure, *to.mutable_failed());
  } else {
    to.set_work(std::move(work));
  }
  return record.SerializeAsString();
}

std::string consumed_record(const std::string& model_id, std::int64_t seq_id) {
  pb::Record record;
  record.mutable_consumed()->set_model_id(model_id);
  record.mutable_consumed()->set_seq_id(seq_id);
  return record.SerializeAsString();
}

std::string completed_record(std::uint64_t number, const Outcome& outcome, dispatch::Effect effect,
                             std::int64_t time_ms) {
  pb::Record record;
  pb::Completed& to = *record.mutable_completed();
  to.set_number(number);
  to.set_applied(effect == dispatch::Effect::done);
  to.set_refused(effect == dispatch::Effect::refused);
  to.set_time_ms(time_ms);
  if (const auto* result = std::get_if<Result>(&outcome)) {
    to.set_content_type(result->content_type);
    to.set_body(result->body);
  } else {
    put_failed(std::get<Failed>(outcome), *to.mutable_failed());
  }
  return record.SerializeAsString();
}

std::string micro_batch_record(const std::string& base_dir, const worker_protocol::MicroBatch& micro_batch) {
  pb::Record record;
  record.mutable_micro_batch()->set_base_dir(base_dir);
  put_micro_batch(micro_batch, *record.mutable_micro_batch());
  return record.SerializeAsString();
}

std::string compositions_record(const std::string& base_dir,
                                const std::vector<worker_protocol::MicroBatch>& micro_batches) {
  pb::Record record;
  pb::Compositions& to = *record.mutable_compositions();
  to.set_base_dir(base_dir);
  for (const auto& micro_batch : micro_batches) put_micro_batch(micro_batch, *to.add_micro_batches());
  return record.SerializeAsString();
}

std::string snapshot_record(const std::string& base_dir, const dispatch::SnapshotCut& cut) {
  pb::Record record;
  put_cut(base_dir, cut, *record.mutable_snapshot_taken());
  return record.SerializeAsString();
}

std::string session_ended_record(const std::string& session_id, const std::vector<std::string>& model_ids,
                                 const std::string& reason) {
  pb::Record record;
  pb::SessionEnded& to = *record.mutable_session_ended();
  to.set_session_id(session_id);
  for (const std::string& model : model_ids) to.add_model_ids(model);
  to.set_reason(reason);
  return record.SerializeAsString();
}

pb::Record parse_record(std::string_view bytes) {
  pb::Record record;
  if (!record.ParseFromArray(bytes.data(), static_cast<int>(bytes.size())) ||
      record.body_case() == pb::Record::BODY_NOT_SET) {
    throw server_error("the journal has a record of " + std::to_string(bytes.size()) +
                       " bytes that this version does not understand");
  }
  return record;
}

Submission submission_of(const pb::Submitted& record) {
  Submission submission;
  submission.operation = static_cast<Operation>(record.operation());
  submission.session_id = record.session_id();
  submission.model_id = record.model_id();
  submission.seq_id = record.seq_id();
  submission.sampler_id = record.sampler_id();
  submission.base_dir = record.base_dir();
  submission.natural_key = record.natural_key();
  submission.fingerprint = record.fingerprint();
  submission.context = record.context();
  if (record.has_failed()) submission.failure = failed_of(record.failed());
  return submission;
}

Outcome outcome_of(const pb::Completed& record) {
  if (record.has_failed()) return failed_of(record.failed());
  return Result{record.content_type(), record.body()};
}

dispatch::Effect effect_of(const pb::Completed& record) {
  if (record.refused()) return dispatch::Effect::refused;
  return record.applied() ? dispatch::Effect::done : dispatch::Effect::none;
}

std::size_t size_of(const Outcome& outcome) {
  const auto* result = std::get_if<Result>(&outcome);
  return result != nullptr ? result->body.size() : std::get<Failed>(outcome).message.size();
}

worker_protocol::MicroBatch micro_batch_of(const pb::MicroBatch& record) {
  worker_protocol::MicroBatch micro_batch{record.number(), {}};
  for (const pb::Slice& slice : record.slices()) {
    micro_batch.slices.push_back({slice.request(), slice.datum_begin(), slice.datum_end()});
  }
  return micro_batch;
}

dispatch::SnapshotCut cut_of(const pb::SnapshotTaken& record) {
  dispatch::SnapshotCut cut{record.dir(), {}};
  for (const auto& [model, seq] : record.covered()) cut.covered[model] = seq;
  return cut;
}

void put_cut(const std::string& base_dir, const dispatch::SnapshotCut& cut, pb::SnapshotTaken& record) {
  record.set_base_dir(base_dir);
  record.set_dir(cut.dir);
  for (const auto& [model, seq] : cut.covered) (*record.mutable_covered())[model] = seq;
}

dispatch::Dispatch::LaneState lane_of(const pb::Lane& record) {
  return {record.base_dir(),
          record.model_id(),
          record.horizon(),
          {record.consumed().begin(), record.consumed().end()},
          {record.versions().begin(), record.versions().end()},
          record.closed()};
}

void put_lane(const dispatch::Dispatch::LaneState& lane, pb::Lane& record) {
  record.set_base_dir(lane.base_dir);
  record.set_model_id(lane.model);
  record.set_horizon(lane.horizon);
  for (const std::int64_t seq : lane.consumed) record.add_consumed(seq);
  for (const std::string& version : lane.versions) record.add_versions(version);
  record.set_closed(lane.closed);
}

}  // namespace ht::futures
