// r1_perturb on CUDA: (2N, *) = the batch, then batch + std * n, in f32, rounded once at the store. Its arithmetic is in
// r1_body.h. The schema is defined in r1.cpp; CMakeLists.txt builds this where there are nvcc and a CUDA build of torch.

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "checks.h"
#include "r1_body.h"

namespace dmd2_fast {

template <typename T, typename NoiseT>
__global__ void __launch_bounds__(kR1Threads) r1_perturb_kernel(const R1Arguments arguments) {
  r1_perturb_thread<T, NoiseT>(arguments, blockIdx.x, threadIdx.x);
}

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <typename F>
void for_float_dtype(ScalarType dtype, const char* name, const F& f) {
  switch (dtype) {
    case ScalarType::Float: f(float{}); break;
    case ScalarType::BFloat16: f(BFloat16{}); break;
    case ScalarType::Half: f(Half{}); break;
    default: check(false, name, " has an unsupported dtype: the cpp backend takes float32, bfloat16 and float16");
  }
}

bool is_on(const Tensor& tensor, const Tensor& device_of) {
  return tensor.is_cuda() && tensor.get_device_index() == device_of.get_device_index();
}

void check_inputs(const Tensor& x_t, const Tensor& std, const std::optional<Tensor>& noise, const std::optional<Tensor>& ids) {
  check(x_t.dim() >= 1, "x_t has no batch dimension: expected shape (N, *)");
  const int64_t n = x_t.size(0);
  check(is_on(std, x_t), "std is not on the device of x_t");
  check(std.scalar_type() == ScalarType::Float, "std has another dtype than float32: expected float32");
  check(std.dim() == 1 && std.size(0) == n, "std has shape ", shape_text(std), ": expected (", n, ",)");
  if (noise.has_value()) {
    check(!ids.has_value(), "both noise and sample_ids were given: sample_ids belong to a key");
    check(is_on(*noise, x_t), "noise is not on the device of x_t");
    check(same_shape(*noise, x_t), "noise has shape ", shape_text(*noise), ": expected ", shape_text(x_t));
  }
  if (ids.has_value()) {
    check(is_on(*ids, x_t), "sample_ids is not on the device of x_t");
    check(ids->scalar_type() == ScalarType::Long, "sample_ids has another dtype than int64: expected int64");
    check(ids->dim() == 1 && ids->size(0) == n, "sample_ids has shape ", shape_text(*ids), ": expected (", n, ",)");
  }
}

template <typename T, typename NoiseT>
void launch(R1Arguments arguments, cudaStream_t stream) {
  arguments = prepared<T>(arguments);
  const int64_t blocks = arguments.num_samples * arguments.num_tiles;
  check(blocks <= INT32_MAX, "x_t takes ", blocks, " blocks: a grid has 2^31 - 1");
  r1_perturb_kernel<T, NoiseT><<<static_cast<unsigned>(blocks), kR1Threads, 0, stream>>>(arguments);
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, "r1_perturb was not launched: ", cudaGetErrorString(error));
}

// As on the CPU (r1.cpp), with all tensors on one CUDA device, in torch's current stream there. Neither noise nor
// sample_ids: the ids are 0 .. N - 1. Their values are the caller's to check: reading them here would wait for the GPU.
Tensor r1_perturb_cuda(Tensor x_t, Tensor std, std::optional<Tensor> noise, int64_t seed, int64_t step, int64_t stream,
                       std::optional<Tensor> sample_ids) {
  check_inputs(x_t, std, noise, sample_ids);
  const torch::stable::accelerator::DeviceGuard guard(x_t.get_device_index());
  const Tensor x = torch::stable::contiguous(x_t);
  const Tensor scale = torch::stable::contiguous(std);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const int64_t n = shape[0];
  shape[0] = 2 * n;
  Tensor out = torch::stable::new_empty(x, {shape.data(), shape.size()});
  if (out.numel() == 0) {
    return out;
  }
  R1Arguments arguments{};
  arguments.x = x.const_data_ptr();
  arguments.std = scale.const_data_ptr<float>();
  arguments.out = out.mutable_data_ptr();
  arguments.num_samples = n;
  arguments.sample_size = x.numel() / n;
  check(arguments.sample_size <= int64_t{4} << 32, "x_t has ", arguments.sample_size, " elements a sample: the stream has 2^34");
  void* current = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
  const auto cuda_stream = static_cast<cudaStream_t>(current);

  // Held until the launch is queued; torch's allocator keeps their memory for the stream's work after that.
  std::optional<Tensor> held_noise, held_ids;
  for_float_dtype(x.scalar_type(), "x_t", [&](auto tag) {
    using T = decltype(tag);
    if (noise.has_value()) {
      held_noise = torch::stable::contiguous(*noise);
      arguments.noise = held_noise->const_data_ptr();
      for_float_dtype(noise->scalar_type(), "noise", [&](auto noise_tag) { launch<T, decltype(noise_tag)>(arguments, cuda_stream); });
    } else {
      arguments.key = noise_stream(seed, step, stream);
      if (sample_ids.has_value()) {
        held_ids = torch::stable::contiguous(*sample_ids);
        arguments.ids = held_ids->const_data_ptr<int64_t>();
      }
      launch<T, Keyed>(arguments, cuda_stream);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dmd2_fast_cpp, CUDA, m) {
  m.impl("r1_perturb", TORCH_BOX(&r1_perturb_cuda));
}

}  // namespace dmd2_fast
