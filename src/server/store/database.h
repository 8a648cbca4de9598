#pragma once

// The server's SQLite file: sessions, models, samplers, checkpoints. One connection, used by the io thread alone. Rooms
// keep their rows in memory and read the file only when they start, so this needs no more than "write" and "read all".

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "server/store/journal.h"

namespace ht::store {

using Value = std::variant<std::nullptr_t, std::int64_t, std::string>;
using Row = std::vector<Value>;

class Database {
 public:
  // Opens or makes `file` (write-ahead log; commits survive the death of the process, with Durability::power also the
  // loss of power) and brings its tables up to date. Throws Error(user) for a file of a newer version or no database,
  // Error(server) when it cannot be opened.
  explicit Database(const std::filesystem::path& file, Durability durability = Durability::process);
  ~Database();
  Database(const Database&) = delete;
  Database& operator=(const Database&) = delete;

  // One statement with its `?` bound in order; the number of changed rows. Throws Error(server) when it fails.
  int execute(std::string_view sql, const std::vector<Value>& values = {});
  std::vector<Row> query(std::string_view sql, const std::vector<Value>& values = {});
  // All of `body` or nothing: rolled back when it throws. May be nested; the outermost commits.
  void transaction(const std::function<void()>& body);

  static constexpr int kVersion = 1;  // of the tables

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Columns of a row. Null is "" and 0.
std::string text_of(const Value& value);
std::int64_t integer_of(const Value& value);

}  // namespace ht::store
