// The worker's streams and the journal.

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "base/error.h"
#include "scratch_dir.h"
#include "server/futures/records.h"
#include "server/store/journal.h"
#include "targets.h"
#include "worker_protocol/codec.h"

namespace ht::fuzz {

namespace wp = worker_protocol;

namespace {

// What was decoded must survive another round.
void decode(std::string_view payload) {
  try {
    const wp::Request request = wp::decode_request(payload);
    const std::string encoded = wp::encode(request);
    require(wp::encode(wp::decode_request(encoded)) == encoded, "a request changes from round to round");
  } catch (const Error&) {
  }
  try {
    const wp::Reply reply = wp::decode_reply(payload);
    const std::string encoded = wp::encode(reply);
    require(wp::encode(wp::decode_reply(encoded)) == encoded, "a reply changes from round to round");
  } catch (const Error&) {
  }
}

}  // namespace

void worker_frames(std::string_view input) {
  wp::FrameReader reader;
  try {
    // Bytes come in pieces of any size.
    for (std::size_t at = 0, step = 1; at < input.size(); at += step, step = step * 2 + 1) {
      reader.feed(input.substr(at, step));
      while (const auto payload = reader.next()) decode(*payload);
    }
  } catch (const Error&) {
  }
}

void journal_record(std::string_view input) {
  namespace futures = ht::futures;
  try {
    const auto record = futures::parse_record(input);
    if (record.has_submitted()) {
      futures::submission_of(record.submitted());
      decode(record.submitted().work());
    }
    if (record.has_completed()) {
      futures::effect_of(record.completed());
      futures::size_of(futures::outcome_of(record.completed()));
    }
    if (record.has_micro_batch()) futures::micro_batch_of(record.micro_batch());
    for (const auto& one : record.compositions().micro_batches()) futures::micro_batch_of(one);
    if (record.has_snapshot_taken()) futures::cut_of(record.snapshot_taken());
    for (const auto& lane : record.digest().lanes()) futures::lane_of(lane);
  } catch (const Error&) {
  }
}

void journal_damage(std::string_view input) {
  if (input.size() < 4) return;
  static const ScratchDir scratch("journal_damage");
  const auto dir = scratch.path() / "journal";
  std::filesystem::remove_all(dir);
  const auto byte = [&](std::size_t at) { return static_cast<std::uint8_t>(input[at]); };
  std::vector<std::string> appended;
  {
    store::Journal journal({.dir = dir});
    for (std::size_t at = 4; at < input.size() && appended.size() < 16;) {
      const std::string_view payload = input.substr(at + 1, byte(at));
      journal.append(payload);
      appended.emplace_back(payload);
      at += 1 + payload.size();
    }
  }
  const auto file = dir / "0000000001.journal";
  const std::size_t size = std::filesystem::file_size(file);
  const std::size_t place = (byte(1) + std::size_t{256} * byte(2)) % size;
  const bool cut = (byte(0) & 1) != 0;
  if (cut) {
    std::filesystem::resize_file(file, place);
  } else {
    std::fstream stream(file, std::ios::binary | std::ios::in | std::ios::out);
    stream.seekg(static_cast<std::streamoff>(place));
    const char changed = static_cast<char>(stream.get() ^ (byte(3) == 0 ? 1 : byte(3)));
    stream.seekp(static_cast<std::streamoff>(place));
    stream.put(changed);
  }
  try {
    const store::Journal journal({.dir = dir});
    std::size_t count = 0;
    journal.replay([&](const store::RecordPosition&, std::string_view payload) {
      require(count < appended.size() && payload == appended[count], "a damaged record is replayed");
      ++count;
    });
    // A change in the last record may pass for a torn tail.
    require(cut || count + 1 >= appended.size(), "a record is lost without a word");
  } catch (const Error&) {
    require(!cut || place < 28, "a torn tail is no damage");
  }
}

void journal_file(std::string_view input) {
  static const ScratchDir scratch("journal_file");
  const auto dir = scratch.path() / "journal";
  std::filesystem::remove_all(dir);
  std::filesystem::create_directories(dir);
  scratch.write("journal/0000000001.journal", input);
  try {
    std::size_t records = 0;
    store::RecordPosition last;
    {
      store::Journal journal({.dir = dir});
      journal.replay([&](const store::RecordPosition& position, std::string_view payload) {
        ++records;
        last = position;
        require(payload.size() <= input.size(), "a record is larger than its file");
      });
      if (records > 0) require(journal.read(last).size() == last.length, "a record is not read as it was replayed");
      journal.append("appended");
    }
    store::Journal again({.dir = dir});
    require(again.torn_bytes() == 0, "a journal is torn after a clean end");
    again.replay([&](const store::RecordPosition&, std::string_view) { --records; });
    require(records + 1 == 0, "records came or went");
  } catch (const Error&) {
  }
}

}  // namespace ht::fuzz
