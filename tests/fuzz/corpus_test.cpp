// The committed corpus, and what the fuzzers once found in it, through every target without a fuzzer.

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "targets.h"

namespace ht::fuzz {
namespace {

class Corpus : public testing::TestWithParam<Target> {};

TEST_P(Corpus, IsTakenOrRefused) {
  const std::filesystem::path dir = std::filesystem::path(HT_FUZZ_CORPUS) / GetParam().name;
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(dir)) {
    std::ifstream stream(entry.path(), std::ios::binary);
    const std::string whole{std::istreambuf_iterator<char>(stream), {}};
    SCOPED_TRACE(entry.path().filename().string());
    // Cut anywhere and with a bit changed anywhere, as far as that is quick.
    EXPECT_NO_THROW(GetParam().run(whole));
    const std::size_t step = std::max<std::size_t>(1, whole.size() / 64);
    for (std::size_t at = 0; at < whole.size(); at += step) {
      EXPECT_NO_THROW(GetParam().run(whole.substr(0, at))) << "cut at " << at;
      std::string changed = whole;
      changed[at] = static_cast<char>(changed[at] ^ (1 << (at % 8)));
      EXPECT_NO_THROW(GetParam().run(changed)) << "changed at " << at;
    }
    ++files;
  }
  EXPECT_GT(files, 0) << dir;
}

INSTANTIATE_TEST_SUITE_P(Fuzz, Corpus, testing::ValuesIn(targets().begin(), targets().end()),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace ht::fuzz
