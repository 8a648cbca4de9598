#include "server/checkpoints/checkpoints.h"

#include <algorithm>
#include <bit>
#include <boost/json.hpp>
#include <set>

#include "base/error.h"
#include "base/logging.h"
#include "server/checkpoints/files.h"
#include "server/store/database.h"
#include "server/store/file_work.h"

namespace ht::checkpoints {
namespace {

namespace asio = boost::asio;
namespace fs = std::filesystem;
namespace json = boost::json;
using std::chrono::milliseconds;
using store::integer_of;
using store::Row;
using store::text_of;
using store::Value;

Clock::time_point truncated(Clock::time_point time) {
  return std::chrono::time_point_cast<milliseconds>(time);
}
std::int64_t to_ms(Clock::time_point time) {
  return std::chrono::duration_cast<milliseconds>(time.time_since_epoch()).count();
}
Clock::time_point from_ms(const Value& value) {
  return Clock::time_point(milliseconds(integer_of(value)));
}

std::string metadata_to_json(const std::map<std::string, std::string>& metadata) {
  json::object object;
  for (const auto& [key, value] : metadata) object[key] = value;
  return json::serialize(object);
}
std::map<std::string, std::string> metadata_from_json(const std::string& text) {
  std::map<std::string, std::string> metadata;
  const json::value parsed = json::parse(text);
  for (const auto& [key, value] : parsed.as_object()) metadata[std::string(key)] = std::string(value.as_string());
  return metadata;
}

Checkpoint from_row(const Row& row, const Files& files) {
  return {.path = {.run = text_of(row[0]),
                   .kind = text_of(row[1]) == name_of(Kind::weights) ? Kind::weights : Kind::sampler_weights,
                   .name = text_of(row[2])},
          .dir = files.absolute(text_of(row[3])),
          .created_at = from_ms(row[4]),
          .expires_at = std::holds_alternative<std::nullptr_t>(row[5]) ? std::nullopt : std::optional(from_ms(row[5])),
          .size_bytes = static_cast<std::uint64_t>(integer_of(row[6])),
          .is_public = integer_of(row[7]) != 0,
          .user_metadata = metadata_from_json(text_of(row[8])),
          .base_model = text_of(row[9]),
          .base_dir = text_of(row[10]),
          .lora = {.rank = static_cast<int>(integer_of(row[11])),
                   .seed = std::bit_cast<std::uint64_t>(integer_of(row[12])),
                   .train_attn = integer_of(row[13]) != 0,
                   .train_mlp = integer_of(row[14]) != 0,
                   .train_unembed = integer_of(row[15]) != 0},
          .request_id = text_of(row[16])};
}

Value optional_ms(const std::optional<Clock::time_point>& time) {
  return time ? Value(to_ms(*time)) : Value(nullptr);
}

class StoredCheckpoints : public Checkpoints {
 public:
  StoredCheckpoints(store::Database& database, store::FileWork& file_work, const fs::path& data_dir)
      : database_(database), file_work_(file_work), files_(std::make_shared<Files>(data_dir)) {
    files_->empty_staging();
    for (const Row& row : database_.query("SELECT run, kind, name, dir, created_ms, expires_ms, size_bytes, is_public,"
                                          " user_metadata, base_model, base_dir, lora_rank, lora_seed, train_attn,"
                                          " train_mlp, train_unembed, request_id FROM checkpoints ORDER BY rowid")) {
      remember(from_row(row, *files_));
    }
    delete_doomed();
  }

  void check_free(const TinkerPath& path, bool overwrite, const std::string& request_id) const override {
    check_name(path.name);
    const Entry* entry = live(path);
    if (entry != nullptr && !overwrite && entry->checkpoint.request_id != request_id) {
      throw user_error("checkpoint " + path.str() +
                       " exists already: choose another name, or save with overwrite=True");
    }
  }

  fs::path stage(const std::string& request_id) override { return files_->stage(request_id); }

