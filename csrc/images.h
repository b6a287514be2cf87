// From the operators' tensors to what the kernels take, and back.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <tuple>
#include <utility>

#include "arguments.h"
#include "checks.h"

namespace dmd2_fast {

// Elements a thread takes at least: below this, waking another thread costs more than it saves.
constexpr int64_t kGrain = 16384;

inline bool is_supported(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline Dtype dtype_of(ScalarType type) {
  return type == ScalarType::BFloat16 ? Dtype::kBFloat16 : type == ScalarType::Half ? Dtype::kFloat16 : Dtype::kFloat;
}

inline Dtype dtype_of(const Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

// An uninitialised tensor. Straight from the allocator: the dispatcher's way takes thrice as long, as much as a small
// operator's work.
inline Tensor empty_strided(torch::headeronly::IntHeaderOnlyArrayRef sizes, torch::headeronly::IntHeaderOnlyArrayRef strides,
                            ScalarType type) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                         to<int32_t>(from(type)), aoti_torch_device_type_cpu(), 0, &result));
  return Tensor(result);
}

// torch.empty_like(like, dtype=type): the strides of `like` where it is dense.
inline Tensor empty_like(const Tensor& like, ScalarType type) {
  using torch::stable::detail::from;
  if (like.is_contiguous()) {
    return empty_strided(like.sizes(), like.strides(), type);
  }
  std::array<StableIValue, 6> stack{
      from(like), from(std::optional<ScalarType>(type)), from(std::optional<torch::headeronly::Layout>()),
      from(std::optional<torch::stable::Device>()), from(std::optional<bool>()),
      from(std::optional<torch::headeronly::MemoryFormat>())};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor row_major(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A row-major (rows, columns) tensor.
inline Tensor empty_table(int64_t rows, int64_t columns, ScalarType type) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  return empty_strided({sizes, 2}, {strides, 2}, type);
}

// A 0-d f32 tensor.
inline Tensor scalar(double value) {
  const torch::headeronly::IntHeaderOnlyArrayRef no_dimensions(nullptr, static_cast<size_t>(0));
  Tensor out = empty_strided(no_dimensions, no_dimensions, ScalarType::Float);
  *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(value);
  return out;
}

inline void check_image(const Tensor& tensor, const char* name) {
  check(tensor.is_cpu(), name, " is not on the CPU");
  check(is_supported(tensor.scalar_type()), name, " has an unsupported dtype: the cpp backend takes float32, bfloat16 and float16");
}

// (N,) f32 of any stride, one coefficient a sample.
inline std::vector<float> coefficients(const Tensor& values, const char* name, int64_t num_samples) {
  check(values.is_cpu(), name, " is not on the CPU");
  check(values.scalar_type() == ScalarType::Float, name, " has another dtype than float32: expected float32");
  check(values.dim() == 1 && values.size(0) == num_samples, name, " has shape ", shape_text(values), ": expected (",
        num_samples, ",)");
  const auto* data = static_cast<const float*>(values.const_data_ptr());
  std::vector<float> result(num_samples);
  for (int64_t i = 0; i < num_samples; ++i) {
    result[i] = data[i * values.stride(0)];
  }
  return result;
}

// The same, or ones where there are none.
inline std::vector<float> coefficients(const std::optional<Tensor>& values, const char* name, int64_t num_samples) {
  return values.has_value() ? coefficients(*values, name, num_samples) : std::vector<float>(num_samples, 1.0f);
}

// Noise comes as a tensor or from a key, whose mark is that there are ids.
inline void check_noise(const std::optional<Tensor>& noise, const std::optional<Tensor>& sample_ids) {
  check(noise.has_value() != sample_ids.has_value(), "noise and sample_ids: expected one of the two");
}

// Tensors of one shape (N, *), brought to one dtype and one dense order: the first's own where the others share it, else
// f32 and row-major. Keyed noise is laid out row-major by definition, so with a key the order is that.
class Images {
 public:
  static constexpr int kMost = 5;

  struct Named {
    const Tensor* tensor;  // null: absent
    const char* name;
  };

  Images(std::initializer_list<Named> tensors, bool is_keyed) : first_(*tensors.begin()->tensor) {
    const Named& first = *tensors.begin();
    check(first_.dim() >= 1, first.name, " has no batch dimension: expected shape (N, *)");
    bool is_alike = is_keyed ? first_.is_contiguous() : is_dense();
    type_ = first_.scalar_type();
    for (const Named& named : tensors) {
      if (!named.tensor) {
        continue;
      }
      check_image(*named.tensor, named.name);
      check(same_shape(*named.tensor, first_), named.name, " has shape ", shape_text(*named.tensor), ": expected ", shape_text(first_));
      is_alike = is_alike && same_strides(*named.tensor);
      type_ = named.tensor->scalar_type() == type_ ? type_ : ScalarType::Float;
    }
    is_direct_ = is_alike;
    int i = 0;
    for (const Named& named : tensors) {
      const void*& data = data_[i++];
      data = nullptr;
      if (named.tensor) {
        held_.push_back(prepared(*named.tensor));
        data = held_.back().const_data_ptr();
      }
    }
    num_samples_ = first_.size(0);
    size_ = num_samples_ ? first_.numel() / num_samples_ : 0;
    check(!is_keyed || size_ <= int64_t{4} << 32, "a sample has ", size_, " elements: the noise stream has 2^34");
  }

  const void* data(int i) const { return data_[i]; }
  int64_t num_samples() const { return num_samples_; }
  int64_t size() const { return size_; }
  int64_t tiles() const { return (size_ + kTile - 1) / kTile; }
  Dtype dtype() const { return dtype_of(type_); }

  // For kernels to write into, in their order: like the inputs, or of another dtype.
  Tensor output() const { return output(type_); }
  Tensor output(ScalarType type) const {
    return is_direct_ ? empty_like(first_, type) : torch::stable::new_empty(held_[0], first_.sizes(), type);
  }

  // What a kernel wrote, with the dtype asked for (the first tensor's) and the strides of torch.empty_like.
  Tensor finished(const Tensor& output) const { return finished(output, first_.scalar_type()); }
  Tensor finished(const Tensor& output, ScalarType type) const {
    if (is_direct_ && output.scalar_type() == type) {
      return output;
    }
    Tensor result = empty_like(first_, type);
    torch::stable::copy_(result, output);
    return result;
  }

  // Runs the affine kernel over all samples; the size is this batch's.
  void affine(Affine arguments) const {
    arguments.size = size_;
    for_ranges([&](Range range) { kernels().affine(dtype(), arguments, range); });
  }

  // The first tensor times a factor for each sample, with that tensor's dtype or another.
  Tensor scaled(const std::vector<float>& factor, ScalarType type) const {
    Tensor out = output();
    affine({.x = data(0), .out = out.mutable_data_ptr(), .a = factor.data()});
    return finished(out, type);
  }

  // f(range) over all samples, in pieces that begin at multiples of kTile.
  template <typename F>
  void for_ranges(const F& f) const {
    for_tiles([&](int64_t tile) {
      const int64_t sample = tile / tiles(), begin = tile % tiles() * kTile;
      f(Range{sample, begin, std::min(begin + kTile, size_)});
    });
  }

  // f(tile) over all samples' tiles.
  template <typename F>
  void for_tiles(const F& f) const {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, std::min(kTile, size_)));
    torch::stable::parallel_for(0, num_samples_ * tiles(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        f(tile);
      }
    });
  }

 private:
  // Whether samples lie one after another, each without gaps, in whatever order of its own dimensions.
  bool is_dense() const {
    if (first_.is_contiguous()) {
      return true;
    }
    const int64_t dims = first_.dim();
    std::vector<std::pair<int64_t, int64_t>> inner;  // (stride, size)
    for (int64_t i = 1; i < dims; ++i) {
      if (first_.size(i) != 1) {
        inner.emplace_back(first_.stride(i), first_.size(i));
      }
    }
    std::sort(inner.begin(), inner.end());
    int64_t expected = 1;
    for (const auto& [stride, size] : inner) {
      if (stride != expected) {
        return false;
      }
      expected *= size;
    }
    return first_.size(0) == 1 || first_.stride(0) == expected;
  }

  bool same_strides(const Tensor& tensor) const {
    if (first_.is_contiguous() && tensor.is_contiguous()) {
      return true;
    }
    for (int64_t i = 0; i < first_.dim(); ++i) {
      if (first_.size(i) != 1 && tensor.stride(i) != first_.stride(i)) {
        return false;
      }
    }
    return true;
  }

  Tensor prepared(const Tensor& tensor) const {
    const Tensor ordered = is_direct_ ? tensor : row_major(tensor);
    return ordered.scalar_type() == type_ ? ordered : torch::stable::to(ordered, type_);
  }

  const Tensor first_;
  std::vector<Tensor> held_;  // keeps copies alive
  std::array<const void*, kMost> data_;
  ScalarType type_;
  bool is_direct_;
  int64_t num_samples_, size_;
};

