#pragma once

// The worker protocol in plain structs: what a server asks of a worker group and what it answers. worker.proto is the
// wire form; only codec.cpp sees its generated header.
//
// Rules
//  - A request's id is chosen by the server, is unique for the life of a data directory and ends in exactly one Done or
//    Failure. MicroBatchExecuted and Progress may come before.
//  - Training requests of one adapter run in the order sent (SaveAdapter may be answered after later ones); those of
//    several may share a micro-batch. Samples run in any order. Cancel, Status and Shutdown are answered at once.
//  - A worker exits when its control stream closes.

#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

#include "base/error.h"
#include "model_spec/lora_sites.h"
#include "worker_protocol/losses.h"

namespace ht::worker_protocol {

using RequestId = std::uint64_t;

using model_spec::LoraConfig;

// ---- training lane ---------------------------------------------------------------------------------------------

// Makes an adapter: fresh, or (load_dir not empty) from the files of a checkpoint.
struct CreateAdapter {
  std::string adapter;
  LoraConfig lora;
  std::string load_dir;
  bool load_optimizer = false;

  friend bool operator==(const CreateAdapter&, const CreateAdapter&) = default;
};

struct DropAdapter {
  std::string adapter;

  friend bool operator==(const DropAdapter&, const DropAdapter&) = default;
};

// Packed datums: no padding and no batch dimension. Datum i has tokens [cu_seqlens[i], cu_seqlens[i+1]) and, for each
// of its N tokens, target_width[i] = K targets, row-major. All arrays beside `tokens` follow `targets`; an empty array
// means "not given". Position t's targets are scored with the logits at position t: no shift here.
struct TrainBatch {
  std::vector<std::int32_t> tokens;        // [total_tokens]
  std::vector<std::int32_t> cu_seqlens;    // [num_datums + 1]
  std::vector<std::int32_t> target_width;  // [num_datums], >= 1
  std::vector<std::int32_t> targets;       // [sum_i N_i * K_i]
  std::vector<float> weights;              // cross_entropy
  std::vector<float> logprobs;             // of the sampling policy: the RL losses
  std::vector<float> advantages;           // the RL losses
  std::vector<float> sequence_ratio_mask;  // gspo
  std::vector<float> clip_low_threshold;   // per position, instead of the config's
  std::vector<float> clip_high_threshold;

  int num_datums() const { return cu_seqlens.empty() ? 0 : static_cast<int>(cu_seqlens.size()) - 1; }

  friend bool operator==(const TrainBatch&, const TrainBatch&) = default;
};

struct ForwardBackward {
  std::string adapter;
  TrainBatch batch;
  LossKind loss = LossKind::cross_entropy;
  LossConfig config;
  bool forward_only = false;

  friend bool operator==(const ForwardBackward&, const ForwardBackward&) = default;
};

struct AdamParams {
  double learning_rate = 1e-4;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-12;
  double weight_decay = 0.0;    // decoupled
  double grad_clip_norm = 0.0;  // global norm, 0 = off

  friend bool operator==(const AdamParams&, const AdamParams&) = default;
};

struct OptimStep {
  std::string adapter;
  AdamParams adam;

  friend bool operator==(const OptimStep&, const OptimStep&) = default;
};

// Writes the adapter (adapter_config.json, adapter_model.safetensors; with optimizer.safetensors when asked) into
// `dir`, which the server has made, as it is at its turn. Done means the files are complete; the server renames.
struct SaveAdapter {
  std::string adapter;
  std::string dir;
  bool with_optimizer = true;

  friend bool operator==(const SaveAdapter&, const SaveAdapter&) = default;
};

// Replaces the adapter's weights by a checkpoint's; pending gradients are cleared. Without the optimizer: fresh
// moments.
struct LoadAdapter {
  std::string adapter;
  std::string dir;
  bool load_optimizer = false;

  friend bool operator==(const LoadAdapter&, const LoadAdapter&) = default;
};

// Freezes the adapter's weights as an immutable version for samplers. The version is also written into `dir` (layout of
// SaveAdapter without optimizer), behind: a SnapshotResult tells when its files are complete.
struct PublishVersion {
  std::string adapter;
  std::string version;
  std::string dir;

  friend bool operator==(const PublishVersion&, const PublishVersion&) = default;
};

// One micro-batch that was, or must be, executed as one packed batch.
struct MicroBatchSlice {
  RequestId request = 0;
  std::int32_t datum_begin = 0;
  std::int32_t datum_end = 0;

