// Noise, and everything that is a per-sample affine function of images and noise.
#pragma once

#include "philox.h"

namespace dmd2_fast::DMD2_FAST_ISA {

enum class Source { kNone, kGiven, kKeyed };

template <typename T>
void normal(const Noise& noise, T* out, int64_t size, Range range) {
  const Stream stream(noise, range.sample);
  out += range.sample * size;
  for_normals<T>(stream, range.begin, range.end, [&](int64_t i, Two n, auto count) { store_two(out + i, n, count); });
}

inline void uniform(const Noise& noise, float* out, int64_t size, Range range) {
  const Stream stream(noise, range.sample);
  out += range.sample * size;
  for_twos(range.begin, range.end, [&](int64_t i, auto count) {
    Pairs words;
    stream.pairs<1>(i / 4, &words);
    store_two(out + i, interleaved({uniform_of(words.radius), uniform_of(words.angle)}), count);
  });
}

template <typename T, bool kSecond, Source kSource>
class AffineKernel {
 public:
  AffineKernel(const Affine& arguments, int64_t sample)
      : x_(at<T>(arguments.x, sample * arguments.size)),
        y_(at<T>(arguments.y, sample * arguments.size)),
        noise_(at<T>(arguments.noise, sample * arguments.size)),
        out_(at<T>(arguments.out, sample * arguments.size)),
        copy_(at<T>(arguments.copy, sample * arguments.size)),
        drawn_(at<T>(arguments.drawn, sample * arguments.size)),
        a_(all(arguments.a[sample])),
        b_(all(kSecond ? arguments.b[sample] : 0.0f)),
        c_(all(kSource != Source::kNone ? arguments.c[sample] : 0.0f)) {}

  void run(const Affine& arguments, Range range) const {
    if constexpr (kSource == Source::kKeyed) {
      const Stream stream(*arguments.key, range.sample);
      for_normals<T>(stream, range.begin, range.end, [&](int64_t i, Two n, auto count) { step(i, n, count); });
    } else if constexpr (kSource == Source::kGiven) {
      for_twos(range.begin, range.end, [&](int64_t i, auto count) { step(i, load_two(noise_ + i, count), count); });
    } else {
      for_twos(range.begin, range.end, [&](int64_t i, auto count) { step(i, Two{}, count); });
    }
  }

 private:
  template <typename Count>
  void step(int64_t i, Two n, Count count) const {
    const Two x = load_two(x_ + i, count);
    if (copy_) {
      store_two(copy_ + i, x, count);
    }
    Two result = a_ * x;
    if constexpr (kSecond) {
      result = fused(b_, load_two(y_ + i, count), result);
    }
    if constexpr (kSource != Source::kNone) {
      result = fused(c_, n, result);
      if (drawn_) {
        store_two(drawn_ + i, n, count);
      }
    }
    store_two(out_ + i, result, count);
  }

  const T *x_, *y_, *noise_;
  T *out_, *copy_, *drawn_;
  Vector a_, b_, c_;
};

template <typename T, bool kSecond>
void affine_of(const Affine& arguments, Range range) {
  if (arguments.key) {
    AffineKernel<T, kSecond, Source::kKeyed>(arguments, range.sample).run(arguments, range);
  } else if (arguments.noise) {
    AffineKernel<T, kSecond, Source::kGiven>(arguments, range.sample).run(arguments, range);
  } else {
    AffineKernel<T, kSecond, Source::kNone>(arguments, range.sample).run(arguments, range);
  }
}

template <typename T>
void affine(const Affine& arguments, Range range) {
  arguments.y ? affine_of<T, true>(arguments, range) : affine_of<T, false>(arguments, range);
}

template <typename T>
void scale(const float* x, float factor, T* out, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    store(out + i, load(x + i) * factor);
  }
  if (i < count) {
    store_part(out + i, load_part(x + i, count - i) * factor, count - i);
  }
}

}  // namespace dmd2_fast::DMD2_FAST_ISA
