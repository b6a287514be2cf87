// The R1 perturbation and penalty on the CPU: schemas of dmd2_fast/ops/r1.py.

#include "values.h"

namespace dmd2_fast {
namespace {

// Writes x_t into `copy` and x_t + std n into `perturbed`, both laid out as images.output() is.
void perturb(const Images& images, const Tensor& std, const std::optional<Tensor>& sample_ids, int64_t seed, int64_t step,
             int64_t stream, void* copy, void* perturbed) {
  const int64_t n = images.num_samples();
  const std::vector<float> scale = coefficients(std, "std", n), ones(n, 1.0f);
  const KeyedNoise key(sample_ids, n, seed, step, stream);
  images.affine({.x = images.data(0), .noise = images.data(1), .key = key.get(), .out = perturbed, .copy = copy,
                 .a = ones.data(), .c = scale.data()});
}

std::vector<int64_t> doubled_shape(const Tensor& x_t) {
  std::vector<int64_t> shape(x_t.sizes().begin(), x_t.sizes().end());
  shape[0] *= 2;
  return shape;
}

Tensor r1_perturb(Tensor x_t, Tensor std, std::optional<Tensor> noise, int64_t seed, int64_t step, int64_t stream,
                  std::optional<Tensor> sample_ids) {
  check_noise(noise, sample_ids);
  check(x_t.dim() >= 1, "x_t has no batch dimension: expected shape (N, *)");
  const std::vector<int64_t> shape = doubled_shape(x_t);
  const Tensor x = row_major(x_t);  // the result is contiguous
  std::optional<Tensor> n;
  if (noise.has_value()) {
    n = row_major(*noise);
  }
  const Images images({{&x, "x_t"}, {pointer(n), "noise"}}, sample_ids.has_value());
  Tensor out = torch::stable::new_empty(x_t, {shape.data(), shape.size()});
  const bool is_mixed = noise.has_value() && noise->scalar_type() != x_t.scalar_type();
  Tensor wide = is_mixed ? torch::stable::new_empty(x_t, {shape.data(), shape.size()}, ScalarType::Float) : out;
  auto* data = static_cast<char*>(wide.mutable_data_ptr());
  perturb(images, std, sample_ids, seed, step, stream, data, data + wide.numel() / 2 * wide.element_size());
  if (is_mixed) {
    torch::stable::copy_(out, wide);
  }
  return out;
}

void r1_perturb_out(Tensor x_t, Tensor std, std::optional<Tensor> noise, int64_t seed, int64_t step, int64_t stream,
                    std::optional<Tensor> sample_ids, Tensor out) {
  // Through a result of its own: x_t may lie in `out`, in any way.
  const Tensor result = r1_perturb(x_t, std, noise, seed, step, stream, sample_ids);
  check(same_shape(out, result), "out has shape ", shape_text(out), ": expected ", shape_text(result));
  torch::stable::copy_(out, result);
}

// The sum of the two halves, with the strides of the first.
Tensor r1_perturb_backward(Tensor grad) {
  check(grad.dim() >= 1 && grad.size(0) % 2 == 0, "grad has shape ", shape_text(grad), ": expected (2N, *)");
  const int64_t n = grad.size(0) / 2;
  const Tensor first = torch::stable::narrow(grad, 0, 0, n), second = torch::stable::narrow(grad, 0, n, n);
  const Images images({{&first, "grad"}, {&second, "grad"}}, false);
  const std::vector<float> ones(n, 1.0f);
  Tensor out = images.output();
  images.affine({.x = images.data(0), .y = images.data(1), .out = out.mutable_data_ptr(), .a = ones.data(), .b = ones.data()});
  return images.finished(out);
}

// (perturbed - logits) / std in row-major order, and std of each element.
struct Slopes {
  Slopes(const Tensor& logits, const Tensor& perturbed_logits, const Tensor& std) {
    check(logits.dim() >= 1, "logits has no batch dimension: expected shape (N, *)");
    check(same_shape(logits, perturbed_logits), "perturbed_logits has shape ", shape_text(perturbed_logits), ": expected ",
          shape_text(logits));
    const int64_t n = logits.size(0), size = n ? logits.numel() / n : 0;
    const Values first(logits, "logits"), second(perturbed_logits, "perturbed_logits");
    const std::vector<float> scale = coefficients(std, "std", n);
    for (int64_t i = 0; i < n * size; ++i) {
      stds.push_back(scale[i / size]);
      values.push_back((second.data()[i] - first.data()[i]) / stds.back());
    }
  }
  std::vector<float> values, stds;
};

// Plain loops in one thread: logits are few.
Tensor r1_penalty(Tensor logits, Tensor perturbed_logits, Tensor std) {
  double total = 0.0;
  for (const float slope : Slopes(logits, perturbed_logits, std).values) {
    total += slope * slope;
  }
  return scalar(total / static_cast<double>(logits.numel()));
}

std::tuple<Tensor, Tensor> r1_penalty_backward(Tensor grad, Tensor logits, Tensor perturbed_logits, Tensor std) {
  Slopes slopes(logits, perturbed_logits, std);
  const float factor = *Values(grad, "grad").data() * (2.0f / static_cast<float>(std::max<int64_t>(1, logits.numel())));
  for (size_t i = 0; i < slopes.values.size(); ++i) {
    slopes.values[i] = slopes.values[i] / slopes.stds[i] * factor;
  }
  return {rounded(slopes.values.data(), -1.0f, logits), rounded(slopes.values.data(), 1.0f, perturbed_logits)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dmd2_fast_cpp, m) {
  m.def("r1_perturb(Tensor x_t, Tensor std, Tensor? noise, SymInt seed, SymInt step, SymInt stream, Tensor? sample_ids) -> Tensor");
  m.def("r1_perturb_out(Tensor x_t, Tensor std, Tensor? noise, SymInt seed, SymInt step, SymInt stream, Tensor? sample_ids, Tensor(a!) out) -> ()");
  m.def("r1_perturb_backward(Tensor grad) -> Tensor");
  m.def("r1_penalty(Tensor logits, Tensor perturbed_logits, Tensor std) -> Tensor");
  m.def("r1_penalty_backward(Tensor grad, Tensor logits, Tensor perturbed_logits, Tensor std) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dmd2_fast_cpp, CPU, m) {
  m.impl("r1_perturb", TORCH_BOX(&r1_perturb));
  m.impl("r1_perturb_out", TORCH_BOX(&r1_perturb_out));
  m.impl("r1_perturb_backward", TORCH_BOX(&r1_perturb_backward));
  m.impl("r1_penalty", TORCH_BOX(&r1_penalty));
  m.impl("r1_penalty_backward", TORCH_BOX(&r1_penalty_backward));
}

}  // namespace dmd2_fast
