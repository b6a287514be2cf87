// Noise, noise injection and its inverse on the CPU: schemas of dmd2_fast/ops/noise.py and random.py.

#include "images.h"

namespace dmd2_fast {
namespace {

Tensor philox(const Tensor& sample_ids, const std::vector<int64_t>& shape, int64_t seed, int64_t step, int64_t stream,
              ScalarType type, bool is_uniform) {
  check(sample_ids.dim() == 1, "sample_ids has shape ", shape_text(sample_ids), ": expected (N,)");
  check(is_supported(type), "dtype is unsupported: the cpp backend takes float32, bfloat16 and float16");
  const int64_t n = sample_ids.size(0);
  std::vector<int64_t> sizes{n};
  sizes.insert(sizes.end(), shape.begin(), shape.end());
  const KeyedNoise noise(sample_ids, n, seed, step, stream);
  Tensor out = torch::stable::new_empty(sample_ids, {sizes.data(), sizes.size()}, type);
  if (out.numel() == 0) {
    return out;
  }
  const Images images({{&out, "out"}}, true);
  void* data = out.mutable_data_ptr();
  images.for_ranges([&](Range range) {
    if (is_uniform) {
      kernels().uniform(*noise.get(), static_cast<float*>(data), images.size(), range);
    } else {
      kernels().normal(dtype_of(out), *noise.get(), data, images.size(), range);
    }
  });
  return out;
}

Tensor philox_normal(Tensor sample_ids, std::vector<int64_t> shape, int64_t seed, int64_t step, int64_t stream, ScalarType type) {
  return philox(sample_ids, shape, seed, step, stream, type, false);
}

Tensor philox_uniform(Tensor sample_ids, std::vector<int64_t> shape, int64_t seed, int64_t step, int64_t stream) {
  return philox(sample_ids, shape, seed, step, stream, ScalarType::Float, true);
}

// (N, num_words) int64: word w of sample n is word w % 4 of counter w / 4. Shows the stream's integers to tests.
Tensor philox_words(Tensor sample_ids, int64_t num_words, int64_t seed, int64_t step, int64_t stream) {
  check(num_words >= 0, "num_words is ", num_words, ": expected 0 or more");
  check(sample_ids.dim() == 1, "sample_ids has shape ", shape_text(sample_ids), ": expected (N,)");
  const int64_t n = sample_ids.size(0);
  const KeyedNoise noise(sample_ids, n, seed, step, stream);
  const std::vector<int64_t> shape{n, num_words};
  Tensor out = torch::stable::new_empty(sample_ids, {shape.data(), shape.size()});
  auto* data = static_cast<int64_t*>(out.mutable_data_ptr());
  const NoiseStream key = noise_stream(seed, step, stream);
  for (int64_t i = 0; i < n * num_words; ++i) {
    const int64_t w = i % num_words;
    data[i] = philox4x32(key, static_cast<uint32_t>(noise.get()->ids[i / num_words]), static_cast<uint32_t>(w / 4)).w[w % 4];
  }
  return out;
}

// alpha x0 + sigma n, and n itself where it is asked for.
std::vector<Tensor> noised(const Tensor& x0, const Tensor& alpha, const Tensor& sigma, const std::optional<Tensor>& noise,
                           int64_t seed, int64_t step, int64_t stream, const std::optional<Tensor>& sample_ids, bool wants_noise) {
  check_noise(noise, sample_ids);
  const Images images({{&x0, "x0"}, {pointer(noise), "noise"}}, sample_ids.has_value());
  const int64_t n = images.num_samples();
  const auto a = coefficients(alpha, "alpha", n), c = coefficients(sigma, "sigma", n);
  const KeyedNoise key(sample_ids, n, seed, step, stream);
  Tensor out = images.output();
  std::vector<Tensor> outputs{out};
  if (wants_noise) {
    outputs.push_back(images.output());
  }
  images.affine({.x = images.data(0), .noise = images.data(1), .key = key.get(), .out = out.mutable_data_ptr(),
                 .drawn = wants_noise ? outputs[1].mutable_data_ptr() : nullptr, .a = a.data(), .c = c.data()});
  for (Tensor& output : outputs) {
    output = images.finished(output);
  }
  return outputs;
}

Tensor add_noise(Tensor x0, Tensor alpha, Tensor sigma, std::optional<Tensor> noise, int64_t seed, int64_t step, int64_t stream,
                 std::optional<Tensor> sample_ids) {
  return noised(x0, alpha, sigma, noise, seed, step, stream, sample_ids, false)[0];
}

std::tuple<Tensor, Tensor> add_noise_drawing(Tensor x0, Tensor alpha, Tensor sigma, int64_t seed, int64_t step, int64_t stream,
                                             Tensor sample_ids) {
  auto outputs = noised(x0, alpha, sigma, std::nullopt, seed, step, stream, sample_ids, true);
  return {outputs[0], outputs[1]};
}

Tensor add_noise_backward(Tensor grad, Tensor alpha) {
  const Images images({{&grad, "grad"}}, false);
  return images.scaled(coefficients(alpha, "alpha", images.num_samples()), grad.scalar_type());
}

// Where a step of sampling goes from x0: next_alpha x0 + next_sigma n.
struct Next {
  const Tensor &alpha, &sigma;
  const std::optional<Tensor>&noise, &sample_ids;
  int64_t seed, step, stream;
};

// x0 from a prediction, and what becomes of it next, if anything does.
Tensor predicted(const Tensor& x_t, const Tensor& prediction, const Tensor& alpha, const Tensor& sigma, int64_t prediction_type,
                 const Next* next) {
  const Tensor* noise = next ? pointer(next->noise) : nullptr;
  const bool is_keyed = next && next->sample_ids.has_value();
  const Images images({{&x_t, "x_t"}, {&prediction, "prediction"}, {noise, "noise"}}, is_keyed);
  const int64_t n = images.num_samples();
  auto a = coefficients(alpha, "alpha", n), b = coefficients(sigma, "sigma", n);
  const std::vector<float> scale = next ? coefficients(next->alpha, "next_alpha", n) : std::vector<float>(n, 1.0f);
  const std::vector<float> c = next ? coefficients(next->sigma, "next_sigma", n) : std::vector<float>(n, 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    const X0 x0 = x0_from(prediction_type, a[i], b[i]);
    const bool is_lacking = !noise && !is_keyed && c[i] != 0.0f;  // noise is due and there is none
    a[i] = static_cast<float>(scale[i] * x0.x_t / x0.divisor);
    b[i] = is_lacking ? NAN : static_cast<float>(scale[i] * x0.prediction / x0.divisor);
  }
  std::optional<KeyedNoise> key;
  if (is_keyed) {
    key.emplace(next->sample_ids, n, next->seed, next->step, next->stream);
  }
  // x_t does not count where the prediction is x0 itself: it only gives dtype and strides.
  const bool uses_x_t = prediction_type != kSample;
  Tensor out = images.output();
  images.affine({.x = images.data(uses_x_t ? 0 : 1), .y = uses_x_t ? images.data(1) : nullptr, .noise = images.data(2),
                 .key = key ? key->get() : nullptr, .out = out.mutable_data_ptr(), .a = uses_x_t ? a.data() : b.data(),
                 .b = b.data(), .c = c.data()});
  return images.finished(out);
}

Tensor predict_x0(Tensor x_t, Tensor prediction, Tensor alpha, Tensor sigma, int64_t prediction_type) {
  return predicted(x_t, prediction, alpha, sigma, prediction_type, nullptr);
}

Tensor renoise(Tensor x_t, Tensor prediction, Tensor alpha, Tensor sigma, Tensor next_alpha, Tensor next_sigma,
               std::optional<Tensor> noise, int64_t prediction_type, int64_t seed, int64_t step, int64_t stream,
               std::optional<Tensor> sample_ids) {
  const Next next{next_alpha, next_sigma, noise, sample_ids, seed, step, stream};
  return predicted(x_t, prediction, alpha, sigma, prediction_type, &next);
}

// Gradients in x_t and prediction of scale * x0, each in the dtype asked for; empty where that is none.
std::tuple<Tensor, Tensor> predict_x0_backward(Tensor grad, Tensor alpha, Tensor sigma, std::optional<Tensor> scale,
                                               int64_t prediction_type, std::optional<ScalarType> x_t_type,
                                               std::optional<ScalarType> prediction_type_of_grad) {
  const Images images({{&grad, "grad"}}, false);
  const int64_t n = images.num_samples();
  auto a = coefficients(alpha, "alpha", n), b = coefficients(sigma, "sigma", n);
  const auto factor = coefficients(scale, "scale", n);
  for (int64_t i = 0; i < n; ++i) {
    const X0 x0 = x0_from(prediction_type, a[i], b[i]);
    a[i] = static_cast<float>(factor[i] * x0.x_t / x0.divisor);
    b[i] = static_cast<float>(factor[i] * x0.prediction / x0.divisor);
  }
  const auto result = [&](const std::vector<float>& slope, std::optional<ScalarType> type) {
    if (!type.has_value()) {
      const int64_t none = 0;
      return torch::stable::new_empty(grad, {&none, 1});
    }
    if (*type == grad.scalar_type()) {
      return images.scaled(slope, *type);
    }
    const Tensor wide = torch::stable::to(grad, ScalarType::Float);  // so that the result is rounded once
    return Images({{&wide, "grad"}}, false).scaled(slope, *type);
  };
  return {result(a, x_t_type), result(b, prediction_type_of_grad)};
}

}  // namespace

// 512 (AVX-512), 256 (AVX2) or 0 (the compiler's baseline): what the kernels of this process use.
int64_t instruction_set_in_use() { return instruction_set(); }

STABLE_TORCH_LIBRARY_FRAGMENT(dmd2_fast_cpp, m) {
  m.def("instruction_set() -> int");
  m.def("philox_words(Tensor sample_ids, int num_words, int seed, int step, int stream) -> Tensor");
  m.def("philox_normal(Tensor sample_ids, SymInt[] sample_shape, SymInt seed, SymInt step, SymInt stream, ScalarType dtype) -> Tensor");
  m.def("philox_uniform(Tensor sample_ids, SymInt[] sample_shape, SymInt seed, SymInt step, SymInt stream) -> Tensor");
  m.def("add_noise(Tensor x0, Tensor alpha, Tensor sigma, Tensor? noise, SymInt seed, SymInt step, SymInt stream, Tensor? sample_ids) -> Tensor");
  m.def("add_noise_drawing(Tensor x0, Tensor alpha, Tensor sigma, SymInt seed, SymInt step, SymInt stream, Tensor sample_ids) -> (Tensor, Tensor)");
  m.def("add_noise_backward(Tensor grad, Tensor alpha) -> Tensor");
  m.def("predict_x0(Tensor x_t, Tensor prediction, Tensor alpha, Tensor sigma, int prediction_type) -> Tensor");
  m.def("predict_x0_backward(Tensor grad, Tensor alpha, Tensor sigma, Tensor? scale, int prediction_type, ScalarType? x_t_dtype, ScalarType? prediction_dtype) -> (Tensor, Tensor)");
  m.def("renoise(Tensor x_t, Tensor prediction, Tensor alpha, Tensor sigma, Tensor next_alpha, Tensor next_sigma, Tensor? noise, int prediction_type, SymInt seed, SymInt step, SymInt stream, Tensor? sample_ids) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dmd2_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set_in_use));
}

STABLE_TORCH_LIBRARY_IMPL(dmd2_fast_cpp, CPU, m) {
  m.impl("philox_words", TORCH_BOX(&philox_words));
  m.impl("philox_normal", TORCH_BOX(&philox_normal));
  m.impl("philox_uniform", TORCH_BOX(&philox_uniform));
  m.impl("add_noise", TORCH_BOX(&add_noise));
  m.impl("add_noise_drawing", TORCH_BOX(&add_noise_drawing));
  m.impl("add_noise_backward", TORCH_BOX(&add_noise_backward));
  m.impl("predict_x0", TORCH_BOX(&predict_x0));
  m.impl("predict_x0_backward", TORCH_BOX(&predict_x0_backward));
  m.impl("renoise", TORCH_BOX(&renoise));
}

}  // namespace dmd2_fast
