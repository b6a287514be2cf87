// The adversarial losses on the CPU: schemas of dmd2_fast/ops/gan.py.

#include "values.h"

namespace dmd2_fast {
namespace {

// f(begin, end) over `count` values, in tiles.
template <typename F>
void for_tiles(int64_t count, const F& f) {
  torch::stable::parallel_for(0, (count + kTile - 1) / kTile, kGrain / kTile, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
      f(tile * kTile, std::min((tile + 1) * kTile, count));
    }
  });
}

double mean_softplus(const float* logits, int64_t count, float sign) {
  std::vector<double> sums((count + kTile - 1) / kTile);
  for_tiles(count, [&](int64_t begin, int64_t end) {
    sums[begin / kTile] = kernels().softplus(logits + begin, sign, end - begin);
  });
  double total = 0.0;
  for (const double sum : sums) {
    total += sum;
  }
  return total / static_cast<double>(count);
}

double mean_softplus(const Tensor& logits, const char* name, float sign) {
  const Values values(logits, name);
  return mean_softplus(values.data(), logits.numel(), sign);
}

Tensor mean_softplus_backward(const Tensor& grad, const Tensor& logits, const char* name, float sign) {
  const Values values(logits, name);
  const int64_t count = logits.numel();
  std::vector<float> slopes(count);
  for_tiles(count, [&](int64_t begin, int64_t end) {
    kernels().softplus_slope(values.data() + begin, sign, slopes.data() + begin, end - begin);
  });
  return rounded(slopes.data(), *Values(grad, "grad").data() / static_cast<float>(std::max<int64_t>(count, 1)), logits);
}

Tensor gan_generator_loss(Tensor logits) { return scalar(mean_softplus(logits, "logits", -1.0f)); }

Tensor gan_generator_loss_backward(Tensor grad, Tensor logits) { return mean_softplus_backward(grad, logits, "logits", -1.0f); }

Tensor gan_discriminator_loss(Tensor real_logits, Tensor fake_logits) {
  const double real = mean_softplus(real_logits, "real_logits", -1.0f), fake = mean_softplus(fake_logits, "fake_logits", 1.0f);
  return scalar(real + fake);
}

std::tuple<Tensor, Tensor> gan_discriminator_loss_backward(Tensor grad, Tensor real_logits, Tensor fake_logits) {
  return {mean_softplus_backward(grad, real_logits, "real_logits", -1.0f),
          mean_softplus_backward(grad, fake_logits, "fake_logits", 1.0f)};
}

// The head's parameters as f32, and the shape's part of its arguments.
class Head {
 public:
  Head(const Tensor& features, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& proj_weight,
       const Tensor& proj_bias, int64_t num_groups)
      : features_(row_major(features)),
        norm_weight_(norm_weight, "norm_weight", features_.size(1)),
        norm_bias_(norm_bias, "norm_bias", features_.size(1)),
        proj_weight_(proj_weight, "proj_weight", features_.size(1)),
        proj_bias_(proj_bias, "proj_bias", 1) {
    check_image(features, "features");
    const int64_t channels = features_.size(1);
    check(num_groups >= 1 && channels % num_groups == 0, "num_groups is ", num_groups, ": expected a divisor of ", channels);
    arguments = {};
    arguments.features = features_.const_data_ptr();
    arguments.norm_weight = norm_weight_.data();
    arguments.norm_bias = norm_bias_.data();
    arguments.proj_weight = proj_weight_.data();
    arguments.num_samples = features_.size(0);
    arguments.channels = channels;
    arguments.num_groups = num_groups;
    arguments.group = channels / num_groups;
  }

  float proj_bias() const { return *proj_bias_.data(); }

  GanHead arguments;

 private:
  Tensor features_;
  Values norm_weight_, norm_bias_, proj_weight_, proj_bias_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gan_head_loss(Tensor features, Tensor norm_weight, Tensor norm_bias,
                                                                 Tensor proj_weight, Tensor proj_bias, int64_t num_groups,
                                                                 int64_t sign, double eps) {
  check(features.dim() == 2, "features has shape ", shape_text(features), ": expected (N, C)");
  Head head(features, norm_weight, norm_bias, proj_weight, proj_bias, num_groups);
  const int64_t n = features.size(0);
  Tensor slope = empty_table(n, 1, ScalarType::Float);
  Tensor mean = empty_table(n, num_groups, ScalarType::Float), rstd = empty_table(n, num_groups, ScalarType::Float);
  std::vector<float> values(n);
  GanHead& arguments = head.arguments;
  arguments.mean = static_cast<float*>(mean.mutable_data_ptr());
  arguments.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  arguments.logits = values.data();
  arguments.eps = eps;
  const Dtype dtype = dtype_of(features);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, arguments.channels));
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) {
      kernels().gan_head(dtype, arguments, sample);
      values[sample] += head.proj_bias();
    }
  });
  kernels().softplus_slope(values.data(), static_cast<float>(sign), static_cast<float*>(slope.mutable_data_ptr()), n);
  Tensor logits = empty_table(n, 1, features.scalar_type());
  kernels().scale(dtype, values.data(), 1.0f, logits.mutable_data_ptr(), n);
  return {scalar(mean_softplus(values.data(), n, static_cast<float>(sign))), logits, slope, mean, rstd};
}

