// The two losses over images, one tile of one sample at a time: what the backward pass needs, and the tile's sums.
#pragma once

#include "philox.h"

namespace dmd2_fast::DMD2_FAST_ISA {

// The tile's sample, and the elements of it.
inline Range tile_range(int64_t tile, int64_t tiles, int64_t size) {
  const int64_t sample = tile / tiles, begin = (tile % tiles) * kTile;
  return {sample, begin, begin + kTile < size ? begin + kTile : size};
}

template <typename T, bool kGuided>
class DmdKernel {
 public:
  DmdKernel(const DmdLoss& arguments, int64_t sample)
      : offset_(sample * arguments.size),
        x_(at<T>(arguments.x, offset_)),
        x_t_(at<T>(arguments.x_t, offset_)),
        fake_(at<T>(arguments.fake, offset_)),
        teacher_(at<T>(arguments.teacher, offset_)),
        uncond_(at<T>(arguments.uncond, offset_)),
        difference_(at<T>(arguments.difference, offset_)),
        divisor_(all(arguments.divisor[sample])),
        x_t_scale_(all(arguments.x_t_scale[sample])),
        difference_scale_(all(arguments.difference_scale[sample])),
        prediction_scale_(all(arguments.prediction_scale[sample])),
        guidance_(all(arguments.guidance)),
        // x_t must not be looked at where it does not count: 0 times infinity is NaN.
        skips_x_t_(arguments.x_t_scale[sample] == 0.0f) {}

  void run(Range range, float* absolute_sum, float* square_sum) const {
    Two absolutes{}, squares{};
    for_twos(range.begin, range.end, [&](int64_t i, auto count) {
      Two teacher = load_two(teacher_ + i, count);
      if constexpr (kGuided) {
        const Two uncond = load_two(uncond_ + i, count);
        teacher = fused(guidance_, teacher - uncond, uncond);
      }
      Two teacher_x0 = prediction_scale_ * teacher;  // times the divisor
      if (!skips_x_t_) {
        teacher_x0 = fused(x_t_scale_, load_two(x_t_ + i, count), teacher_x0);
      }
      const Two gap = load_two(fake_ + i, count) - teacher;
      store_two(difference_ + i, difference_scale_ * gap, count);
      absolutes = absolutes + keep<T>(absolute(divisor_ * load_two(x_ + i, count) - teacher_x0), count);
      squares = squares + keep<T>({gap.a * gap.a, gap.b * gap.b}, count);
    });
    *absolute_sum = sum(absolutes.a + absolutes.b);
    *square_sum = sum(squares.a + squares.b);
  }

 private:
  int64_t offset_;
  const T *x_, *x_t_, *fake_, *teacher_, *uncond_;
  T* difference_;
  Vector divisor_, x_t_scale_, difference_scale_, prediction_scale_, guidance_;
  bool skips_x_t_;
};

template <typename T>
void dmd_loss(const DmdLoss& arguments, int64_t tile) {
  const Range range = tile_range(tile, arguments.tiles, arguments.size);
  float *absolute = arguments.absolute + tile, *squares = arguments.squares + tile;
  if (arguments.uncond) {
    DmdKernel<T, true>(arguments, range.sample).run(range, absolute, squares);
  } else {
    DmdKernel<T, false>(arguments, range.sample).run(range, absolute, squares);
  }
}

template <typename T, bool kKeyed>
class DenoisingKernel {
 public:
  DenoisingKernel(const DenoisingLoss& arguments, int64_t sample)
      : offset_(sample * arguments.size),
        prediction_(at<T>(arguments.prediction, offset_)),
        x0_(at<T>(arguments.x0, offset_)),
        noise_(at<T>(arguments.noise, offset_)),
        residual_(arguments.residual + offset_),
        x0_scale_(all(arguments.x0_scale[sample])),
        noise_scale_(all(arguments.noise_scale[sample])),
        weight_(all(arguments.weight[sample])) {}

  float run(const DenoisingLoss& arguments, Range range) const {
    Two squares{};
    if constexpr (kKeyed) {
      const Stream stream(*arguments.key, range.sample);
      for_normals<T>(stream, range.begin, range.end, [&](int64_t i, Two n, auto count) { step(i, n, count, &squares); });
    } else {
      for_twos(range.begin, range.end, [&](int64_t i, auto count) {
        step(i, noise_ ? load_two(noise_ + i, count) : Two{}, count, &squares);
      });
    }
    return sum(squares.a + squares.b);
  }

 private:
  template <typename Count>
  void step(int64_t i, Two n, Count count, Two* squares) const {
    Two target = noise_scale_ * n;
    if (x0_) {
      target = target + x0_scale_ * load_two(x0_ + i, count);
    }
    const Two residual = load_two(prediction_ + i, count) - target;
    const Two weighted = weight_ * residual;
    store_two(residual_ + i, kIsByParity<T> ? interleaved(weighted) : weighted, count);
    *squares = *squares + keep<T>({weighted.a * residual.a, weighted.b * residual.b}, count);
  }

  int64_t offset_;
  const T *prediction_, *x0_, *noise_;
  float* residual_;
  Vector x0_scale_, noise_scale_, weight_;
};

template <typename T>
void denoising_loss(const DenoisingLoss& arguments, int64_t tile) {
  const Range range = tile_range(tile, arguments.tiles, arguments.size);
  arguments.squares[tile] = arguments.key
                                ? DenoisingKernel<T, true>(arguments, range.sample).run(arguments, range)
                                : DenoisingKernel<T, false>(arguments, range.sample).run(arguments, range);
}

}  // namespace dmd2_fast::DMD2_FAST_ISA