  asio::awaitable<Checkpoint> commit(Checkpoint checkpoint, bool overwrite) override {
    const std::string id = checkpoint.request_id;
    const auto known = entries_.find(checkpoint.path.str());
    if (known != entries_.end() && known->second.checkpoint.request_id == id) {
      const Checkpoint made = known->second.checkpoint;
      behind("the staged files of " + id, [files = files_, id] { files->drop_staged(id); });
      co_return made;
    }
    try {
      check_free(checkpoint.path, overwrite, id);
    } catch (const Error&) {
      behind("the staged files of " + id, [files = files_, id] { files->drop_staged(id); });
      throw;
    }
    auto place = [files = files_, path = checkpoint.path, id]() -> std::pair<fs::path, std::uint64_t> {
      const fs::path dir = files->place(path, id);
      return {dir, Files::size_of(dir)};
    };
    const auto placed = co_await file_work_.run(std::move(place));
    checkpoint.dir = placed.first;
    checkpoint.size_bytes = placed.second;
    try {
      check_free(checkpoint.path, overwrite, id);  // another may have come meanwhile
    } catch (const Error&) {
      doom(checkpoint);
      delete_doomed();
      throw;
    }
    co_return put(std::move(checkpoint));
  }

  // Registers it in the place of what there was.
  Checkpoint put(Checkpoint checkpoint) {
    const auto before = entries_.find(checkpoint.path.str());
    if (checkpoint.created_at == Clock::time_point{}) checkpoint.created_at = Clock::now();
    checkpoint.created_at = truncated(checkpoint.created_at);
    if (checkpoint.expires_at) checkpoint.expires_at = truncated(*checkpoint.expires_at);
    database_.transaction([&] {
      if (before != entries_.end()) erase_row(before->second.checkpoint);
      insert_row(checkpoint);
    });
    if (before != entries_.end()) entries_.erase(before);
    const Checkpoint kept = remember(std::move(checkpoint));
    delete_doomed();
    return kept;
  }

  std::optional<Checkpoint> find(const TinkerPath& path) const override {
    const Entry* entry = live(path);
    return entry == nullptr ? std::nullopt : std::optional(entry->checkpoint);
  }

  std::vector<Checkpoint> list_run(const std::string& run) const override {
    std::vector<Checkpoint> result;
    for (const Entry* entry : newest_first()) {
      if (entry->checkpoint.path.run == run) result.push_back(entry->checkpoint);
    }
    return result;
  }

  bool has_run(const std::string& run) const override {
    const std::string prefix = "tinker://" + run + "/";
    const auto first = entries_.lower_bound(prefix);
    return first != entries_.end() && first->first.starts_with(prefix);
  }

  std::vector<Checkpoint> list(std::size_t limit, std::size_t offset, std::size_t* total) const override {
    const std::vector<const Entry*> entries = newest_first();
    if (total != nullptr) *total = entries.size();
    std::vector<Checkpoint> result;
    for (std::size_t i = offset; i < entries.size() && result.size() < limit; ++i) {
      result.push_back(entries[i]->checkpoint);
    }
    return result;
  }

  bool remove(const TinkerPath& path) override {
    const Entry* entry = live(path);
    if (entry == nullptr) return false;
    forget(path.str());
    delete_doomed();
    return true;
  }

  bool set_ttl(const TinkerPath& path, std::optional<std::chrono::seconds> ttl) override {
    if (live(path) == nullptr) return false;
    Checkpoint& checkpoint = entries_.at(path.str()).checkpoint;
    const auto expires_at = ttl ? std::optional(truncated(Clock::now() + *ttl)) : std::nullopt;
    update(path, "UPDATE checkpoints SET expires_ms = ? WHERE run = ? AND kind = ? AND name = ?",
           optional_ms(expires_at));
    checkpoint.expires_at = expires_at;
    return true;
  }

  bool set_public(const TinkerPath& path, bool is_public) override {
    if (live(path) == nullptr) return false;
    update(path, "UPDATE checkpoints SET is_public = ? WHERE run = ? AND kind = ? AND name = ?",
           std::int64_t{is_public});
    entries_.at(path.str()).checkpoint.is_public = is_public;
    return true;
  }

  void expire() override {
    std::vector<std::string> over;
    for (const auto& [key, entry] : entries_) {
      if (is_over(entry.checkpoint)) over.push_back(key);
    }
    for (const std::string& key : over) {
      spdlog::info("checkpoint {} expired", key);
      forget(key);
    }
    delete_doomed();
  }

  std::string relative(const fs::path& dir) const override { return files_->relative(dir); }
  fs::path version_dir(const std::string& version) override { return files_->version_dir(version); }

  void sweep_versions(std::function<bool(const std::string&)> needed) override {
    auto found = std::make_shared<std::vector<std::string>>();
    file_work_.post([files = files_, found] { *found = files->versions(); },
                    [this, found, needed = std::move(needed)](const std::exception_ptr&) {
                      for (const std::string& version : *found) {
                        if (needed(version)) continue;
                        behind("the files of version " + version,
                               [files = files_, version] { files->drop_version(version); });
                      }
                    });
  }

