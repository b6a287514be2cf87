// Group normalisation with SiLU on the CPU: schemas of dmd2_fast/ops/norm.py.

#include "values.h"

namespace dmd2_fast {
namespace {

// Whether a position's channels lie together, positions and samples one after another: channels_last of any rank.
bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  const auto follows = [&](int64_t dimension) {
    const bool result = x.size(dimension) == 1 || x.stride(dimension) == expected;
    expected *= x.size(dimension);
    return result;
  };
  bool result = follows(1);
  for (int64_t i = x.dim() - 1; i >= 2; --i) {
    result = follows(i) && result;
  }
  return follows(0) && result;
}

// x in one of the two orders that the kernels know, and what follows from its shape.
class Grouped {
 public:
  Grouped(const Tensor& x, int64_t num_groups) : x_(x), num_groups_(num_groups) {
    check_image(x, "x");
    check(x.dim() >= 2, "x has shape ", shape_text(x), ": expected (N, C, *)");
    num_samples_ = x.size(0);
    channels_ = x.size(1);
    check(num_groups >= 1 && channels_ % num_groups == 0, "num_groups is ", num_groups, ": expected a divisor of ", channels_);
    for (int64_t i = 2; i < x.dim(); ++i) {
      positions_ *= x.size(i);
    }
    const bool is_contiguous = x.is_contiguous();
    is_last_ = is_contiguous ? positions_ == 1 : is_channels_last(x);
    if (!is_contiguous && !is_last_) {
      x_ = torch::stable::contiguous(x);
    }
  }

  const Tensor& x() const { return x_; }
  int64_t num_samples() const { return num_samples_; }
  int64_t channels() const { return channels_; }

  Tensor output() const { return empty_like(x_, x_.scalar_type()); }

  // A tensor of x's shape in x's order and dtype (autograd has cast a gradient to it).
  Tensor alike(const Tensor& tensor, const char* name) const {
    check(tensor.is_cpu() && same_shape(tensor, x_), name, " has shape ", shape_text(tensor), ": expected ", shape_text(x_));
    if (tensor.scalar_type() == x_.scalar_type() &&
        (x_.is_contiguous() ? tensor.is_contiguous() : is_channels_last(tensor))) {
      return tensor;
    }
    Tensor result = output();
    torch::stable::copy_(result, tensor);
    return result;
  }

  // What a kernel wrote, with the strides of torch.empty_like(first).
  Tensor finished(const Tensor& written, const Tensor& first) const {
    if (x_.const_data_ptr() == first.const_data_ptr()) {
      return written;
    }
    Tensor result = empty_like(first, first.scalar_type());
    torch::stable::copy_(result, written);
    return result;
  }

  GroupNorm arguments() const {
    return {.x = x_.const_data_ptr(), .grad = nullptr, .out = nullptr, .weight = nullptr, .bias = nullptr, .mean = nullptr,
            .rstd = nullptr, .weight_sums = nullptr, .bias_sums = nullptr, .eps = 0.0, .channels = channels_,
            .num_groups = num_groups_, .group = channels_ / num_groups_, .positions = positions_, .is_channels_last = is_last_};
  }

  // f(groups, scratch) over all groups of all samples.
  template <typename F>
  void for_groups(const F& f) const {
    const int64_t group = channels_ / num_groups_, together = is_last_ ? groups_together() : 1;
    const int64_t blocks = (num_groups_ + together - 1) / together, elements = together * group * positions_;
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
    // What gradients need for elements, by channels or by positions, and columns.
    const int64_t columns = together * group, padded = is_last_ ? columns : positions_;
    const int64_t scratch_size = kColumnArrays * (columns + kColumnPadding) + (is_last_ ? positions_ : group) * (padded + kColumnPadding);
    torch::stable::parallel_for(0, num_samples_ * blocks, grain, [&](int64_t begin, int64_t end) {
      const auto scratch = buffer<float>(scratch_size);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block % blocks * together;
        f(Groups{block / blocks, first, std::min(together, num_groups_ - first)}, scratch.get());
      }
    });
  }

