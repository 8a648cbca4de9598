#include "server/tinker_api/body.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <zstd.h>

#include <memory>
#include <random>

#include "server/tinker_api/test_models.h"
#include "tinker_public.pb.h"

namespace ht::tinker_api {
namespace {

using testing::HasSubstr;

std::string compressed(std::string_view text) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  out.resize(ZSTD_compress(out.data(), out.size(), text.data(), text.size(), 3));
  return out;
}

// One frame of `size` zeros, written piece by piece: it declares no content size.
std::string zeros_frame(std::size_t size) {
  const std::unique_ptr<ZSTD_CCtx, std::size_t (*)(ZSTD_CCtx*)> stream(ZSTD_createCCtx(), ZSTD_freeCCtx);
  const std::string zeros(1 << 16, '\0');
  std::string out, piece(ZSTD_CStreamOutSize(), '\0');
  for (std::size_t done = 0; done <= size; done += zeros.size()) {
    const bool last = done + zeros.size() > size;
    ZSTD_inBuffer in{zeros.data(), last ? size - done : zeros.size(), 0};
    for (;;) {
      ZSTD_outBuffer to{piece.data(), piece.size(), 0};
      const std::size_t left = ZSTD_compressStream2(stream.get(), &to, &in, last ? ZSTD_e_end : ZSTD_e_continue);
      out.append(piece, 0, to.pos);
      if (last ? left == 0 : in.pos == in.size) break;
    }
  }
  return out;
}

std::string noise(std::size_t size) {
  std::mt19937 random(5);
  std::string text(size, '\0');
  for (char& c : text) c = static_cast<char>(random() % 7 ? 'a' : random());
  return text;
}

long peak_kib() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss;
}

TEST(DecodeContent, PlainAndZstd) {
  const std::string text = noise(300000);
  EXPECT_EQ(decode_content("", text, 1 << 20), text);
  EXPECT_EQ(decode_content("identity", text, 1 << 20), text);
  EXPECT_EQ(decode_content("zstd", compressed(text), 1 << 20), text);
  EXPECT_EQ(decode_content("zstd", compressed(""), 1 << 20), "");
  EXPECT_EQ(decode_content("zstd", compressed(text) + compressed("more"), 1 << 20), text + "more");
}

TEST(DecodeContent, TheLimitIsExact) {
  const std::string text = noise(100000);
  EXPECT_EQ(decode_content("zstd", compressed(text), text.size()), text);
  EXPECT_THAT(refusal([&] { decode_content("zstd", compressed(text), text.size() - 1); }), HasSubstr("99999"));
  EXPECT_THAT(refusal([&] { decode_content("", text, 99999); }), HasSubstr("100000"));
  EXPECT_THAT(refusal([&] { decode_content("gzip", text, 1 << 20); }), HasSubstr("gzip"));
}

TEST(DecodeContent, ABombStaysWithinTheLimit) {
  const std::string bomb = zeros_frame(std::size_t{2} << 30);
  ASSERT_LT(bomb.size(), 1u << 20);
  const long before = peak_kib();
  EXPECT_THAT(refusal([&] { decode_content("zstd", bomb, 4 << 20); }), HasSubstr("4194304"));
  EXPECT_EQ(decode_head("zstd", bomb, 1000), std::string(1000, '\0'));
  // 4 MiB of output, its copy while it grew, and zstd's window of at most 8 MiB at this level.
  EXPECT_LT(peak_kib() - before, 48 << 10);
}

TEST(DecodeContent, ACutFrameIsRefusedAtEveryByte) {
  const std::string frame = compressed(noise(5000));
  for (std::size_t cut = 0; cut < frame.size(); ++cut) {
    const std::string_view part(frame.data(), cut);
    EXPECT_THAT(refusal([&] { decode_content("zstd", part, 1 << 20); }), HasSubstr("truncated")) << cut;
    EXPECT_LE(decode_head("zstd", part, 1 << 16).size(), 5000u);
  }
}