  friend bool operator==(const MicroBatchSlice&, const MicroBatchSlice&) = default;
};
struct MicroBatch {
  std::uint64_t number = 0;
  std::vector<MicroBatchSlice> slices;

  friend bool operator==(const MicroBatch&, const MicroBatch&) = default;
};

// Sent before the requests of a recovery: compose exactly these micro-batches, in this order, then compose freely.
struct Replay {
  std::vector<MicroBatch> micro_batches;

  friend bool operator==(const Replay&, const Replay&) = default;
};

// ---- sampling lane ---------------------------------------------------------------------------------------------

struct SamplingParams {
  std::int32_t max_tokens = 0;  // 0: as many as context and cache hold
  std::uint64_t seed = 0;
  float temperature = 1.0f;  // 0 = greedy
  std::int32_t top_k = -1;   // -1 = off
  float top_p = 1.0f;
  bool stop_on_eos = true;
  std::vector<std::int32_t> stop_tokens;
  std::vector<std::string> stop_strings;

  friend bool operator==(const SamplingParams&, const SamplingParams&) = default;
};

struct Sample {
  std::string version;               // an adapter version's name; empty = the base model
  std::string version_dir;           // its files, for a version that is not in memory
  std::vector<std::int32_t> prompt;  // >= 1 token
  std::int32_t num_samples = 1;
  SamplingParams params;
  bool prompt_logprobs = false;
  std::int32_t prompt_logprobs_last_n = 0;  // 0 = all positions
  std::int32_t topk_prompt_logprobs = 0;
  std::int32_t topk_sample_logprobs = 0;
  std::int32_t target_width = 0;             // K of target_prompt_logprobs, 0 = off
  std::vector<std::int32_t> prompt_targets;  // [(prompt_len - 1) * K], -1 = not requested; row i scores position i + 1
  std::int32_t prompt_alt_tokens_k = 0;
  // Whose sample it is: owners share the sampler evenly. Empty: one owner more.
  std::string owner;

  friend bool operator==(const Sample&, const Sample&) = default;
};

struct DropVersion {
  std::string version;

  friend bool operator==(const DropVersion&, const DropVersion&) = default;
};

// ---- control lane ----------------------------------------------------------------------------------------------

// First request of a worker: load the base model. Progress comes while it loads.
struct Initialize {
  std::string model_dir;
  std::string backend_config;    // JSON object
  std::int32_t max_seq_len = 0;  // 0 = the model's own
  std::int32_t threads = 0;      // 0 = all cores

  friend bool operator==(const Initialize&, const Initialize&) = default;
};

// The file of token bytes that stop strings are matched against (format: worker/token_table.h).
struct SetTokenTable {
  std::string path;

  friend bool operator==(const SetTokenTable&, const SetTokenTable&) = default;
};

struct Cancel {
  RequestId target = 0;

  friend bool operator==(const Cancel&, const Cancel&) = default;
};

// One cut through all adapters between two micro-batches, with no request partly executed: weights, moments, pending
// gradients, steps, names of live versions. Taken at the first such moment, answered when it is written into `dir`.
// Until then requests of several micro-batches are held back, but only for a bounded number of micro-batches at a time,
// then they run for as many; what fits into one micro-batch is never held back (TrainQueue::set_draining).
struct Snapshot {
  std::string dir;

  friend bool operator==(const Snapshot&, const Snapshot&) = default;
};

// Brings back the adapters of a snapshot, before anything else runs.
struct Restore {
  std::string dir;

  friend bool operator==(const Restore&, const Restore&) = default;
};

struct Status {
  friend bool operator==(const Status&, const Status&) = default;
};
struct Shutdown {
  friend bool operator==(const Shutdown&, const Shutdown&) = default;
};

using RequestBody =
    std::variant<CreateAdapter, DropAdapter, ForwardBackward, OptimStep, SaveAdapter, LoadAdapter, PublishVersion,
                 Replay, Sample, DropVersion, Initialize, SetTokenTable, Cancel, Snapshot, Restore, Status, Shutdown>;

struct Request {
  RequestId id = 0;
  RequestBody body;

  friend bool operator==(const Request&, const Request&) = default;
};

enum class Lane { control = 0, training = 1, sampling = 2 };
inline constexpr int kNumLanes = 3;
Lane lane_of(const RequestBody& body);

// ---- replies ---------------------------------------------------------------------------------------------------

struct Ack {
  friend bool operator==(const Ack&, const Ack&) = default;
};

struct WorkerInfo {
  std::int32_t max_seq_len = 0;
  std::string device;       // "cpu", "cuda:0 NVIDIA H100 …"
  std::string memory_plan;  // text, one line a category

