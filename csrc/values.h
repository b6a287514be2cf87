// Tensors of any strides as contiguous f32 values, for operators on parameters and logits, and the way back.
#pragma once

#include "images.h"

namespace dmd2_fast {

// A tensor's values in row-major order as f32: in place where they are that already.
class Values {
 public:
  Values(const Tensor& tensor, const char* name) : held_(row_major(tensor)) {
    check_image(tensor, name);
    if (held_.scalar_type() == ScalarType::Float) {
      data_ = static_cast<const float*>(held_.const_data_ptr());
      return;
    }
    wide_.resize(held_.numel());
    kernels().widen(dtype_of(held_), held_.const_data_ptr(), wide_.data(), held_.numel());
    data_ = wide_.data();
  }

  // One value a channel.
  Values(const Tensor& tensor, const char* name, int64_t size) : Values(tensor, name) {
    check(tensor.dim() == 1 && tensor.size(0) == size, name, " has shape ", shape_text(tensor), ": expected (", size, ",)");
  }

  const float* data() const { return data_; }

 private:
  Tensor held_;
  std::vector<float> wide_;
  const float* data_;
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
