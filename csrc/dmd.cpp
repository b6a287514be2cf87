// The distribution matching loss on the CPU: schemas of dmd2_fast/ops/dmd.py.

#include "images.h"

namespace dmd2_fast {
namespace {

std::tuple<Tensor, Tensor, Tensor> dmd_loss(Tensor x, Tensor x_t, Tensor fake, Tensor teacher, std::optional<Tensor> uncond,
                                            Tensor alpha, Tensor sigma, int64_t prediction_type, double guidance_scale,
                                            std::optional<Tensor> sample_weight, double eps) {
  const Images images({{&x, "x"}, {&x_t, "x_t"}, {&fake, "fake_prediction"}, {&teacher, "teacher_prediction"},
                       {pointer(uncond), "teacher_uncond_prediction"}}, false);
  const int64_t n = images.num_samples(), tiles = images.tiles();
  auto x_t_scale = coefficients(alpha, "alpha", n), prediction_scale = coefficients(sigma, "sigma", n);
  std::vector<X0> x0(n);
  std::vector<float> divisor(n), difference_scale(n);
  for (int64_t i = 0; i < n; ++i) {
    x0[i] = x0_from(prediction_type, x_t_scale[i], prediction_scale[i]);
    x_t_scale[i] = static_cast<float>(x0[i].x_t);
    prediction_scale[i] = static_cast<float>(x0[i].prediction);
    divisor[i] = static_cast<float>(x0[i].divisor);
    difference_scale[i] = static_cast<float>(x0[i].prediction / x0[i].divisor);
  }
  const auto weight = coefficients(sample_weight, "sample_weight", n);
  std::vector<float> absolute(n * tiles), squares(n * tiles);
  Tensor difference = images.output();
  const DmdLoss arguments{.x = images.data(0), .x_t = images.data(1), .fake = images.data(2), .teacher = images.data(3),
                          .uncond = images.data(4), .difference = difference.mutable_data_ptr(),
                          .divisor = divisor.data(), .x_t_scale = x_t_scale.data(), .prediction_scale = prediction_scale.data(),
                          .difference_scale = difference_scale.data(), .guidance = static_cast<float>(guidance_scale),
                          .absolute = absolute.data(), .squares = squares.data(), .size = images.size(), .tiles = tiles};
  images.for_tiles([&](int64_t tile) { kernels().dmd_loss(images.dtype(), arguments, tile); });

  const int64_t shape[] = {n};
  Tensor scale = torch::stable::new_empty(x, {shape, 1}, ScalarType::Float);
  auto* scales = static_cast<float*>(scale.mutable_data_ptr());
  double total = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    double distance = 0.0, square = 0.0;
    for (int64_t tile = i * tiles; tile < (i + 1) * tiles; ++tile) {
      distance += absolute[tile];
      square += squares[tile];
    }
    const double mean = distance / std::abs(x0[i].divisor) / static_cast<double>(images.size());
    const double weighted = weight[i] / (mean + eps);
    scales[i] = static_cast<float>(weighted);
    const double slope = x0[i].prediction / x0[i].divisor * weighted;
    total += square * slope * slope;
  }
  return {scalar(0.5 * total / static_cast<double>(x.numel())), images.finished(difference), scale};
}

Tensor dmd_loss_backward(Tensor grad, Tensor difference, Tensor scale) {
  const Images images({{&difference, "difference"}}, false);
  auto factor = coefficients(scale, "scale", images.num_samples());
  const auto* upstream = static_cast<const float*>(grad.const_data_ptr());
  for (float& value : factor) {
    value *= *upstream / static_cast<float>(difference.numel());
  }
  return images.scaled(factor, difference.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dmd2_fast_cpp, m) {
  m.def("dmd_loss(Tensor x, Tensor x_t, Tensor fake_prediction, Tensor teacher_prediction, Tensor? teacher_uncond_prediction, Tensor alpha, Tensor sigma, int prediction_type, float guidance_scale, Tensor? sample_weight, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("dmd_loss_backward(Tensor grad, Tensor difference, Tensor scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dmd2_fast_cpp, CPU, m) {
  m.impl("dmd_loss", TORCH_BOX(&dmd_loss));
  m.impl("dmd_loss_backward", TORCH_BOX(&dmd_loss_backward));
}

}  // namespace dmd2_fast