// The stream of a key at the samples of a batch, for kernels; holds the ids.
class KeyedNoise {
 public:
  KeyedNoise(const std::optional<Tensor>& sample_ids, int64_t num_samples, int64_t seed, int64_t step, int64_t stream) {
    if (!sample_ids.has_value()) {
      return;
    }
    check(sample_ids->is_cpu(), "sample_ids is not on the CPU: expected the device of the samples");
    check(sample_ids->scalar_type() == ScalarType::Long, "sample_ids has another dtype than int64: expected int64");
    check(sample_ids->dim() == 1 && sample_ids->size(0) == num_samples, "sample_ids has shape ", shape_text(*sample_ids),
          ": expected (", num_samples, ",)");
    ids_ = row_major(*sample_ids);
    const NoiseStream words = noise_stream(seed, step, stream);
    noise_ = {ids_->const_data_ptr<int64_t>(), words.seed_low, words.seed_high, words.step, words.stream};
    for (int64_t i = 0; i < num_samples; ++i) {
      check(noise_.ids[i] >> 32 == 0, "sample_ids[", i, "] is ", noise_.ids[i], ": expected 0 <= id < 2^32");
    }
  }

  const Noise* get() const { return ids_.has_value() ? &noise_ : nullptr; }

 private:
  std::optional<Tensor> ids_;
  Noise noise_{};
};

// x0 = (x_t * first + prediction * second) / divisor, per sample; dmd2_fast/ops/noise.py has the table.
struct X0 {
  double x_t, prediction, divisor;
};

inline X0 x0_from(int64_t prediction_type, double alpha, double sigma) {
  check(prediction_type >= kEpsilon && prediction_type <= kFlow, "prediction_type is ", prediction_type, ": expected 0 to 3");
  switch (prediction_type) {
    case kEpsilon: return {1.0, -sigma, alpha};
    case kVPrediction: return {alpha, -sigma, alpha * alpha + sigma * sigma};
    case kFlow: return {1.0, -sigma, alpha + sigma};
    default: return {0.0, 1.0, 1.0};
  }
}

inline const Tensor* pointer(const std::optional<Tensor>& tensor) { return tensor.has_value() ? &*tensor : nullptr; }

}  // namespace dmd2_fast
