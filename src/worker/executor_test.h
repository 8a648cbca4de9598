#pragma once

// For tests: the executors with a tiny random checkpoint, in this process, where a step can be made to fail.

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/runtime/test_checkpoint.h"
#include "worker/mailbox.h"
#include "worker/versions.h"

namespace ht::worker {

namespace wp = worker_protocol;
using wp::RequestId;

class ExecutorTest : public testing::Test {
 protected:
  void SetUp() override {
    engine::write_test_checkpoint(dir.path());
    model = engine::BaseModel::load(dir.path(), {.threads = 1});
    make_versions(std::uint64_t{1} << 30);
  }
  void make_versions(std::uint64_t budget) {
    versions = std::make_unique<Versions>(model->spec(), "base", budget, files);
  }
  // Until `true`, with what comes of files.
  void pump(const std::function<bool()>& until) {
    while (!until()) {
      for (const FileThread::Then& then : mailbox.take(true).files) then();
    }
  }
  void pump_until_answered(RequestId id) {
    pump([&] { return replies.contains(id); });
  }
  std::filesystem::path make_dir(const std::string& name) {
    std::filesystem::create_directory(scratch.path() / name);
    return scratch.path() / name;
  }
  // A file that is opened for writing only once somebody reads it, and cannot be synced then.
  std::filesystem::path slow_file(const std::filesystem::path& file) {
    const std::string path = file.string() + ".tmp." + std::to_string(::getpid());
    EXPECT_EQ(::mkfifo(path.c_str(), 0600), 0);
    return path;
  }
  void read_away(const std::filesystem::path& fifo) {
    std::ifstream stream(fifo);
    while (stream.get() != EOF) continue;
  }
  Send into_replies() {
    return [this](const wp::Reply& reply) { replies[reply.id].push_back(reply); };
  }
  template <class T>
  T done(RequestId id) {
    EXPECT_EQ(replies[id].size(), 1u);
    const wp::Reply& reply = replies.at(id).at(0);
    if (const auto* failure = std::get_if<wp::Failure>(&reply.body)) throw std::runtime_error(failure->message);
    return std::get<T>(std::get<wp::Done>(reply.body).body);
  }
  wp::Failure failure(RequestId id) {
    EXPECT_EQ(replies[id].size(), 1u);
    return std::get<wp::Failure>(replies.at(id).at(0).body);
  }
  engine::AdapterWeights weights() const {
    engine::AdapterWeights made = engine::Adapter::create(model->spec(), {.rank = 8, .seed = 3}).weights;
    made.flat.copy_(at::cos(at::arange(made.flat.numel(), at::kFloat)) * 0.05);
    return made;
  }

  const c10::InferenceMode no_autograd;
  engine::TemporaryDirectory dir;
  std::unique_ptr<engine::BaseModel> model;
  engine::TemporaryDirectory scratch;
  Mailbox mailbox;
  std::map<RequestId, std::vector<wp::Reply>> replies;
  std::unique_ptr<Versions> versions;
  FileThread files{[this](FileThread::Then then) { mailbox.post(std::move(then)); }};
};

}  // namespace ht::worker
