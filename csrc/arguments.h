// What the operators hand to the kernels of simd/: plain pointers and sizes, and one table of kernels an instruction set.
// N samples of `size` elements, each tensor dense in the same order; f32, bf16 and f16 by Dtype, arithmetic in f32.
#pragma once

#include <cstdint>

namespace dmd2_fast {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
enum class Dtype { kFloat, kBFloat16, kFloat16 };

enum PredictionType : int { kEpsilon, kSample, kVPrediction, kFlow };

// A keyed noise stream at the samples of a batch: sample n has the id ids[n].
struct Noise {
  const int64_t* ids;
  uint32_t seed_low, seed_high, step, stream;
};

// Elements of one sample that a kernel call works on. Sums are kept by tile, so that their order never depends on threads.
constexpr int64_t kTile = 4096;

struct Range {
  int64_t sample, begin, end;
};

// out = per-sample affine function of up to two tensors and noise: a * x + b * y + c * n, each (N,) coefficient an f32.
// y and noise may be absent. copy: where x goes unchanged, or null. drawn: where the noise goes, or null.
struct Affine {
  const void *x = nullptr, *y = nullptr, *noise = nullptr;  // images of the same dtype
  const Noise* key = nullptr;
  void *out = nullptr, *copy = nullptr, *drawn = nullptr;
  const float *a = nullptr, *b = nullptr, *c = nullptr;
  int64_t size = 0;
};

struct DmdLoss {
  const void *x, *x_t, *fake, *teacher, *uncond;  // uncond may be null
  void* difference;
  // (N,) each: divisor (x - T_x0) = divisor x - (x_t_scale x_t + prediction_scale T), whose factors are exact but for the
  // divisor's, and F_x0 - T_x0 = difference_scale (F - T).
  const float *divisor, *x_t_scale, *prediction_scale, *difference_scale;
  float guidance;
  float *absolute, *squares;  // sums of divisor |x - T_x0| and of (F - T)^2, one a tile
  int64_t size, tiles;        // tiles a sample
};

struct DenoisingLoss {
  const void *prediction, *x0, *noise;
  const Noise* key;
  float* residual;
  const float *x0_scale, *noise_scale, *weight;  // (N,): target = first x0 + second noise
  float* squares;
  int64_t size, tiles;
};

// Groups of consecutive channels of one sample, worked on together: kMostGroups at most.
constexpr int64_t kMostGroups = 64;
// Scratch, in floats: so many for each of their channels and of some more (a vector's lanes), and for gradients with
// channels first one an element.
constexpr int64_t kColumnArrays = 7, kColumnPadding = 32;

struct Groups {
  int64_t sample, first, count;
};

// z = (x - mean) rstd weight + bias, y = silu(z); mean and rstd over a group's channels and positions.
struct GroupNorm {
  const void *x, *grad;  // grad: backward alone
  void* out;             // y, or the gradient in x
  const float *weight, *bias;
  float *mean, *rstd;                  // (N, groups): results of forward, arguments of backward
  double *weight_sums, *bias_sums;     // (N, channels), backward: the sums of a sample's gradients in weight and bias
  double eps;
  int64_t channels, num_groups, group, positions;  // of a sample; channels of a group; positions of a channel
  bool is_channels_last;
};

// Samples whose gradients in the head's parameters are summed up in f32 before they are folded in double. Backward's
// scratch: 3 + kHeadSamples floats for each of a group's channels and kColumnPadding more, 3 doubles for each channel.
constexpr int64_t kHeadSamples = 16;

// logit = proj_weight . silu(group_norm(features)) + proj_bias, features (N, channels).
struct GanHead {
  const void* features;
  const float *norm_weight, *norm_bias, *proj_weight;
  float *mean, *rstd;        // (N, groups): results of forward, arguments of backward
  float* logits;             // (N,), forward, less proj_bias
  const float* grad_logits;  // (N,), backward
  void* grad_features;
  float *norm_weight_grad, *norm_bias_grad, *proj_weight_grad;  // (channels,)
  double eps;
  int64_t num_samples, channels, num_groups, group;
};

struct Kernels {
  void (*normal)(Dtype, const Noise&, void* out, int64_t size, Range);
  void (*uniform)(const Noise&, float* out, int64_t size, Range);
  void (*affine)(Dtype, const Affine&, Range);
  void (*scale)(Dtype to, const float* x, float factor, void* out, int64_t count);
  void (*dmd_loss)(Dtype, const DmdLoss&, int64_t tile);
  void (*denoising_loss)(Dtype, const DenoisingLoss&, int64_t tile);
  void (*widen)(Dtype from, const void* x, float* out, int64_t count);
  // The sum of softplus(sign x); its derivative sign sigmoid(sign x).
  double (*softplus)(const float* x, float sign, int64_t count);
  void (*softplus_slope)(const float* x, float sign, float* out, int64_t count);
  void (*group_norm_silu)(Dtype, const GroupNorm&, Groups, float* scratch);
  void (*group_norm_silu_backward)(Dtype, const GroupNorm&, Groups, float* scratch);
  void (*gan_head)(Dtype, const GanHead&, int64_t sample);
  void (*gan_head_backward)(Dtype, const GanHead&, int64_t group, float* scratch, double* totals);
};

// Those of the widest instruction set that the machine has.
const Kernels& kernels();
// 512 (AVX-512), 256 (AVX2) or 0 (portable).
int instruction_set();

}  // namespace dmd2_fast
