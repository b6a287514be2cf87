// Tensors of any strides as contiguous f32 values, for operators on parameters and logits, and the way back.
#pragma once

#include <memory>

#include "images.h"

namespace dmd2_fast {

// An uninitialised buffer.
template <typename T>
std::unique_ptr<T[]> buffer(int64_t size) {
  return std::make_unique_for_overwrite<T[]>(size);
}

// A tensor's values in row-major order as f32: in place where they are that already.
class Values {
 public:
  Values(const Tensor& tensor, const char* name) : held_(row_major(tensor)) {
    check_image(tensor, name);
    if (held_.scalar_type() == ScalarType::Float) {
      data_ = static_cast<const float*>(held_.const_data_ptr());
      return;
    }
    wide_ = buffer<float>(held_.numel());
    kernels().widen(dtype_of(held_), held_.const_data_ptr(), wide_.get(), held_.numel());
    data_ = wide_.get();
  }

  // A parameter's, `size` of them.
  Values(const Tensor& tensor, const char* name, int64_t size) : Values(tensor, name) {
    check(tensor.numel() == size, name, " has shape ", shape_text(tensor), ": expected ", size, " elements");
  }

  const float* data() const { return data_; }

 private:
  Tensor held_;
  std::unique_ptr<float[]> wide_;
  const float* data_;
};

// The gradient in a contiguous parameter, written as f32 and rounded to its dtype at the end.
class ParameterGrad {
 public:
  explicit ParameterGrad(const Tensor& parameter) : result_(empty_like(parameter, parameter.scalar_type())) {
    if (result_.scalar_type() != ScalarType::Float) {
      wide_ = buffer<float>(result_.numel());
    }
  }

  float* data() { return wide_ ? wide_.get() : static_cast<float*>(result_.mutable_data_ptr()); }

  Tensor rounded() {
    if (wide_) {
      kernels().scale(dtype_of(result_), wide_.get(), 1.0f, result_.mutable_data_ptr(), result_.numel());
    }
    return result_;
  }

 private:
  Tensor result_;
  std::unique_ptr<float[]> wide_;
};

// Row-major f32 values times a factor, with the dtype of `like` and the strides of torch.empty_like.
inline Tensor rounded(const float* values, float factor, const Tensor& like) {
  Tensor result = empty_like(like, like.scalar_type());
  if (result.is_contiguous()) {
    kernels().scale(dtype_of(like), values, factor, result.mutable_data_ptr(), like.numel());
    return result;
  }
  Tensor ordered = torch::stable::new_empty(like, like.sizes());
  kernels().scale(dtype_of(like), values, factor, ordered.mutable_data_ptr(), like.numel());
  torch::stable::copy_(result, ordered);
  return result;
}

}  // namespace dmd2_fast
