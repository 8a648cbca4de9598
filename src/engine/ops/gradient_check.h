#pragma once

// For tests: an op's float32 results against a slow float64 reference and its finite differences.

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>

namespace ht::engine {

// A fixed pseudo-random normal tensor.
inline at::Tensor test_tensor(at::IntArrayRef shape, std::uint64_t seed, double scale = 1.0) {
  at::Generator generator = at::globalContext().defaultGenerator(at::kCPU).clone();
  generator.set_current_seed(seed);
  return at::randn(shape, generator, at::kFloat) * scale;
}

inline double relative_error(const at::Tensor& actual, const at::Tensor& expected) {
  const at::Tensor a = actual.to(at::kDouble), e = expected.to(at::kDouble);
  return ((a - e).norm() / (e.norm() + 1e-30)).item<double>();
}

// Central differences of loss(x) in float64.
inline at::Tensor finite_differences(const std::function<at::Tensor(const at::Tensor&)>& loss, const at::Tensor& x) {
  at::Tensor point = x.to(at::kDouble).contiguous().clone();
  at::Tensor gradient = at::empty_like(point);
  double* p = point.data_ptr<double>();
  double* g = gradient.data_ptr<double>();
  for (std::int64_t i = 0; i < point.numel(); ++i) {
    const double value = p[i], step = 1e-5;
    p[i] = value + step;
    const double up = loss(point).item<double>();
    p[i] = value - step;
    const double down = loss(point).item<double>();
    p[i] = value;
    g[i] = (up - down) / (2 * step);
  }
  return gradient;
}

inline void expect_close(const at::Tensor& actual, const at::Tensor& expected, const std::string& what,
                         double tolerance = 2e-6) {
  ASSERT_EQ(actual.sizes(), expected.sizes()) << what;
  EXPECT_LT(relative_error(actual, expected), tolerance) << what;
}

inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return at::equal(a, b);
}

}  // namespace ht::engine
