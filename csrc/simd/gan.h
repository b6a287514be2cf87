// The softplus losses of logits, and the tail of the GAN head: one sample at a time forward, one group of all samples
// backward, so that the sums over samples need no second pass.
#pragma once

#include "norm.h"

namespace dmd2_fast::DMD2_FAST_ISA {

template <typename T>
void widen(const T* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    store_up_to(out + i, load_up_to(x + i, count - i), count - i);
  }
}

inline double softplus_sum(const float* x, float sign, int64_t count) {
  return sum_of(x, count, [sign](Two v) { return Two{softplus(sign * v.a), softplus(sign * v.b)}; });
}

inline void softplus_slope(const float* x, float sign, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    store_up_to(out + i, sign * sigmoid(sign * load_up_to(x + i, count - i)), count - i);
  }
}

template <typename T>
void gan_head(const GanHead& a, int64_t sample) {
  const T* features = at<T>(a.features, sample * a.channels);
  float *mean = a.mean + sample * a.num_groups, *rstd = a.rstd + sample * a.num_groups;
  const double share = 1.0 / (double)a.group;
  // One statistic of all groups after the other: within a group, each waits for the one before.
  for (int64_t g = 0; g < a.num_groups; ++g) {
    mean[g] = (float)(sum_of(features + g * a.group, a.group) * share);
  }
  for (int64_t g = 0; g < a.num_groups; ++g) {
    rstd[g] = (float)(squares_around(all(mean[g]), features + g * a.group, a.group) * share + a.eps);
  }
  for_vectors(a.num_groups, [&](int64_t g, int64_t left) {
    store_up_to(rstd + g, 1.0f / root(load_up_to(rstd + g, left)), left);
  });
  double logit = 0.0;
  Vector products{};
  int64_t held = 0;  // elements in a lane of products
  for (int64_t g = 0; g < a.num_groups; ++g) {
    const int64_t first = g * a.group;
    const float *weight = a.norm_weight + first, *bias = a.norm_bias + first, *projection = a.proj_weight + first;
    const T* x = features + first;
    const Vector centre = all(mean[g]), inverse = all(rstd[g]);
    for_vectors(a.group, [&](int64_t c, int64_t left) {
      const Vector scale = inverse * load_up_to(weight + c, left);
      const Vector z = fused(load_up_to(x + c, left) - centre, scale, load_up_to(bias + c, left));
      products = fused(silu(z), load_up_to(projection + c, left), products);  // beyond `left`, the projection is zero
      if (++held == kTile / kWidth) {
        logit += sum(products);
        products = Vector{};
        held = 0;
      }
    });
  }
  a.logits[sample] = (float)(logit + sum(products));
}

// The gradients of one group: in its features of all samples, and its channels' parts of the parameters' gradients.
template <typename T>
class GanHeadBackward {
 public:
  GanHeadBackward(const GanHead& a, int64_t group, float* scratch)
      : a_(a),
        group_(group),
        first_(group * a.group),
        width_(a.group),
        padded_((width_ + kWidth - 1) / kWidth * kWidth),
        lanes_(scratch),
        pulls_(scratch + 3 * padded_) {}

  void run(double* totals) {
    for (int64_t i = 0; i < 3 * width_; ++i) {
      totals[i] = 0.0;
    }
    for (int64_t begin = 0; begin < a_.num_samples; begin += kHeadSamples) {
      const int64_t end = begin + kHeadSamples < a_.num_samples ? begin + kHeadSamples : a_.num_samples;
      Vector through_mean[kHeadSamples], through_variance[kHeadSamples];
      std::memset(lanes_, 0, 3 * padded_ * sizeof(float));
      // All samples' sums before the first result: within a sample, one waits for the other.
      for (int64_t n = begin; n < end; ++n) {
        add_up(n, pulls_ + (n - begin) * padded_, &through_mean[n - begin], &through_variance[n - begin]);
      }
      Pull through[kHeadSamples];
      for (int64_t i = 0; i < end - begin; ++i) {
        through[i] = {sum(through_variance[i]) / (float)width_, sum(through_mean[i]) / (float)width_};
      }
      for (int64_t n = begin; n < end; ++n) {
        store_grad(n, pulls_ + (n - begin) * padded_, through[n - begin]);
      }
      for (int64_t i = 0; i < 3; ++i) {
        for (int64_t c = 0; c < width_; ++c) {
          totals[i * width_ + c] += lanes_[i * padded_ + c];
        }
      }
    }
    float* const results[] = {a_.norm_weight_grad + first_, a_.norm_bias_grad + first_, a_.proj_weight_grad + first_};
    for (int64_t i = 0; i < 3; ++i) {
      for (int64_t c = 0; c < width_; ++c) {
        results[i][c] = (float)totals[i * width_ + c];
      }
    }
  }

 private:
  // Stores grad_z weight, and adds up what of it goes through the mean and the variance.
  void add_up(int64_t n, float* pulls, Vector* mean_sum, Vector* variance_sum) const {
    const float *weight = a_.norm_weight + first_, *bias = a_.norm_bias + first_, *projection = a_.proj_weight + first_;
    float *norm_weight = lanes_, *norm_bias = lanes_ + padded_, *proj_weight = lanes_ + 2 * padded_;
    const T* x = at<T>(a_.features, n * a_.channels + first_);
    const Vector mean = all(a_.mean[n * a_.num_groups + group_]), rstd = all(a_.rstd[n * a_.num_groups + group_]);
    const Vector grad = all(a_.grad_logits[n]);
    Vector through_mean{}, through_variance{};
    for_vectors(width_, [&](int64_t c, int64_t left) {
      const Vector scale = load_up_to(weight + c, left), normalised = (load_up_to(x + c, left) - mean) * rstd;
      Vector slope;
      const Vector activation = silu(fused(normalised, scale, load_up_to(bias + c, left)), &slope);
      const Vector grad_z = grad * load_up_to(projection + c, left) * slope, pulled = grad_z * scale;
      store(pulls + c, pulled);
      store(norm_weight + c, fused(grad_z, normalised, load(norm_weight + c)));
      store(norm_bias + c, grad_z + load(norm_bias + c));
      store(proj_weight + c, fused(grad, activation, load(proj_weight + c)));
      through_mean += pulled;  // beyond `left`, weight and projection are zero, and so is this
      through_variance = fused(pulled, normalised, through_variance);
    });
    *mean_sum = through_mean;
    *variance_sum = through_variance;
  }

  void store_grad(int64_t n, const float* pulls, Pull through) const {
    const T* x = at<T>(a_.features, n * a_.channels + first_);
    T* out = at<T>(a_.grad_features, n * a_.channels + first_);
    const Vector mean = all(a_.mean[n * a_.num_groups + group_]), rstd = all(a_.rstd[n * a_.num_groups + group_]);
    const Vector slope = all(through.slope), offset = all(through.offset);
    for_vectors(width_, [&](int64_t c, int64_t left) {
      const Vector normalised = (load_up_to(x + c, left) - mean) * rstd;
      store_up_to(out + c, rstd * (load(pulls + c) - offset - normalised * slope), left);
    });
  }

  const GanHead& a_;
  int64_t group_, first_, width_, padded_;
  float *lanes_, *pulls_;
};

}  // namespace dmd2_fast::DMD2_FAST_ISA
