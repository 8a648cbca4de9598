#pragma once

// For tests: an "adapter" of four integers in which a lost, repeated or reordered request shows. The chaos test
// computes with it what the toy worker must have computed.

#include <cstdint>
#include <map>
#include <span>
#include <string>

namespace ht::futures::toy {

inline std::uint64_t mix(std::uint64_t a, std::uint64_t b) {
  std::uint64_t x = a * 0x9e3779b97f4a7c15ULL + b + 0x7f4a7c15ULL;
  x ^= x >> 29;
  x *= 0xbf58476d1ce4e5b9ULL;
  return x ^ (x >> 32);
}

// What fits a double exactly: metrics carry it.
inline double visible(std::uint64_t value) {
  return static_cast<double>(value & ((std::uint64_t{1} << 50) - 1));
}

struct Adapter {
  std::uint64_t w = 0;  // the weights
  std::uint64_t g = 0;  // the pending gradient
  std::uint64_t steps = 0;
  std::uint64_t chain = 0;  // of every micro-batch's composition: differs when a replay composes another one

  static Adapter fresh(std::uint64_t seed) { return {mix(seed, 1), 0, 0, mix(seed, 2)}; }

  void backward(std::span<const std::int32_t> tokens) {
    std::uint64_t hash = w;
    for (const std::int32_t token : tokens) hash = mix(hash, static_cast<std::uint64_t>(token));
    g = mix(g, hash);
  }
  void step(double learning_rate) {
    w = mix(mix(w, g), static_cast<std::uint64_t>(learning_rate * 1e6));
    g = 0;
    ++steps;
    chain = mix(chain, w);
  }
};

inline std::int32_t sampled(std::uint64_t weights, std::uint64_t seed, int position) {
  return static_cast<std::int32_t>(mix(mix(weights, seed), static_cast<std::uint64_t>(position)) % 50000);
}

// Tokens that make the worker do something else.
inline constexpr std::int32_t kRefused = -1;  // the request fails
inline constexpr std::int32_t kDeadly = -2;   // the worker dies

}  // namespace ht::futures::toy
