// The denoising loss on the CPU: schemas of dmd2_fast/ops/denoising.py.

#include "images.h"

namespace dmd2_fast {
namespace {

// target = x0_scale x0 + noise_scale noise.
struct Target {
  float x0_scale, noise_scale;
};

Target target(int64_t prediction_type, float alpha, float sigma) {
  switch (prediction_type) {
    case kEpsilon: return {0.0f, 1.0f};
    case kVPrediction: return {-sigma, alpha};
    case kFlow: return {-1.0f, 1.0f};
    default: return {1.0f, 0.0f};
  }
}

std::tuple<Tensor, Tensor> denoising_loss(Tensor prediction, Tensor x0, Tensor alpha, Tensor sigma, std::optional<Tensor> noise,
                                          int64_t prediction_type, int64_t seed, int64_t step, int64_t stream,
                                          std::optional<Tensor> sample_ids, std::optional<Tensor> sample_weight) {
  const bool uses_noise = prediction_type != kSample;
  if (uses_noise) {
    check_noise(noise, sample_ids);
  }
  const bool is_keyed = uses_noise && sample_ids.has_value();
  const Images images({{&prediction, "prediction"}, {&x0, "x0"}, {uses_noise ? pointer(noise) : nullptr, "noise"}}, is_keyed);
  const int64_t n = images.num_samples(), tiles = images.tiles();
  auto x0_scale = coefficients(alpha, "alpha", n), noise_scale = coefficients(sigma, "sigma", n);
  for (int64_t i = 0; i < n; ++i) {
    const Target scales = target(prediction_type, x0_scale[i], noise_scale[i]);
    x0_scale[i] = scales.x0_scale;
    noise_scale[i] = scales.noise_scale;
  }
  const auto weight = coefficients(sample_weight, "sample_weight", n);
  const KeyedNoise key(is_keyed ? sample_ids : std::nullopt, n, seed, step, stream);
  std::vector<float> squares(n * tiles);
  Tensor residual = images.output(ScalarType::Float);
  const DenoisingLoss arguments{.prediction = images.data(0), .x0 = prediction_type == kEpsilon ? nullptr : images.data(1),
                                .noise = images.data(2), .key = key.get(), .residual = static_cast<float*>(residual.mutable_data_ptr()),
                                .x0_scale = x0_scale.data(), .noise_scale = noise_scale.data(), .weight = weight.data(),
                                .squares = squares.data(), .size = images.size(), .tiles = tiles};
  images.for_tiles([&](int64_t tile) { kernels().denoising_loss(images.dtype(), arguments, tile); });
  double total = 0.0;
  for (const float square : squares) {
    total += square;
  }
  const double mean = total / static_cast<double>(prediction.numel());
  return {scalar(mean), images.finished(residual, ScalarType::Float)};
}

Tensor denoising_loss_backward(Tensor grad, Tensor residual, ScalarType type) {
  check(is_supported(type), "dtype is unsupported: the cpp backend takes float32, bfloat16 and float16");
  const Images images({{&residual, "residual"}}, false);
  const float factor = *static_cast<const float*>(grad.const_data_ptr()) * (2.0f / static_cast<float>(residual.numel()));
  Tensor out = images.output(type);
  const auto* from = static_cast<const float*>(images.data(0));
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  images.for_ranges([&](Range range) {
    const int64_t offset = range.sample * images.size() + range.begin;
    kernels().scale(dtype_of(out), from + offset, factor, to + offset * out.element_size(), range.end - range.begin);
  });
  return images.finished(out, type);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dmd2_fast_cpp, m) {
  m.def("denoising_loss(Tensor prediction, Tensor x0, Tensor alpha, Tensor sigma, Tensor? noise, int prediction_type, SymInt seed, SymInt step, SymInt stream, Tensor? sample_ids, Tensor? sample_weight) -> (Tensor, Tensor)");
  m.def("denoising_loss_backward(Tensor grad, Tensor residual, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dmd2_fast_cpp, CPU, m) {
  m.impl("denoising_loss", TORCH_BOX(&denoising_loss));
  m.impl("denoising_loss_backward", TORCH_BOX(&denoising_loss_backward));
}

}  // namespace dmd2_fast
