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

// A tensor's shape in a message: written only where the message is.
struct ShapeText {
  const Tensor& tensor;
};

inline ShapeText shape_text(const Tensor& tensor) { return {tensor}; }

inline std::ostream& operator<<(std::ostream& out, const ShapeText& shape) {
  out << '(';
  for (int64_t i = 0; i < shape.tensor.dim(); ++i) {
    out << (i ? ", " : "") << shape.tensor.size(i);
  }
  return out << ')';
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

}  // namespace dmd2_fast