 private:
  struct Entry {
    Checkpoint checkpoint;
    std::uint64_t order = 0;  // of creation
  };

  static bool is_over(const Checkpoint& checkpoint) {
    return checkpoint.expires_at && *checkpoint.expires_at <= Clock::now();
  }

  const Entry* live(const TinkerPath& path) const {
    const auto found = entries_.find(path.str());
    return found == entries_.end() || is_over(found->second.checkpoint) ? nullptr : &found->second;
  }

  std::vector<const Entry*> newest_first() const {
    std::vector<const Entry*> result;
    for (const auto& [key, entry] : entries_) {
      if (!is_over(entry.checkpoint)) result.push_back(&entry);
    }
    std::sort(result.begin(), result.end(), [](const Entry* a, const Entry* b) { return a->order > b->order; });
    return result;
  }

  const Checkpoint& remember(Checkpoint checkpoint) {
    Entry& entry = entries_[checkpoint.path.str()];
    entry = {std::move(checkpoint), ++orders_};
    return entry.checkpoint;
  }

  void update(const TinkerPath& path, std::string_view sql, Value value) {
    database_.execute(sql, {std::move(value), path.run, std::string(name_of(path.kind)), path.name});
  }

  void insert_row(const Checkpoint& c) {
    database_.execute(
        "INSERT INTO checkpoints (run, kind, name, dir, created_ms, expires_ms, size_bytes, is_public,"
        " user_metadata, base_model, base_dir, lora_rank, lora_seed, train_attn, train_mlp,"
        " train_unembed, request_id) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        {c.path.run, std::string(name_of(c.path.kind)), c.path.name, files_->relative(c.dir), to_ms(c.created_at),
         optional_ms(c.expires_at), static_cast<std::int64_t>(c.size_bytes), std::int64_t{c.is_public},
         metadata_to_json(c.user_metadata), c.base_model, c.base_dir, std::int64_t{c.lora.rank},
         std::bit_cast<std::int64_t>(c.lora.seed), std::int64_t{c.lora.train_attn}, std::int64_t{c.lora.train_mlp},
         std::int64_t{c.lora.train_unembed}, c.request_id});
  }

  // The row goes and its directory is doomed in one commit: a crash leaves no files that nobody knows of.
  void erase_row(const Checkpoint& c) {
    database_.execute("DELETE FROM checkpoints WHERE run = ? AND kind = ? AND name = ?",
                      {c.path.run, std::string(name_of(c.path.kind)), c.path.name});
    doom(c);
  }

  void doom(const Checkpoint& c) {
    database_.execute("INSERT OR IGNORE INTO doomed_dirs (dir) VALUES (?)", {files_->relative(c.dir)});
  }

  void forget(const std::string& key) {
    const auto found = entries_.find(key);
    database_.transaction([&] { erase_row(found->second.checkpoint); });
    entries_.erase(found);
  }

  void delete_doomed() {
    for (const Row& row : database_.query("SELECT dir FROM doomed_dirs")) {
      const std::string dir = text_of(row[0]);
      if (!being_deleted_.insert(dir).second) continue;
      behind(
          "the files of a deleted checkpoint", [files = files_, dir] { files->remove(files->absolute(dir)); },
          [this, dir](bool deleted) {
            being_deleted_.erase(dir);
            if (deleted) database_.execute("DELETE FROM doomed_dirs WHERE dir = ?", {dir});
          });
    }
  }

  // Nobody waits for it.
  void behind(std::string what, std::function<void()> removal, std::function<void(bool)> over = {}) {
    file_work_.post(std::move(removal), [what = std::move(what), over = std::move(over)](std::exception_ptr thrown) {
      try {
        if (over) over(thrown == nullptr);
        if (thrown) std::rethrow_exception(thrown);
      } catch (const std::exception& error) {
        spdlog::warn("{} stay until the next try: {}", what, error.what());
      }
    });
  }

  store::Database& database_;
  store::FileWork& file_work_;
  std::shared_ptr<Files> files_;
  std::set<std::string> being_deleted_;   // doomed
  std::map<std::string, Entry> entries_;  // by tinker path
  std::uint64_t orders_ = 0;
};

}  // namespace

std::unique_ptr<Checkpoints> make_checkpoints(store::Database& database, store::FileWork& file_work,
                                              const fs::path& data_dir) {
  return std::make_unique<StoredCheckpoints>(database, file_work, data_dir);
}

}  // namespace ht::checkpoints