TEST(DecodeContent, ADamagedFrameEndsAtEveryByte) {
  const std::string text = noise(5000);
  const std::string frame = compressed(text);
  for (std::size_t at = 0; at < frame.size(); ++at) {
    for (const char flip : {'\x01', '\x80', '\xff'}) {
      std::string damaged = frame;
      damaged[at] = static_cast<char>(damaged[at] ^ flip);
      try {
        EXPECT_LE(decode_content("zstd", damaged, 1 << 16).size(), 1u << 16);
      } catch (const Error& error) {
        EXPECT_EQ(error.category(), ErrorCategory::user);
      }
      EXPECT_LE(decode_head("zstd", damaged, 100).size(), 100u);
    }
  }
}

std::string numbered_message(std::int32_t seq_id) {
  tinker_public::ForwardBackwardRequest message;
  message.set_model_id("s:train:0");
  message.set_seq_id(seq_id);
  message.set_loss_fn("cross_entropy");
  message.add_data()->add_model_input()->mutable_encoded_text()->set_tokens("12345678");
  return message.SerializeAsString();
}

TEST(NumberScan, ProtobufCutAnywhere) {
  const std::string bytes = numbered_message(300);
  // Tag and length of model_id with its 9 bytes, then the tag of seq_id and 300 in two bytes.
  constexpr std::size_t needed = 2 + 9 + 1 + 2;
  for (std::size_t cut = 0; cut <= bytes.size(); ++cut) {
    const auto number = scan_protobuf_number(std::string_view(bytes).substr(0, cut));
    ASSERT_EQ(number.has_value(), cut >= needed) << cut;
    if (!number) continue;
    EXPECT_EQ(number->model_id, "s:train:0");
    EXPECT_EQ(number->seq_id, 300);
  }
}

TEST(NumberScan, ProtobufThatHasNone) {
  EXPECT_FALSE(scan_protobuf_number(""));
  EXPECT_FALSE(scan_protobuf_number(numbered_message(0)));
  EXPECT_FALSE(scan_protobuf_number(numbered_message(-1)));
  EXPECT_FALSE(scan_protobuf_number(std::string(64, '\xff')));
  // A length beyond the bytes.
  EXPECT_FALSE(scan_protobuf_number(std::string_view("\x0a\xff\xff\xff\xff\x0f x", 8)));
}

TEST(NumberScan, ProtobufNoiseNeverCrashes) {
  std::mt19937 random(1);
  for (int round = 0; round < 2000; ++round) {
    std::string bytes = numbered_message(7);
    for (int flips = 0; flips < 3; ++flips) bytes[random() % bytes.size()] = static_cast<char>(random());
    const auto number = scan_protobuf_number(bytes);
    EXPECT_TRUE(!number || number->seq_id > 0);
  }
}

TEST(NumberScan, JsonCutAnywhere) {
  const std::string text =
      R"({"adam_params": {"eps": 1e-8}, "model_id" : "s:train:0", "seq_id": 12, "type": "optim_step"})";
  const std::size_t needed = text.find("12,") + 3;
  for (std::size_t cut = 0; cut <= text.size(); ++cut) {
    const auto number = scan_json_number(std::string_view(text).substr(0, cut));
    ASSERT_EQ(number.has_value(), cut >= needed) << cut;
    if (!number) continue;
    EXPECT_EQ(number->model_id, "s:train:0");
    EXPECT_EQ(number->seq_id, 12);
  }
}

TEST(NumberScan, JsonThatHasNone) {
  for (const char* text : {"", "{", R"({"model_id": 5, "seq_id": 3})", R"({"model_id": "m", "seq_id": -3})",
                           R"({"model_id": "m", "seq_id": "3"})", R"({"model_id": "", "seq_id": 3})",
                           R"({"model_id": "m", "seq_id": 99999999999999999999})"}) {
    EXPECT_FALSE(scan_json_number(text)) << text;
  }
}

TEST(Digest, TellsBodiesApart) {
  const std::string text = noise(1001);
  EXPECT_EQ(digest(text), digest(std::string(text)));
  EXPECT_EQ(digest(text).size(), 32u);
  for (std::size_t at = 0; at < text.size(); ++at) {
    std::string other = text;
    other[at] = static_cast<char>(other[at] ^ 1);
    ASSERT_NE(digest(other), digest(text)) << at;
  }
  EXPECT_NE(digest(""), digest(std::string(1, '\0')));
}

}  // namespace
}  // namespace ht::tinker_api
