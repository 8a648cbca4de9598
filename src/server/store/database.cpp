#include "server/store/database.h"

#include <SQLiteCpp/SQLiteCpp.h>
#include <sqlite3.h>

#include <array>
#include <map>
#include <optional>

#include "base/error.h"

namespace ht::store {
namespace {

// kMigrations[n] brings version n to n + 1. Never change one that was released: add another.
constexpr std::array<const char*, Database::kVersion> kMigrations = {R"sql(
CREATE TABLE sessions (
  id TEXT PRIMARY KEY,
  idempotency_key TEXT UNIQUE,
  created_ms INTEGER NOT NULL,
  last_heartbeat_ms INTEGER NOT NULL,
  state INTEGER NOT NULL,
  finish_reason TEXT NOT NULL,
  finish_detail TEXT NOT NULL,
  tags TEXT NOT NULL,
  user_metadata TEXT NOT NULL,
  project_id TEXT NOT NULL,
  display_name TEXT NOT NULL,
  sdk_version TEXT NOT NULL
);
CREATE TABLE models (
  id TEXT PRIMARY KEY,
  session_id TEXT NOT NULL REFERENCES sessions(id),
  model_seq_id INTEGER NOT NULL,
  base_model TEXT NOT NULL,
  base_dir TEXT NOT NULL,
  lora_rank INTEGER NOT NULL,
  lora_seed INTEGER NOT NULL,
  train_attn INTEGER NOT NULL,
  train_mlp INTEGER NOT NULL,
  train_unembed INTEGER NOT NULL,
  user_metadata TEXT NOT NULL,
  created_ms INTEGER NOT NULL,
  last_request_ms INTEGER NOT NULL,
  UNIQUE (session_id, model_seq_id)
);
CREATE TABLE samplers (
  id TEXT PRIMARY KEY,
  session_id TEXT NOT NULL REFERENCES sessions(id),
  base_model TEXT NOT NULL,
  base_dir TEXT NOT NULL,
  model_path TEXT NOT NULL,
  version TEXT NOT NULL,
  version_dir TEXT NOT NULL
);
CREATE TABLE checkpoints (
  run TEXT NOT NULL,
  kind TEXT NOT NULL,
  name TEXT NOT NULL,
  dir TEXT NOT NULL,
  created_ms INTEGER NOT NULL,
  expires_ms INTEGER,
  size_bytes INTEGER NOT NULL,
  is_public INTEGER NOT NULL,
  user_metadata TEXT NOT NULL,
  base_model TEXT NOT NULL,
  base_dir TEXT NOT NULL,
  lora_rank INTEGER NOT NULL,
  lora_seed INTEGER NOT NULL,
  train_attn INTEGER NOT NULL,
  train_mlp INTEGER NOT NULL,
  train_unembed INTEGER NOT NULL,
  request_id TEXT NOT NULL,
  PRIMARY KEY (run, kind, name)
);
-- Directories of checkpoints that are gone: deleted after the commit that says so, also by the next start.
CREATE TABLE doomed_dirs (dir TEXT PRIMARY KEY);
)sql"};

}  // namespace

struct Database::Impl {
  std::filesystem::path file;
  std::optional<SQLite::Database> connection;
  std::map<std::string, SQLite::Statement, std::less<>> statements;
  int depth = 0;  // of nested transactions

  [[noreturn]] void fail(const SQLite::Exception& error) const {
    throw server_error("database " + file.string() + ": " + error.what());
  }

  SQLite::Statement& prepare(std::string_view sql, const std::vector<Value>& values) {
    auto found = statements.find(sql);
    if (found == statements.end()) {
      found = statements.try_emplace(std::string(sql), *connection, std::string(sql)).first;
    }
    SQLite::Statement& statement = found->second;
    statement.reset();
    statement.clearBindings();
    for (std::size_t i = 0; i < values.size(); ++i) {
      const int index = static_cast<int>(i) + 1;
      if (const auto* number = std::get_if<std::int64_t>(&values[i])) {
        statement.bind(index, *number);
      } else if (const auto* text = std::get_if<std::string>(&values[i])) {
        statement.bind(index, *text);
      } else {
        statement.bind(index);
      }
    }
    return statement;
  }

