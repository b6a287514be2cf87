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
  const void *x, *y, *noise;  // images of the same dtype
  const Noise* key;
  void *out, *copy, *drawn;
  const float *a, *b, *c;
  int64_t size;
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

struct Kernels {
  void (*normal)(Dtype, const Noise&, void* out, int64_t size, Range);
  void (*uniform)(const Noise&, float* out, int64_t size, Range);
  void (*affine)(Dtype, const Affine&, Range);
  void (*scale)(Dtype to, const float* x, float factor, void* out, int64_t count);
  void (*dmd_loss)(Dtype, const DmdLoss&, int64_t tile);
  void (*denoising_loss)(Dtype, const DenoisingLoss&, int64_t tile);
};

// Those of the widest instruction set that the machine has.
const Kernels& kernels();
// 512 (AVX-512), 256 (AVX2) or 0 (portable).
int instruction_set();

}  // namespace dmd2_fast
