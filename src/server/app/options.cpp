#include "server/app/options.h"

#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <boost/json/parse.hpp>

#include <cstdlib>
#include <string_view>

#include "base/error.h"

namespace ht::app {

namespace fs = std::filesystem;

namespace {

struct BackendRow {
  std::string_view name;
  Backend backend;
};
constexpr BackendRow kBackends[] = {{"native", Backend::native}, {"pytorch", Backend::pytorch}};

std::string backend_names() {
  std::string names;
  for (const BackendRow& row : kBackends) names += (names.empty() ? "" : ", ") + std::string(row.name);
  return names;
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? std::string() : value;
}

fs::path default_data_dir() {
  if (const std::string data = environment("XDG_DATA_HOME"); !data.empty()) return fs::path(data) / "hosted-tinker";
  const std::string home = environment("HOME");
  return fs::path(home.empty() ? "/" : home) / ".local/share/hosted-tinker";
}

fs::path default_worker_program() {
  std::error_code error;
  const fs::path self = fs::read_symlink("/proc/self/exe", error);
  return (error ? fs::current_path() : self.parent_path()) / "hosted-tinker-worker";
}

std::pair<std::string, fs::path> parse_model(const std::string& text, bool name_needed) {
  const auto equals = text.find('=');
  if (!name_needed && (equals == std::string::npos || fs::is_directory(text))) return {text, text};
  if (equals == 0 || equals == std::string::npos || equals + 1 == text.size()) {
    throw user_error("\"" + text + "\" must be " + (name_needed ? "NAME=DIR" : "DIR or NAME=DIR"));
  }
  return {text.substr(0, equals), text.substr(equals + 1)};
}

// A JSON object, as it was given.
std::string check_backend_config(const std::string& text) {
  boost::system::error_code error;
  const auto value = boost::json::parse(text, error);
  if (error) throw user_error("--backend-config is not JSON (" + error.message() + "): " + text);
  if (!value.is_object()) throw user_error("--backend-config must be a JSON object such as {}, got " + text);
  return text;
}

Backend parse_backend(const std::string& name) {
  for (const BackendRow& row : kBackends) {
    if (row.name == name) return row.backend;
  }
  throw user_error("--backend " + name + " is not available; available: " + backend_names());
}

// A JSON array, so that a path may hold spaces.
std::vector<std::string> parse_command(const char* option, const std::string& text) {
  std::vector<std::string> words;
  if (text.empty()) return words;
  boost::system::error_code error;
  const auto value = boost::json::parse(text, error);
  const auto* array = error ? nullptr : value.if_array();
  bool valid = array != nullptr && !array->empty();
  for (std::size_t i = 0; valid && i < array->size(); ++i) {
    const auto* word = (*array)[i].if_string();
    valid = word != nullptr;
    if (valid) words.emplace_back(*word);
  }
  if (!valid) {
    throw user_error(std::string(option) + " must be a JSON array of strings such as [\"/usr/bin/helper\"], got " +
                     text);
  }
  return words;
}

void choose_pytorch_worker(std::vector<std::string> command, ServeOptions& options) {
  if (command.empty()) {
    throw user_error(
        "--backend pytorch needs --pytorch-command, which the hosted-tinker launcher gives: start the server with it");
  }
  options.worker_program = command.front();
  options.worker_arguments.assign(command.begin() + 1, command.end());
}

struct Texts {
  std::vector<std::string> base_models, aliases;
  std::string backend = "native";
  std::string pytorch_command = environment("HOSTED_TINKER_PYTORCH_COMMAND");
  std::string tokenizer_command = environment("HOSTED_TINKER_TOKENIZER_COMMAND");
  std::string durability = "process";
  std::int64_t session_timeout = 300;
};

void add_options(CLI::App& serve, ServeOptions& options, Texts& texts) {
  serve
      .add_option("--base-model", texts.base_models,
                  "A model directory, under its path or under NAME; repeatable, one worker for each directory")
      ->type_name("[NAME=]DIR")
      ->allow_extra_args(false);
  serve
      .add_option("--model-alias", texts.aliases,
                  "Also serve DIR under NAME; repeatable; names of one directory share its weights")
      ->type_name("NAME=DIR")
      ->allow_extra_args(false);
  serve.add_option("--host", options.host, "Address to listen on")->capture_default_str();
  serve.add_option("--port", options.port, "Port to listen on; 0: any free one")->capture_default_str();
  serve.add_option("--data-dir", options.data_dir, "Where sessions, the journal and checkpoints live")
      ->type_name("DIR")
      ->capture_default_str();
  serve.add_option("--backend", texts.backend, "The engine: " + backend_names())->capture_default_str();
  serve.add_option("--backend-config", options.backend_config, "Settings of the engine, see docs/backend-config.md")
      ->type_name("JSON")
      ->capture_default_str();
  serve.add_option("--max-seq-len", options.max_seq_len, "Longest sequence in tokens; 0: the model's own")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  serve.add_option("--threads", options.threads, "Compute threads of a worker; 0: all cores")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  serve
      .add_option("--durability", texts.durability,
                  "What an acknowledged request survives: process: the death of any process; power: also a power cut "
                  "(a disk flush a request)")
      ->check(CLI::IsMember({"process", "power"}))
      ->capture_default_str();
  const auto limit = [&serve](const char* name, std::size_t& value, const char* text) {
    serve.add_option(name, value, text)->check(CLI::PositiveNumber)->capture_default_str();
  };
  limit("--max-body-bytes", options.max_body_bytes, "Largest request body as sent");
  limit("--max-decoded-bytes", options.max_decoded_bytes, "Largest request body after decompression");
  limit("--max-bodies-bytes", options.max_bodies_bytes,
        "All request bodies being read or answered; one more is answered 503");
  limit("--max-connections", options.max_connections, "Open connections; one more is answered 503");
  limit("--max-queued-samples", options.max_queued_samples, "Samples waiting for a worker; one more is answered 429");
  limit("--max-model-requests", options.max_model_requests,
        "Training requests of one model that wait or run; one more is answered 429");
  limit("--max-model-bytes", options.max_model_bytes, "Ditto, their bytes");
  limit("--max-requests", options.max_requests, "Training requests of all models that wait or run");
  limit("--max-requests-bytes", options.max_requests_bytes, "Ditto and samples, their bytes in the journal");
  serve
      .add_option("--session-timeout", texts.session_timeout, "Seconds without a heartbeat after which a session ends")
      ->check(CLI::Range(std::int64_t{10}, std::int64_t{1} << 31))
      ->capture_default_str();
  serve
      .add_option("--snapshot-seconds", options.snapshot_seconds,
                  "Compute time from one snapshot of the adapters to the next: what a worker's recovery has to repeat")
      ->capture_default_str();
  serve.add_option("--worker-program", options.worker_program, "The worker (default: beside this program)")
      ->type_name("FILE");
  serve
      .add_option("--pytorch-command", texts.pytorch_command,
                  "Program and arguments, a JSON array, of the worker of --backend pytorch")
      ->type_name("JSON")
      ->envname("HOSTED_TINKER_PYTORCH_COMMAND");
  serve
      .add_option("--tokenizer-command", texts.tokenizer_command,
                  "Program and arguments, a JSON array, that writes a model's token bytes when run with "
                  "\"export DIR OUT\"; without it, stop strings are refused")
      ->type_name("JSON")
      ->envname("HOSTED_TINKER_TOKENIZER_COMMAND");
}

}  // namespace

std::variant<ServeOptions, Exit> parse_command_line(int argc, const char* const* argv) {
  ServeOptions options;
  options.data_dir = default_data_dir();
  options.worker_program = default_worker_program();
  Texts texts;

  CLI::App app{"Serves LoRA training and sampling of open models to the official tinker SDK.", "hosted-tinker-server"};
  app.set_version_flag("--version", "hosted-tinker " HT_VERSION);
  app.require_subcommand(1);
  CLI::App& serve = *app.add_subcommand("serve", "Start the server; Ctrl-C ends it cleanly");
  serve.set_version_flag("--version", "hosted-tinker " HT_VERSION);
  add_options(serve, options, texts);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const int status = app.exit(error);
    return Exit{status == 0 ? 0 : 2};
  }

  options.backend = parse_backend(texts.backend);
  for (const std::string& text : texts.base_models) options.models.push_back(parse_model(text, false));
  for (const std::string& text : texts.aliases) options.models.push_back(parse_model(text, true));
  if (options.models.empty()) throw user_error("nothing to serve: give --base-model DIR");
  options.backend_config = check_backend_config(options.backend_config);
  if (!(options.snapshot_seconds > 0)) {
    throw user_error(fmt::format("--snapshot-seconds {} must be above 0", options.snapshot_seconds));
  }
  options.durability = texts.durability == "power" ? store::Durability::power : store::Durability::process;
  options.session_timeout = std::chrono::seconds(texts.session_timeout);
  options.tokenizer_command = parse_command("--tokenizer-command", texts.tokenizer_command);
  if (options.backend == Backend::pytorch)
    choose_pytorch_worker(parse_command("--pytorch-command", texts.pytorch_command), options);
  if (::access(options.worker_program.c_str(), X_OK) != 0) {
    throw user_error("there is no worker program at " + options.worker_program.string());
  }
  return options;
}

}  // namespace ht::app