  friend bool operator==(const WorkerInfo&, const WorkerInfo&) = default;
};

struct TrainResult {
  std::vector<float> logprobs;            // follows TrainBatch::targets
  std::map<std::string, double> metrics;  // "name:reduction"
  double compute_seconds = 0;             // share of the micro-batches' time

  friend bool operator==(const TrainResult&, const TrainResult&) = default;
};

struct OptimResult {
  std::map<std::string, double> metrics;
  double compute_seconds = 0;

  friend bool operator==(const OptimResult&, const OptimResult&) = default;
};

struct SaveResult {
  std::uint64_t bytes = 0;

  friend bool operator==(const SaveResult&, const SaveResult&) = default;
};

enum class StopReason : int { stop = 0, length = 1 };

struct TopkLogprobs {
  std::int32_t k = 0;
  std::vector<std::int32_t> token_ids;  // [rows * k], best first; undefined cell: token 0, logprob -99999
  std::vector<float> logprobs;          // [rows * k]

  friend bool operator==(const TopkLogprobs&, const TopkLogprobs&) = default;
};

struct SampledSequence {
  StopReason stop_reason = StopReason::length;
  std::vector<std::int32_t> tokens;
  std::vector<float> logprobs;  // [tokens]
  TopkLogprobs topk;            // k = 0 when not asked

  friend bool operator==(const SampledSequence&, const SampledSequence&) = default;
};

struct SampleResult {
  std::vector<SampledSequence> sequences;  // num_samples
  std::vector<float> prompt_logprobs;      // [prompt_len] or empty; NaN = not computed
  TopkLogprobs topk_prompt;
  std::vector<float> target_prompt_logprobs;    // follows prompt_targets; 0 where not requested
  std::vector<std::int32_t> prompt_alt_tokens;  // [(prompt_len - 1) * k]
  std::vector<float> prompt_alt_logprobs;       // ditto
  std::int32_t prompt_cache_hit_tokens = 0;

  friend bool operator==(const SampleResult&, const SampleResult&) = default;
};

// The cut of a snapshot, per adapter: the id of the last training request that is inside it.
struct SnapshotResult {
  std::map<std::string, RequestId> last_request;
  std::vector<std::string> versions_on_disk;  // versions whose files are complete

  friend bool operator==(const SnapshotResult&, const SnapshotResult&) = default;
};

struct StatusResult {
  std::int32_t queued_training = 0;
  std::int32_t running_sequences = 0;
  std::int32_t waiting_sequences = 0;
  std::int64_t cache_blocks_total = 0;
  std::int64_t cache_blocks_free = 0;
  std::uint64_t micro_batches = 0;
  std::uint64_t decode_steps = 0;
  std::uint64_t rss_bytes = 0;
  std::uint64_t peak_rss_bytes = 0;       // the most the process has had (VmHWM)
  std::uint64_t trained_tokens = 0;       // of all micro-batches
  std::uint64_t sampled_tokens = 0;       // of all sampling steps, prompts included
  std::uint64_t preemptions = 0;          // sequences that gave up their cache blocks for a while
  std::uint64_t adapter_bytes = 0;        // of adapters in training
  std::uint64_t adapter_bytes_limit = 0;  // beyond it CreateAdapter is refused
  std::uint64_t version_bytes = 0;        // of sampler versions in memory

  friend bool operator==(const StatusResult&, const StatusResult&) = default;
};

using DoneBody =
    std::variant<Ack, WorkerInfo, TrainResult, OptimResult, SaveResult, SampleResult, SnapshotResult, StatusResult>;

struct Done {
  DoneBody body;

  friend bool operator==(const Done&, const Done&) = default;
};
struct Failure {
  ErrorCategory category = ErrorCategory::server;
  std::string message;

  friend bool operator==(const Failure&, const Failure&) = default;
};
struct Progress {
  double fraction = 0;  // 0…1
  std::string text;

  friend bool operator==(const Progress&, const Progress&) = default;
};
// Comes on the training lane before the Done of any request that it touches.
struct MicroBatchExecuted {
  MicroBatch micro_batch;

  friend bool operator==(const MicroBatchExecuted&, const MicroBatchExecuted&) = default;
};

struct Reply {
  RequestId id = 0;  // 0 for MicroBatchExecuted
  std::variant<Done, Failure, Progress, MicroBatchExecuted> body;

  friend bool operator==(const Reply&, const Reply&) = default;
};

}  // namespace ht::worker_protocol
