// A worker for this room's tests: answers as its behaviour, the name of the Initialize request's model_dir, says.

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>
#include <thread>

#include "worker_protocol/codec.h"

namespace {

namespace wp = ht::worker_protocol;

void write_all(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(fd, bytes.data(), bytes.size());
    if (written < 0) std::exit(9);
    bytes.remove_prefix(static_cast<std::size_t>(written));
  }
}

void answer(int fd, wp::RequestId id, std::string text) {
  write_all(fd, wp::frame(wp::encode(wp::Reply{id, wp::Progress{0.5, std::move(text)}})));
  write_all(fd, wp::frame(wp::encode(wp::Reply{id, wp::Done{wp::Ack{}}})));
}

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// What a test wants to know of the process.
std::string describe_process() {
  std::string open_files;
  for (int fd = 3; fd < 512; ++fd) {
    if (::fcntl(fd, F_GETFD) >= 0) open_files += std::to_string(fd) + " ";
  }
  return variable("LD_LIBRARY_PATH") + "|" + variable("OMP_WAIT_POLICY") + " " + variable("GOMP_SPINCOUNT") + "|" +
         (::getpgrp() == ::getpid() ? "leader" : "member") + "|" + open_files;
}

void behave(const std::string& behaviour, int fd, wp::RequestId id) {
  if (behaviour == "describe") {
    answer(fd, id, describe_process());
  } else if (behaviour == "exit") {
    std::exit(7);
  } else if (behaviour == "garbage") {
    write_all(fd, wp::frame("\xff\xff\xff\xff no reply"));
    ::pause();
  } else if (behaviour == "huge") {
    write_all(fd, "\xff\xff\xff\xff");
    ::pause();
  } else if (behaviour == "torn") {
    answer(fd, id, "whole");
    write_all(fd, wp::frame(std::string(1000, 'x')).substr(0, 500));
    std::signal(SIGSEGV, SIG_DFL);  // a sanitizer's handler would turn the death into an exit code
    ::raise(SIGSEGV);
  } else if (behaviour == "flood") {
    // More than the socket holds, then death: all of it must arrive.
    for (int i = 0; i < 20000; ++i) {
      write_all(
          fd, wp::frame(wp::encode(wp::Reply{static_cast<wp::RequestId>(i), wp::Progress{0, std::string(100, 'p')}})));
    }
    ::raise(SIGKILL);
  } else if (behaviour == "close") {
    ::close(fd);
    ::pause();
  } else if (behaviour == "grandchild") {
    if (::fork() == 0) ::pause();
    std::exit(0);
  } else {
    answer(fd, id, behaviour);
  }
}

void serve(int fd, bool* never_ends) {
  wp::FrameReader frames;
  std::string chunk(65536, '\0');
  while (true) {
    const ssize_t bytes = ::read(fd, chunk.data(), chunk.size());
    if (bytes <= 0) return;
    frames.feed(std::string_view(chunk.data(), static_cast<std::size_t>(bytes)));
    while (auto payload = frames.next()) {
      const wp::Request request = wp::decode_request(*payload);
      const auto* initialize = std::get_if<wp::Initialize>(&request.body);
      if (initialize != nullptr && initialize->model_dir == "never ends") *never_ends = true;
      if (initialize != nullptr) {
        behave(initialize->model_dir, fd, request.id);
      } else {
        answer(fd, request.id, "lane");
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  int fds[3] = {-1, -1, -1};
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--control-fd") == 0) fds[0] = std::atoi(argv[i + 1]);
    if (std::strcmp(argv[i], "--training-fd") == 0) fds[1] = std::atoi(argv[i + 1]);
    if (std::strcmp(argv[i], "--sampling-fd") == 0) fds[2] = std::atoi(argv[i + 1]);
  }
  bool never_ends = false;
  for (const int fd : {fds[1], fds[2]})
    std::thread([fd] {
      bool ignored = false;
      serve(fd, &ignored);
    }).detach();
  std::cerr << "the test worker runs\n";
  serve(fds[0], &never_ends);
  while (never_ends) ::pause();
  std::_Exit(0);
}