// The gradient in each logit, through the loss and from outside; an absent one is zero.
std::vector<float> grad_of_logits(const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_logits,
                                  const Tensor& slope) {
  const int64_t n = slope.numel();
  std::vector<float> result(n);
  if (grad_logits.has_value()) {
    check(grad_logits->numel() == n, "grad_logits has shape ", shape_text(*grad_logits), ": expected (", n, ", 1)");
    const Values values(*grad_logits, "grad_logits");
    std::copy_n(values.data(), n, result.begin());
  }
  if (grad_loss.has_value() && n > 0) {
    const Values slopes(slope, "slope");
    const float factor = *Values(*grad_loss, "grad_loss").data() / static_cast<float>(n);
    for (int64_t i = 0; i < n; ++i) {
      result[i] += slopes.data()[i] * factor;
    }
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gan_head_loss_backward(
    std::optional<Tensor> grad_loss, std::optional<Tensor> grad_logits, Tensor features, Tensor norm_weight, Tensor norm_bias,
    Tensor proj_weight, Tensor proj_bias, Tensor slope, Tensor mean, Tensor rstd) {
  check(features.dim() == 2, "features has shape ", shape_text(features), ": expected (N, C)");
  check(mean.dim() == 2 && mean.size(0) == features.size(0) && same_shape(mean, rstd), "mean has shape ", shape_text(mean),
        ": expected (N, groups), that of rstd");
  check(slope.numel() == features.size(0), "slope has shape ", shape_text(slope), ": expected (N, 1)");
  Head head(features, norm_weight, norm_bias, proj_weight, proj_bias, mean.size(1));
  GanHead& arguments = head.arguments;
  const int64_t group = arguments.group, n = arguments.num_samples;
  const std::vector<float> grads = grad_of_logits(grad_loss, grad_logits, slope);
  const Values means(mean, "mean"), deviations(rstd, "rstd");
  ParameterGrad norm_weight_grad(norm_weight), norm_bias_grad(norm_bias), proj_weight_grad(proj_weight);
  Tensor grad_features = empty_like(features, features.scalar_type());
  Tensor ordered = grad_features.is_contiguous() ? grad_features : torch::stable::new_empty(features, features.sizes());
  arguments.mean = const_cast<float*>(means.data());
  arguments.rstd = const_cast<float*>(deviations.data());
  arguments.grad_logits = grads.data();
  arguments.grad_features = ordered.mutable_data_ptr();
  arguments.norm_weight_grad = norm_weight_grad.data();
  arguments.norm_bias_grad = norm_bias_grad.data();
  arguments.proj_weight_grad = proj_weight_grad.data();
  const Dtype dtype = dtype_of(features);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, n * group));
  torch::stable::parallel_for(0, arguments.num_groups, grain, [&](int64_t begin, int64_t end) {
    const auto scratch = buffer<float>((3 + kHeadSamples) * (group + kColumnPadding));
    const auto totals = buffer<double>(3 * group);
    for (int64_t i = begin; i < end; ++i) {
      kernels().gan_head_backward(dtype, arguments, i, scratch.get(), totals.get());
    }
  });
  if (!grad_features.is_contiguous()) {
    torch::stable::copy_(grad_features, ordered);
  }
  double total = 0.0;
  for (const float grad : grads) {
    total += grad;
  }
  const float bias_grad = static_cast<float>(total);
  return {grad_features, norm_weight_grad.rounded(), norm_bias_grad.rounded(), proj_weight_grad.rounded(),
          rounded(&bias_grad, 1.0f, proj_bias)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dmd2_fast_cpp, m) {
  m.def("gan_generator_loss(Tensor logits) -> Tensor");
  m.def("gan_generator_loss_backward(Tensor grad, Tensor logits) -> Tensor");
  m.def("gan_discriminator_loss(Tensor real_logits, Tensor fake_logits) -> Tensor");
  m.def("gan_discriminator_loss_backward(Tensor grad, Tensor real_logits, Tensor fake_logits) -> (Tensor, Tensor)");
  m.def("gan_head_loss(Tensor features, Tensor norm_weight, Tensor norm_bias, Tensor proj_weight, Tensor proj_bias, int num_groups, int sign, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gan_head_loss_backward(Tensor? grad_loss, Tensor? grad_logits, Tensor features, Tensor norm_weight, Tensor norm_bias, Tensor proj_weight, Tensor proj_bias, Tensor slope, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dmd2_fast_cpp, CPU, m) {
  m.impl("gan_generator_loss", TORCH_BOX(&gan_generator_loss));
  m.impl("gan_generator_loss_backward", TORCH_BOX(&gan_generator_loss_backward));
  m.impl("gan_discriminator_loss", TORCH_BOX(&gan_discriminator_loss));
  m.impl("gan_discriminator_loss_backward", TORCH_BOX(&gan_discriminator_loss_backward));
  m.impl("gan_head_loss", TORCH_BOX(&gan_head_loss));
  m.impl("gan_head_loss_backward", TORCH_BOX(&gan_head_loss_backward));
}

}  // namespace dmd2_fast
