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
        x_t_scale_(all(arguments.x_t_scale[sample])),
        prediction_scale_(all(arguments.prediction_scale[sample])),
        guidance_(all(arguments.guidance)),
        // x_t must not be looked at where it does not count: 0 times infinity is NaN.
        skips_x_t_(arguments.x_t_scale[sample] == 0.0f) {}

  void run(Range range, float* absolute_sum, float* square_sum) const {
    Vector absolutes{}, squares{};
    int64_t i = range.begin;
    for (; i + kWidth <= range.end; i += kWidth) {
      Vector distance, gap;
      step([i](const T* from) { return load(from + i); }, &distance, &gap);
      store(difference_ + i, prediction_scale_ * gap);
      absolutes += distance;
      squares += gap * gap;
    }
    if (const int64_t left = range.end - i; left > 0) {
      Vector distance, gap;
      step([i, left](const T* from) { return load_part(from + i, left); }, &distance, &gap);
      store_part(difference_ + i, prediction_scale_ * gap, left);
      absolutes += keep_first(distance, left);
      squares += keep_first(gap * gap, left);
    }
    *absolute_sum = sum(absolutes);
    *square_sum = sum(squares);
  }

 private:
  template <typename Load>
  void step(const Load& at, Vector* distance, Vector* gap) const {
    Vector teacher = at(teacher_);
    if constexpr (kGuided) {
      const Vector uncond = at(uncond_);
      teacher = uncond + guidance_ * (teacher - uncond);
    }
    Vector teacher_x0 = prediction_scale_ * teacher;
    if (!skips_x_t_) {
      teacher_x0 += x_t_scale_ * at(x_t_);
    }
    *distance = absolute(at(x_) - teacher_x0);
    *gap = at(fake_) - teacher;
  }

  int64_t offset_;
  const T *x_, *x_t_, *fake_, *teacher_, *uncond_;
  T* difference_;
  Vector x_t_scale_, prediction_scale_, guidance_;
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
    Vector squares{};
    if constexpr (kKeyed) {
      const Stream stream(*arguments.key, range.sample);
      for (int64_t i = range.begin; i < range.end; i += kNormals) {
        Vector low, high;
        normals(stream, i / 4, &low, &high);
        step(i, low, range.end - i, &squares);
        step(i + kWidth, high, range.end - i - kWidth, &squares);
      }
    } else {
      for (int64_t i = range.begin; i < range.end; i += kWidth) {
        const int64_t left = range.end - i;
        step(i, noise_ ? load_up_to(noise_ + i, left) : Vector{}, left, &squares);
      }
    }
    return sum(squares);
  }

 private:
  void step(int64_t i, Vector n, int64_t left, Vector* squares) const {
    if (left <= 0) {
      return;
    }
    Vector target = noise_scale_ * n;
    if (x0_) {
      target = target + x0_scale_ * load_up_to(x0_ + i, left);
    }
    const Vector residual = load_up_to(prediction_ + i, left) - target;
    const Vector weighted = weight_ * residual;
    store_up_to(residual_ + i, weighted, left);
    const Vector square = weighted * residual;
    *squares += left >= kWidth ? square : keep_first(square, left);
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