 private:
  // With channels last, memory is read best in whole rows, all groups at a time; fewer of them, in whole cache lines, where
  // threads would be without work. Sums are over a group alone, so that results do not depend on this.
  int64_t groups_together() const {
    const int64_t threads = torch::stable::get_num_threads(), bytes = channels_ / num_groups_ * x_.element_size();
    const auto is_shared_out = [&](int64_t count) {
      const int64_t tasks = num_samples_ * ((num_groups_ + count - 1) / count);
      return tasks % threads == 0 || tasks >= 4 * threads;
    };
    int64_t count = std::min(num_groups_, kMostGroups);
    while (count > 1 && !is_shared_out(count)) {
      int64_t half = (count + 1) / 2;
      while (half < count && (half * bytes < 256 || half * bytes % 64 != 0)) {
        ++half;
      }
      if (half == count) {
        break;
      }
      count = half;
    }
    return count;
  }

  Tensor x_;
  int64_t num_groups_, num_samples_ = 0, channels_ = 0, positions_ = 1;
  bool is_last_ = false;
};

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(Tensor x, Tensor weight, Tensor bias, int64_t num_groups, double eps) {
  const Grouped grouped(x, num_groups);
  const Values weights(weight, "weight", grouped.channels()), biases(bias, "bias", grouped.channels());
  Tensor y = grouped.output();
  Tensor mean = empty_table(grouped.num_samples(), num_groups, ScalarType::Float);
  Tensor rstd = empty_table(grouped.num_samples(), num_groups, ScalarType::Float);
  GroupNorm arguments = grouped.arguments();
  arguments.out = y.mutable_data_ptr();
  arguments.weight = weights.data();
  arguments.bias = biases.data();
  arguments.mean = static_cast<float*>(mean.mutable_data_ptr());
  arguments.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  arguments.eps = eps;
  const Dtype dtype = dtype_of(x);
  grouped.for_groups([&](Groups groups, float* scratch) { kernels().group_norm_silu(dtype, arguments, groups, scratch); });
  return {grouped.finished(y, x), mean, rstd};
}

// The sum of all samples' gradients in a parameter, in its dtype.
Tensor parameter_grad(const std::vector<double>& sums, const Tensor& parameter, int64_t num_samples) {
  const int64_t channels = parameter.numel();
  std::vector<double> totals(channels);
  for (int64_t n = 0; n < num_samples; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      totals[c] += sums[n * channels + c];
    }
  }
  ParameterGrad grad(parameter);
  std::copy(totals.begin(), totals.end(), grad.data());
  return grad.rounded();
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean,
                                                            Tensor rstd) {
  check(mean.dim() == 2 && same_shape(mean, rstd), "mean has shape ", shape_text(mean), ": expected (N, groups), that of rstd");
  const Grouped grouped(x, mean.size(1));
  const int64_t channels = grouped.channels(), num_samples = grouped.num_samples();
  check(mean.size(0) == num_samples, "mean has shape ", shape_text(mean), ": expected ", num_samples, " samples");
  const Values weights(weight, "weight", channels), biases(bias, "bias", channels);
  const Tensor upstream = grouped.alike(grad, "grad");
  const Values means(mean, "mean"), deviations(rstd, "rstd");
  std::vector<double> weight_sums(num_samples * channels), bias_sums(num_samples * channels);
  Tensor grad_x = grouped.output();
  GroupNorm arguments = grouped.arguments();
  arguments.grad = upstream.const_data_ptr();
  arguments.out = grad_x.mutable_data_ptr();
  arguments.weight = weights.data();
  arguments.bias = biases.data();
  arguments.mean = const_cast<float*>(means.data());
  arguments.rstd = const_cast<float*>(deviations.data());
  arguments.weight_sums = weight_sums.data();
  arguments.bias_sums = bias_sums.data();
  const Dtype dtype = dtype_of(x);
  if (x.numel() > 0) {
    grouped.for_groups(
        [&](Groups groups, float* scratch) { kernels().group_norm_silu_backward(dtype, arguments, groups, scratch); });
  }
  return {grouped.finished(grad_x, x), parameter_grad(weight_sums, weight, num_samples), parameter_grad(bias_sums, bias, num_samples)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dmd2_fast_cpp, m) {
  m.def("group_norm_silu(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("group_norm_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dmd2_fast_cpp, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward));
}

}  // namespace dmd2_fast
