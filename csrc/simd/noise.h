// Noise, and everything that is a per-sample affine function of images and noise.
#pragma once

#include "philox.h"

namespace dmd2_fast::DMD2_FAST_ISA {

enum class Source { kNone, kGiven, kKeyed };

// Writes blocks of kNormals numbers, draw(counter, &low, &high) giving two vectors of them.
template <typename T, typename Draw>
void fill(T* out, Range range, const Draw& draw) {
  Vector low, high;
  int64_t i = range.begin;
  for (; i + kNormals <= range.end; i += kNormals) {
    draw(i / 4, &low, &high);
    store(out + i, low);
    store(out + i + kWidth, high);
  }
  if (const int64_t left = range.end - i; left > 0) {
    draw(i / 4, &low, &high);
    store_up_to(out + i, low, left);
    if (left > kWidth) {
      store_part(out + i + kWidth, high, left - kWidth);
    }
  }
}

template <typename T>
void normal(const Noise& noise, T* out, int64_t size, Range range) {
  const Stream stream(noise, range.sample);
  fill(out + range.sample * size, range, [&](uint64_t counter, Vector* low, Vector* high) {
    normals(stream, counter, low, high);
  });
}

inline void uniform(const Noise& noise, float* out, int64_t size, Range range) {
  const Stream stream(noise, range.sample);
  fill(out + range.sample * size, range, [&](uint64_t counter, Vector* low, Vector* high) {
    const Pairs words = stream.pairs(counter);
    interleave(uniform_of(words.radius), uniform_of(words.angle), low, high);
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
      int64_t i = range.begin;
      for (; i + kNormals <= range.end; i += kNormals) {
        Vector low, high;
        normals(stream, i / 4, &low, &high);
        full(i, low);
        full(i + kWidth, high);
      }
      if (i < range.end) {
        Vector low, high;
        normals(stream, i / 4, &low, &high);
        part(i, low, range.end - i);
        part(i + kWidth, high, range.end - i - kWidth);
      }
    } else {
      int64_t i = range.begin;
      for (; i + kWidth <= range.end; i += kWidth) {
        full(i, kSource == Source::kGiven ? load(noise_ + i) : Vector{});
      }
      const int64_t left = range.end - i;
      if (left > 0) {
        part(i, kSource == Source::kGiven ? load_part(noise_ + i, left) : Vector{}, left);
      }
    }
  }

 private:
  Vector combine(Vector x, Vector y, Vector n) const {
    Vector result = a_ * x;
    if constexpr (kSecond) {
      result = result + b_ * y;
    }
    if constexpr (kSource != Source::kNone) {
      result = result + c_ * n;
    }
    return result;
  }

  void full(int64_t i, Vector n) const {
    const Vector x = load(x_ + i);
    store(out_ + i, combine(x, kSecond ? load(y_ + i) : Vector{}, n));
    if (copy_) {
      std::memcpy(copy_ + i, x_ + i, kWidth * sizeof(T));
    }
    if (drawn_) {
      store(drawn_ + i, n);
    }
  }

  void part(int64_t i, Vector n, int64_t left) const {
    if (left <= 0) {
      return;
    }
    if (left >= kWidth) {
      return full(i, n);
    }
    const Vector x = load_part(x_ + i, left);
    store_part(out_ + i, combine(x, kSecond ? load_part(y_ + i, left) : Vector{}, n), left);
    if (copy_) {
      std::memcpy(copy_ + i, x_ + i, left * sizeof(T));
    }
    if (drawn_) {
      store_part(drawn_ + i, n, left);
    }
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
  for (int64_t i = 0; i < count; i += kWidth) {
    store_up_to(out + i, load_up_to(x + i, count - i) * factor, count - i);
  }
}

}  // namespace dmd2_fast::DMD2_FAST_ISA
