#include "safetensors/safetensors.h"

#include <gmock/gmock.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <random>

#include "base/error.h"

namespace ht::safetensors {
namespace {

namespace fs = std::filesystem;
using testing::ElementsAre;
using testing::HasSubstr;

class SafetensorsTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "ht_safetensors_XXXXXX").string();
    dir = ::mkdtemp(pattern.data());
  }
  void TearDown() override { fs::remove_all(dir); }

  fs::path raw(const std::string& header, const std::string& data, const std::string& name = "model.safetensors") {
    std::string bytes(8, '\0');
    const std::uint64_t size = header.size();
    std::memcpy(bytes.data(), &size, 8);
    return bytes_of(bytes + header + data, name);
  }
  fs::path bytes_of(const std::string& bytes, const std::string& name = "model.safetensors") {
    std::ofstream(dir / name, std::ios::binary) << bytes;
    return dir / name;
  }
  std::string refusal(const fs::path& file) {
    try {
      Checkpoint::open_file(file);
    } catch (const Error& error) {
      EXPECT_EQ(error.category(), ErrorCategory::user);
      return error.what();
    }
    return "accepted";
  }

  fs::path dir;
};

TEST_F(SafetensorsTest, WrittenTensorsComeBack) {
  const std::vector<float> a = {1, 2, 3, 4, 5, 6};
  const std::vector<std::int64_t> b = {-7};
  write_file(dir / "x.safetensors",
             {{"b", DType::i64, {}, b.data()}, {"a", DType::f32, {3, 2}, a.data()}, {"e", DType::f32, {0, 4}, nullptr}},
             {{"format", "pt"}});
  const Checkpoint file = Checkpoint::open_file(dir / "x.safetensors");
  EXPECT_THAT(file.names(), ElementsAre("a", "b", "e"));
  EXPECT_EQ(file.metadata().at("format"), "pt");
  EXPECT_THAT(file.at("a").shape, ElementsAre(3, 2));
  EXPECT_EQ(file.at("e").bytes, 0u);
  std::vector<float> rows(4);
  read_rows_f32(file.at("a"), 1, 3, rows.data());
  EXPECT_THAT(rows, ElementsAre(3, 4, 5, 6));
  std::int64_t scalar = 0;
  std::memcpy(&scalar, file.at("b").data, 8);
  EXPECT_EQ(scalar, -7);
  EXPECT_FALSE(file.contains("c"));
  // No temporary file stays behind.
  EXPECT_EQ(std::distance(fs::directory_iterator(dir), fs::directory_iterator()), 1);
}

TEST_F(SafetensorsTest, OverwritingReplacesTheFileWhole) {
  const float one = 1, two = 2;
  write_file(dir / "x", {{"w", DType::f32, {1}, &one}});
  const Checkpoint before = Checkpoint::open_file(dir / "x");
  write_file(dir / "x", {{"w", DType::f32, {1}, &two}});
  float value = 0;
  read_rows_f32(before.at("w"), 0, 1, &value);
  EXPECT_EQ(value, 1);  // the old mapping is untouched
  read_rows_f32(Checkpoint::open_file(dir / "x").at("w"), 0, 1, &value);
  EXPECT_EQ(value, 2);
}

TEST_F(SafetensorsTest, HalfPrecisionConvertsExactly) {
  // Every bf16 is the upper half of a float; every f16 equals the compiler's own conversion.
  std::vector<std::uint16_t> words(65536);
  for (std::size_t i = 0; i < words.size(); ++i) words[i] = static_cast<std::uint16_t>(i);
  std::vector<float> out(words.size());
  const auto* data = reinterpret_cast<const std::byte*>(words.data());
  read_rows_f32({DType::bf16, {65536}, data, 131072}, 0, 65536, out.data());
  for (std::size_t i = 0; i < words.size(); ++i) EXPECT_EQ(std::bit_cast<std::uint32_t>(out[i]), i << 16);
  read_rows_f32({DType::f16, {256, 256}, data, 131072}, 0, 256, out.data());
  for (std::size_t i = 0; i < words.size(); ++i) {
    const auto expected = static_cast<float>(std::bit_cast<_Float16>(words[i]));
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(out[i]));
    } else {
      ASSERT_EQ(std::bit_cast<std::uint32_t>(out[i]), std::bit_cast<std::uint32_t>(expected)) << i;
    }
  }
  const double d = 0.1;
  read_rows_f32({DType::f64, {1}, reinterpret_cast<const std::byte*>(&d), 8}, 0, 1, out.data());
  EXPECT_EQ(out[0], 0.1f);
}

TEST_F(SafetensorsTest, RowReaderRefusesWhatItCannotRead) {
  const std::byte data[64] = {};
  float out[16];
  EXPECT_THROW(read_rows_f32({DType::i32, {2, 2}, data, 16}, 0, 2, out), Error);
  EXPECT_THROW(read_rows_f32({DType::f32, {2, 2}, data, 16}, 0, 3, out), Error);
  EXPECT_THROW(read_rows_f32({DType::f32, {2, 2}, data, 16}, -1, 1, out), Error);
  EXPECT_THROW(read_rows_f32({DType::f32, {1, 2, 2}, data, 16}, 0, 1, out), Error);
}