  // Leaves no statement in mid-run: an open one would hold the transaction.
  template <typename Body>
  auto run(std::string_view sql, const std::vector<Value>& values, Body body) {
    try {
      SQLite::Statement& statement = prepare(sql, values);
      try {
        auto result = body(statement);
        statement.reset();
        return result;
      } catch (...) {
        statement.tryReset();
        throw;
      }
    } catch (const SQLite::Exception& error) {
      fail(error);
    }
  }

  void migrate() {
    const int version = connection->execAndGet("PRAGMA user_version").getInt();
    if (version > kVersion) {
      throw user_error("database " + file.string() + " was made by a newer hosted-tinker (its version is " +
                       std::to_string(version) + ", this program knows " + std::to_string(kVersion) + ")");
    }
    for (int next = version; next < kVersion; ++next) {
      SQLite::Transaction transaction(*connection);
      connection->exec(kMigrations[static_cast<std::size_t>(next)]);
      connection->exec("PRAGMA user_version = " + std::to_string(next + 1));
      transaction.commit();
    }
  }
};

Database::Database(const std::filesystem::path& file, Durability durability) : impl_(std::make_unique<Impl>()) {
  impl_->file = file;
  try {
    impl_->connection.emplace(file.string(), SQLite::OPEN_READWRITE | SQLite::OPEN_CREATE, 5000);
    impl_->connection->exec("PRAGMA journal_mode = WAL");
    impl_->connection->exec(durability == Durability::power ? "PRAGMA synchronous = FULL"
                                                            : "PRAGMA synchronous = NORMAL");
    impl_->connection->exec("PRAGMA foreign_keys = ON");
    impl_->migrate();
  } catch (const SQLite::Exception& error) {
    if (error.getErrorCode() == SQLITE_NOTADB) throw user_error(file.string() + " is no database: " + error.what());
    impl_->fail(error);
  }
}

Database::~Database() = default;

int Database::execute(std::string_view sql, const std::vector<Value>& values) {
  return impl_->run(sql, values, [](SQLite::Statement& statement) { return statement.exec(); });
}

std::vector<Row> Database::query(std::string_view sql, const std::vector<Value>& values) {
  return impl_->run(sql, values, [](SQLite::Statement& statement) {
    std::vector<Row> rows;
    while (statement.executeStep()) {
      Row& row = rows.emplace_back();
      for (int i = 0; i < statement.getColumnCount(); ++i) {
        const SQLite::Column column = statement.getColumn(i);
        if (column.isNull()) {
          row.emplace_back(nullptr);
        } else if (column.isInteger()) {
          row.emplace_back(column.getInt64());
        } else {
          row.emplace_back(column.getString());
        }
      }
    }
    return rows;
  });
}

void Database::transaction(const std::function<void()>& body) {
  struct Depth {
    int& value;
    explicit Depth(int& v) : value(v) { ++value; }
    ~Depth() { --value; }
  };
  const Depth depth(impl_->depth);
  if (impl_->depth > 1) {
    body();
    return;
  }
  try {
    SQLite::Transaction transaction(*impl_->connection);  // rolls back unless committed
    body();
    transaction.commit();
  } catch (const SQLite::Exception& error) {
    impl_->fail(error);
  }
}

std::string text_of(const Value& value) {
  const auto* text = std::get_if<std::string>(&value);
  return text == nullptr ? std::string() : *text;
}

std::int64_t integer_of(const Value& value) {
  const auto* number = std::get_if<std::int64_t>(&value);
  return number == nullptr ? 0 : *number;
}

}  // namespace ht::store
