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
  return sum_of(x, count, [sign](Vector v) { return softplus(sign * v); });
}

inline void softplus_slope(const float* x, float sign, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    store_up_to(out + i, sign * sigmoid(sign * load_up_to(x + i, count - i)), count - i);
  }
}

template <typename T>
void gan_head(const GanHead& a, int64_t sample) {
  const T* features = at<T>(a.features, sample * a.channels);
  double logit = 0.0;
  Vector products{};
  int64_t held = 0;  // elements in a lane of products
  for (int64_t first = 0, index = sample * a.num_groups; first < a.channels; first += a.group, ++index) {
    const T* x = features + first;
    const float mean = (float)(sum_of(x, a.group, [](Vector v) { return v; }) / (double)a.group);
    const Vector centre = all(mean);
    const double squares = sum_of(x, a.group, [centre](Vector v) { return (v - centre) * (v - centre); });
    a.mean[index] = mean;
    a.rstd[index] = inverse_deviation(squares / (double)a.group, a.eps);
    const Vector rstd = all(a.rstd[index]);
    for (int64_t c = 0; c < a.group; c += kWidth) {
      const int64_t left = a.group - c;
      const Vector scale = rstd * load_up_to(a.norm_weight + first + c, left), bias = load_up_to(a.norm_bias + first + c, left);
      const Vector distance = load_up_to(x + c, left) - centre;
      const Vector product = silu(fused(distance, scale, bias)) * load_up_to(a.proj_weight + first + c, left);
      products += left >= kWidth ? product : keep_first(product, left);
      if (++held == kTile / kWidth) {
        logit += sum(products);
        products = Vector{};
        held = 0;
      }
    }
  }
  a.logits[sample] = (float)(logit + sum(products));
}

// Samples whose gradients are summed up in f32 before they are folded in double.
constexpr int64_t kSamples = 128;

template <typename T>
void gan_head_backward(const GanHead& a, int64_t group, float* scratch) {
  const int64_t width = a.group, first = group * width, num_groups = a.num_groups;
  const int64_t padded = (width + kWidth - 1) / kWidth * kWidth;
  const float *weight = a.norm_weight + first, *bias = a.norm_bias + first, *projection = a.proj_weight + first;
  float *pulls = scratch, *lanes = scratch + padded;
  double* const totals[] = {a.norm_weight_sums + first, a.norm_bias_sums + first, a.proj_weight_sums + first};
  for (double* total : totals) {
    std::memset(total, 0, width * sizeof(double));
  }
  for (int64_t begin = 0; begin < a.num_samples; begin += kSamples) {
    const int64_t end = begin + kSamples < a.num_samples ? begin + kSamples : a.num_samples;
    std::memset(lanes, 0, 3 * padded * sizeof(float));
    for (int64_t n = begin; n < end; ++n) {
      const int64_t index = n * num_groups + group;
      const T* x = at<T>(a.features, n * a.channels + first);
      T* out = at<T>(a.grad_features, n * a.channels + first);
      const Vector centre = all(a.mean[index]), rstd = all(a.rstd[index]), grad = all(a.grad_logits[n]);
      Vector through_mean{}, through_variance{};
      for (int64_t c = 0; c < width; c += kWidth) {
        const int64_t left = width - c;
        const Vector scale = load_up_to(weight + c, left);
        const Vector normalised = (load_up_to(x + c, left) - centre) * rstd;
        Vector slope;
        const Vector activation = silu(fused(normalised, scale, load_up_to(bias + c, left)), &slope);
        const Vector grad_z = grad * load_up_to(projection + c, left) * slope;
        Vector pulled = grad_z * scale, along = pulled * normalised;
        store(pulls + c, pulled);
        store(lanes + c, load(lanes + c) + grad_z * normalised);
        store(lanes + padded + c, load(lanes + padded + c) + grad_z);
        store(lanes + 2 * padded + c, load(lanes + 2 * padded + c) + grad * activation);
        through_mean += left >= kWidth ? pulled : keep_first(pulled, left);
        through_variance += left >= kWidth ? along : keep_first(along, left);
      }
      const Vector offset = all(sum(through_mean) / (float)width), slope = all(sum(through_variance) / (float)width);
      for (int64_t c = 0; c < width; c += kWidth) {
        const int64_t left = width - c;
        const Vector normalised = (load_up_to(x + c, left) - centre) * rstd;
        store_up_to(out + c, rstd * (load(pulls + c) - offset - normalised * slope), left);
      }
    }
    for (int i = 0; i < 3; ++i) {
      for (int64_t c = 0; c < width; ++c) {
        totals[i][c] += lanes[i * padded + c];
      }
    }
  }
}

}  // namespace dmd2_fast::DMD2_FAST_ISA