TEST_F(SafetensorsTest, ShardsAreJoinedByTheIndex) {
  const float x = 3, y = 4;
  write_file(dir / "model-1.safetensors", {{"x", DType::f32, {1}, &x}, {"unlisted", DType::f32, {1}, &x}});
  write_file(dir / "model-2.safetensors", {{"y", DType::f32, {1}, &y}});
  bytes_of(R"({"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}})",
           "model.safetensors.index.json");
  const Checkpoint all = Checkpoint::open_directory(dir);
  EXPECT_THAT(all.names(), ElementsAre("x", "y"));
  try {
    all.at("z");
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("lacks tensor \"z\""));
  }

  bytes_of(R"({"weight_map": {"q": "model-2.safetensors"}})", "model.safetensors.index.json");
  EXPECT_THROW(Checkpoint::open_directory(dir), Error);
  bytes_of(R"({"weight_map": {"q": "../model-2.safetensors"}})", "model.safetensors.index.json");
  EXPECT_THROW(Checkpoint::open_directory(dir), Error);
  bytes_of(R"({"weight_map": 3})", "model.safetensors.index.json");
  EXPECT_THROW(Checkpoint::open_directory(dir), Error);
  EXPECT_THROW(Checkpoint::open_directory(dir / "absent"), Error);
}

TEST_F(SafetensorsTest, HostileHeadersAreRefusedByName) {
  const std::string four(4, '\0');
  EXPECT_THAT(refusal(dir / "absent"), HasSubstr("cannot open"));
  EXPECT_THAT(refusal(dir), HasSubstr("no regular file"));
  EXPECT_THAT(refusal(bytes_of("")), HasSubstr("only 0 bytes"));
  EXPECT_THAT(refusal(bytes_of("1234567")), HasSubstr("only 7 bytes"));
  EXPECT_THAT(refusal(bytes_of(std::string(8, '\xff') + "{}")), HasSubstr("does not fit"));
  EXPECT_THAT(refusal(raw("[]", "")), HasSubstr("no JSON object"));
  EXPECT_THAT(refusal(raw("{", "")), HasSubstr("no JSON object"));
  EXPECT_THAT(refusal(raw(std::string(100000, '['), "")), HasSubstr("no JSON object"));
  EXPECT_THAT(refusal(raw(R"({"w":3})", four)), HasSubstr("\"w\""));
  EXPECT_THAT(refusal(raw(R"({"w":{"shape":[1],"data_offsets":[0,4]}})", four)), HasSubstr("no dtype"));
  EXPECT_THAT(refusal(raw(R"({"w":{"dtype":"F8","shape":[1],"data_offsets":[0,4]}})", four)), HasSubstr("\"F8\""));
  EXPECT_THAT(refusal(raw(R"({"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", four)), HasSubstr("-1"));
  EXPECT_THAT(refusal(raw(R"({"w":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}})", four)), HasSubstr("integer"));
  EXPECT_THAT(refusal(raw(R"({"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", four)), HasSubstr("need 8"));
  EXPECT_THAT(refusal(raw(R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", four)), HasSubstr("[4, 0)"));
  EXPECT_THAT(refusal(raw(R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}})", four)), HasSubstr("truncated"));
  EXPECT_THAT(refusal(raw(R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", four)), HasSubstr("two"));
  // Products that wrap 64 bits to a plausible size.
  EXPECT_THAT(refusal(raw(R"({"w":{"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]}})", four)),
              HasSubstr("too large"));
  EXPECT_THAT(refusal(raw(R"({"w":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]}})", four)),
              HasSubstr("too large"));
  EXPECT_THAT(refusal(raw(R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
                          R"("b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
                          four)),
              HasSubstr("overlap"));
  EXPECT_THAT(refusal(raw(R"({"__metadata__":{"k":1}})", "")), HasSubstr("__metadata__"));
  EXPECT_EQ(refusal(raw(R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  )", four)), "accepted");
}

TEST_F(SafetensorsTest, DamagedFilesNeverCrash) {
  const std::vector<float> values(32, 1.0f);
  write_file(dir / "good", {{"a", DType::f32, {4, 4}, values.data()}, {"b", DType::f32, {16}, values.data()}});
  std::ifstream stream(dir / "good", std::ios::binary);
  const std::string good((std::istreambuf_iterator<char>(stream)), {});
  std::mt19937 random(1);
  for (int round = 0; round < 500; ++round) {
    std::string bad = good.substr(0, round % 2 == 0 ? good.size() : random() % good.size());
    for (int flips = 0; flips < 3 && !bad.empty(); ++flips)
      bad[random() % std::min<std::size_t>(bad.size(), 180)] = static_cast<char>(random());
    try {
      const Checkpoint file = Checkpoint::open_file(bytes_of(bad, "bad"));
      for (const std::string& name : file.names()) {
        const TensorView& view = file.at(name);
        unsigned sum = 0;
        for (std::size_t i = 0; i < view.bytes; ++i) sum += static_cast<unsigned>(view.data[i]);
        EXPECT_LE(sum, 255u * view.bytes);
      }
    } catch (const Error&) {
    }
  }
}

}  // namespace
}  // namespace ht::safetensors
