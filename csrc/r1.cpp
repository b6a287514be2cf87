// r1_perturb on the CPU: (2N, *) = the batch, then batch + std * n, in f32, rounded once at the store.
// n is a tensor or drawn from the keyed stream of philox.h. Also philox_words, which shows the stream's integers to tests.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>

#include "checks.h"

namespace dmd2_fast {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Elements a thread takes at least: below this, waking another thread costs more than it saves.
constexpr int64_t kGrain = 4096;

struct Sizes {
  int64_t num_samples;
  int64_t sample_size;
};

template <typename T, typename NoiseT>
void perturb_with_noise(const T* x, const float* std, const NoiseT* noise, T* out, Sizes sizes) {
  const int64_t total = sizes.num_samples * sizes.sample_size;
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    std::memcpy(out + begin, x + begin, (end - begin) * sizeof(T));
    int64_t i = begin;
    while (i < end) {  // one sample, or the part of it that this thread has, at a time
      const int64_t sample = i / sizes.sample_size;
      const int64_t stop = std::min(end, (sample + 1) * sizes.sample_size);
      const float scale = std[sample];
      for (; i < stop; ++i) {
        out[total + i] = static_cast<T>(static_cast<float>(x[i]) + scale * static_cast<float>(noise[i]));
      }
    }
  });
}

template <typename T>
void perturb_with_key(const T* x, const float* std, const uint32_t* ids, const NoiseStream& key, T* out, Sizes sizes) {
  const int64_t total = sizes.num_samples * sizes.sample_size;
  const int64_t counters = (sizes.sample_size + 3) / 4;
  torch::stable::parallel_for(0, sizes.num_samples * counters, kGrain / 4, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t sample = group / counters;
      const int64_t counter = group % counters;
      const Normals noise = normals(key, ids[sample], static_cast<uint32_t>(counter));
      const int64_t offset = sample * sizes.sample_size + 4 * counter;
      const int64_t count = std::min<int64_t>(4, sizes.sample_size - 4 * counter);
      for (int64_t i = 0; i < count; ++i) {
        out[offset + i] = x[offset + i];
        out[total + offset + i] = static_cast<T>(static_cast<float>(x[offset + i]) + std[sample] * noise.z[i]);
      }
    }
  });
}

// Calls f with a value of the C++ type of a float dtype.
template <typename F>
void for_dtype(ScalarType dtype, const char* name, const F& f) {
  switch (dtype) {
    case ScalarType::Float: f(float{}); break;
    case ScalarType::BFloat16: f(BFloat16{}); break;
    case ScalarType::Half: f(Half{}); break;
    default: check(false, name, " has an unsupported dtype: the cpp backend takes float32, bfloat16 and float16");
  }
}

void check_inputs(const Tensor& x_t, const Tensor& std, const std::optional<Tensor>& noise, const std::optional<Tensor>& ids) {
  check(x_t.is_cpu() && std.is_cpu(), "x_t and std must be on the CPU");
  check(x_t.dim() >= 1, "x_t has no batch dimension: expected shape (N, *)");
  check(std.scalar_type() == ScalarType::Float, "std has another dtype than float32: expected float32");
  check(std.dim() == 1 && std.size(0) == x_t.size(0), "std has shape ", shape_text(std), ": expected (", x_t.size(0), ",)");
  if (noise.has_value()) {
    check(!ids.has_value(), "both noise and sample_ids were given: sample_ids belong to a key");
    check(noise->is_cpu(), "noise is not on the CPU: expected the device of x_t");
    check(same_shape(*noise, x_t), "noise has shape ", shape_text(*noise), ": expected ", shape_text(x_t));
  }
}

// x_t (N, *) of f32, bf16 or f16, any strides; std (N,) f32; noise like x_t in any of the three, or none: then the stream of
// (seed, step, stream, sample_ids), sample_ids (N,) int64 or 0 .. N - 1. Returns (2N, *) in x_t's dtype, contiguous.
Tensor r1_perturb(Tensor x_t, Tensor std, std::optional<Tensor> noise, int64_t seed, int64_t step, int64_t stream,
                  std::optional<Tensor> sample_ids) {
  check_inputs(x_t, std, noise, sample_ids);
  const Tensor x = torch::stable::contiguous(x_t);
  const Tensor scale = torch::stable::contiguous(std);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const int64_t n = shape[0];
  shape[0] = 2 * n;
  Tensor out = torch::stable::new_empty(x, {shape.data(), shape.size()});
  const Sizes sizes{n, n ? x.numel() / n : 0};
  check(sizes.sample_size <= int64_t{4} << 32, "x_t has ", sizes.sample_size, " elements a sample: the stream has 2^34");
  const float* std_data = scale.const_data_ptr<float>();

  for_dtype(x.scalar_type(), "x_t", [&](auto tag) {
    using T = decltype(tag);
    const T* x_data = static_cast<const T*>(x.const_data_ptr());
    T* out_data = static_cast<T*>(out.mutable_data_ptr());
    if (noise.has_value()) {
      const Tensor contiguous_noise = torch::stable::contiguous(*noise);
      for_dtype(contiguous_noise.scalar_type(), "noise", [&](auto noise_tag) {
        using NoiseT = decltype(noise_tag);
        perturb_with_noise(x_data, std_data, static_cast<const NoiseT*>(contiguous_noise.const_data_ptr()), out_data, sizes);
      });
    } else {
      const std::vector<uint32_t> ids = sample_id_words(sample_ids, n);
      perturb_with_key(x_data, std_data, ids.data(), noise_stream(seed, step, stream), out_data, sizes);
    }
  });
  return out;
}

// (N, num_words) int64: word w of sample n is word w % 4 of counter w / 4.
Tensor philox_words(Tensor sample_ids, int64_t num_words, int64_t seed, int64_t step, int64_t stream) {
  check(num_words >= 0, "num_words is ", num_words, ": expected 0 or more");
  check(sample_ids.dim() == 1, "sample_ids has shape ", shape_text(sample_ids), ": expected (N,)");
  const int64_t n = sample_ids.size(0);
  const std::vector<uint32_t> ids = sample_id_words(sample_ids, n);
  const NoiseStream key = noise_stream(seed, step, stream);
  const std::vector<int64_t> shape{n, num_words};
  Tensor out = torch::stable::new_empty(sample_ids, {shape.data(), shape.size()});
  auto* data = static_cast<int64_t*>(out.mutable_data_ptr());
  for (int64_t sample = 0; sample < n; ++sample) {
    for (int64_t w = 0; w < num_words; ++w) {
      data[sample * num_words + w] = philox4x32(key, ids[sample], static_cast<uint32_t>(w / 4)).w[w % 4];
    }
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dmd2_fast_cpp, m) {
  m.def("r1_perturb(Tensor x_t, Tensor std, Tensor? noise, int seed, int step, int stream, Tensor? sample_ids) -> Tensor");
  m.def("philox_words(Tensor sample_ids, int num_words, int seed, int step, int stream) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dmd2_fast_cpp, CPU, m) {
  m.impl("r1_perturb", TORCH_BOX(&r1_perturb));
  m.impl("philox_words", TORCH_BOX(&philox_words));
}

}  // namespace dmd2_fast
