// Argument checks and the noise stream's arguments, shared by the operators.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <sstream>
#include <string>
#include <vector>

#include "philox.h"

namespace dmd2_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }
}

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text << (i ? ", " : "") << tensor.size(i);
  }
  text << ')';
  return text.str();
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) {
    return false;
  }
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) {
      return false;
    }
  }
  return true;
}

inline NoiseStream noise_stream(int64_t seed, int64_t step, int64_t stream) {
  constexpr int64_t kWordMax = 0xFFFFFFFFll;
  check(step >= 0 && step <= kWordMax, "step is ", step, ": expected 0 <= step < 2^32");
  check(stream >= 0 && stream <= kWordMax, "stream is ", stream, ": expected 0 <= stream < 2^32");
  const auto bits = static_cast<uint64_t>(seed);  // a seed of 2^63 or more arrives as its two's complement
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), static_cast<uint32_t>(step),
          static_cast<uint32_t>(stream)};
}

// sample_ids as 32-bit words; positions 0 .. n - 1 where none are given.
inline std::vector<uint32_t> sample_id_words(const std::optional<Tensor>& sample_ids, int64_t n) {
  std::vector<uint32_t> words(n);
  if (!sample_ids.has_value()) {
    for (int64_t i = 0; i < n; ++i) {
      words[i] = static_cast<uint32_t>(i);
    }
    return words;
  }
  const Tensor& given = *sample_ids;
  check(given.is_cpu(), "sample_ids is not on the CPU: expected the device of the samples");
  check(given.scalar_type() == ScalarType::Long, "sample_ids has another dtype than int64: expected int64");
  check(given.dim() == 1 && given.size(0) == n, "sample_ids has shape ", shape_text(given), ": expected (", n, ",)");
  const Tensor ids = torch::stable::contiguous(given);
  const auto* values = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    check(values[i] >= 0 && values[i] <= 0xFFFFFFFFll, "sample_ids[", i, "] is ", values[i], ": expected 0 <= id < 2^32");
    words[i] = static_cast<uint32_t>(values[i]);
  }
  return words;
}

}  // namespace dmd2_fast
