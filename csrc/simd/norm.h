// Group normalisation and SiLU, a few groups of one sample at a time. Sums are taken in f32 lanes over short runs of
// elements and folded in double, in an order that only the shape decides.
#pragma once

#include "functions.h"

namespace dmd2_fast::DMD2_FAST_ISA {

// The sum of f(elements) over `count` elements, where f takes and returns a Two.
template <typename T, typename F>
double sum_of(const T* x, int64_t count, const F& f) {
  double total = 0.0;
  for (int64_t begin = 0; begin < count; begin += kTile) {
    const int64_t end = begin + kTile < count ? begin + kTile : count;
    Two sums{}, others{};  // an addition takes several cycles: four at a time
    int64_t i = begin;
    for (; i + 2 * kTwo <= end; i += 2 * kTwo) {
      sums = sums + f(load_two(x + i));
      others = others + f(load_two(x + i + kTwo));
    }
    for_twos(i, end, [&](int64_t j, auto n) { sums = sums + keep<T>(f(load_two(x + j, n)), n); });
    sums = sums + others;
    total += sum(sums.a + sums.b);
  }
  return total;
}

template <typename T>
double sum_of(const T* x, int64_t count) {
  return sum_of(x, count, [](Two v) { return v; });
}

template <typename T>
double squares_around(Vector centre, const T* x, int64_t count) {
  return sum_of(x, count, [centre](Two v) {
    const Two distance = v - both(centre);
    return Two{distance.a * distance.a, distance.b * distance.b};
  });
}

inline float inverse_deviation(double variance, double eps) { return (float)(1.0 / __builtin_sqrt(variance + eps)); }

// The gradient in x is scale grad_z + slope (x - mean) + offset, scale = rstd weight.
struct Pull {
  float slope, offset;
};

// From the sums over positions of grad_z and of grad_z (x - mean) rstd, a channel each.
inline Pull pull(const GroupNorm& a, int64_t sample, int64_t group) {
  const int64_t first = group * a.group;
  double through_mean = 0.0, through_variance = 0.0;
  for (int64_t c = first; c < first + a.group; ++c) {
    through_mean += a.weight[c] * a.bias_sums[sample * a.channels + c];
    through_variance += a.weight[c] * a.weight_sums[sample * a.channels + c];
  }
  const double count = (double)(a.group * a.positions), rstd = a.rstd[sample * a.num_groups + group];
  return {(float)(-rstd * rstd * through_variance / count), (float)(-rstd * through_mean / count)};
}

// --- channels first: a group's elements lie together, a channel after the other ---

template <typename T>
void group_norm_silu_first(const GroupNorm& a, int64_t sample, int64_t group) {
  const int64_t count = a.group * a.positions, index = sample * a.num_groups + group;
  const T* x = at<T>(a.x, index * count);
  T* y = at<T>(a.out, index * count);
  const float mean = (float)(sum_of(x, count) / (double)count);
  const Vector centre = all(mean);
  const float rstd = inverse_deviation(squares_around(centre, x, count) / (double)count, a.eps);
  a.mean[index] = mean;
  a.rstd[index] = rstd;
  for (int64_t c = group * a.group; c < (group + 1) * a.group; ++c, x += a.positions, y += a.positions) {
    const Vector scale = all(rstd * a.weight[c]), bias = all(a.bias[c]);
    for_twos(0, a.positions, [&](int64_t i, auto n) {
      const Two z = fused(scale, load_two(x + i, n) - both(centre), both(bias));
      store_two(y + i, Two{silu(z.a), silu(z.b)}, n);
    });
  }
}

// Gradients in z on their way from the first half of backward to the second: f32 in the place of the results, else in
// the scratch, whose channels begin at multiples of kTwo.
template <typename T>
class GradZ {
 public:
  GradZ(float* scratch, T* out, int64_t positions)
      : start_(scratch), out_(out), positions_(positions), padded_((positions + kTwo - 1) / kTwo * kTwo) {}

  template <typename Count>
  void store(int64_t channel, int64_t i, Two x, Count n) const {
    if constexpr (kIsInPlace) {
      store_two(out_ + channel * positions_ + i, x, n);
    } else {
      store_two(start_ + channel * padded_ + i, x);
    }
  }
  template <typename Count>
  Two load(int64_t channel, int64_t i, Count n) const {
    if constexpr (kIsInPlace) {
      return load_two(out_ + channel * positions_ + i, n);
    } else {
      return load_two(start_ + channel * padded_ + i);
    }
  }

 private:
  static constexpr bool kIsInPlace = sizeof(T) == sizeof(float);
  float* start_;
  T* out_;
  int64_t positions_, padded_;
};

template <typename T>
void group_norm_silu_backward_first(const GroupNorm& a, int64_t sample, int64_t group, float* scratch) {
  const int64_t count = a.group * a.positions, index = sample * a.num_groups + group;
  const T *x = at<T>(a.x, index * count), *grad = at<T>(a.grad, index * count);
  T* out = at<T>(a.out, index * count);
  const GradZ<T> grad_z(scratch, out, a.positions);
  const float rstd = a.rstd[index];
  const Vector centre = all(a.mean[index]);
  for (int64_t d = 0; d < a.group; ++d) {
    const int64_t c = group * a.group + d, start = d * a.positions;
    const Vector scale = all(rstd * a.weight[c]), bias = all(a.bias[c]);
    double bias_sum = 0.0, weight_sum = 0.0;
    for (int64_t begin = 0; begin < a.positions; begin += kTile) {
      Two ones{}, distances{};
      for_twos(begin, begin + kTile < a.positions ? begin + kTile : a.positions, [&](int64_t i, auto n) {
        const Two distance = load_two(x + start + i, n) - both(centre), z = fused(scale, distance, both(bias));
        Two slope;
        silu(z.a, &slope.a);
        silu(z.b, &slope.b);
        const Two upstream = load_two(grad + start + i, n), g{upstream.a * slope.a, upstream.b * slope.b};
        grad_z.store(d, i, g, n);
        ones = ones + keep<T>(g, n);
        distances = distances + keep<T>({g.a * distance.a, g.b * distance.b}, n);
      });
      bias_sum += sum(ones.a + ones.b);
      weight_sum += sum(distances.a + distances.b);
    }
    a.bias_sums[sample * a.channels + c] = bias_sum;
    a.weight_sums[sample * a.channels + c] = weight_sum * rstd;
  }
  const Pull pulled = pull(a, sample, group);
  const Vector slope = all(pulled.slope), offset = all(pulled.offset);
  for (int64_t d = 0; d < a.group; ++d) {
    const Vector scale = all(rstd * a.weight[group * a.group + d]);
    const int64_t start = d * a.positions;
    for_twos(0, a.positions, [&](int64_t i, auto n) {
      const Two distance = load_two(x + start + i, n) - both(centre);
      store_two(out + start + i, fused(scale, grad_z.load(d, i, n), fused(slope, distance, both(offset))), n);
    });
  }
}

// --- channels last: a position's channels lie together; the groups' columns of all positions are worked on at once ---

// Rows summed up in f32 before they are folded in double.
constexpr int64_t kRows = 128;

// A row's columns are few cache lines and the next row's are pages away, which no processor foresees: ask for them so many
// rows in advance where they are read for the first time.
constexpr int64_t kRowsAhead = 8;

// What the scratch holds, an entry a column (a channel of the groups), with zeros up to the next multiple of kWidth.
struct Columns {
  Columns(const GroupNorm& a, Groups groups, float* scratch)
      : count(groups.count * a.group),
        padded((count + kWidth - 1) / kWidth * kWidth),
        first(groups.first * a.group),
        offset(groups.sample * a.positions * a.channels + first),
        lanes(scratch), more_lanes(scratch + padded), mean(scratch + 2 * padded), scale(scratch + 3 * padded),
        bias(scratch + 4 * padded), slope(scratch + 5 * padded), shift(scratch + 6 * padded) {
    std::memset(scratch, 0, kColumnArrays * padded * sizeof(float));
  }

  int64_t count, padded, first, offset;
  float *lanes, *more_lanes, *mean, *scale, *bias, *slope, *shift;
};

// f(column, group) for all columns.
template <typename F>
void for_columns(const GroupNorm& a, Groups groups, const F& f) {
  for (int64_t g = 0; g < groups.count; ++g) {
    for (int64_t c = g * a.group; c < (g + 1) * a.group; ++c) {
      f(c, groups.sample * a.num_groups + groups.first + g);
    }
  }
}

inline void set_affine(const GroupNorm& a, Groups groups, const Columns& columns) {
  for_columns(a, groups, [&](int64_t c, int64_t group) {
    columns.mean[c] = a.mean[group];
    columns.scale[c] = a.rstd[group] * a.weight[columns.first + c];
    columns.bias[c] = a.bias[columns.first + c];
  });
}

// statistic[group] += the sum over the group of f(x, column).
template <typename T, typename F>
void add_up(const GroupNorm& a, Groups groups, const Columns& columns, double* totals, const F& f) {
  const int64_t channels = a.channels, count = columns.count;
  float* lanes = columns.lanes;
  for (int64_t begin = 0; begin < a.positions; begin += kRows) {
    const int64_t end = begin + kRows < a.positions ? begin + kRows : a.positions;
    std::memset(lanes, 0, columns.padded * sizeof(float));
    const T* row = at<T>(a.x, columns.offset + begin * channels);
    for (int64_t i = begin; i < end; ++i, row += channels) {
      for (int64_t c = 0; c < count; c += kWidth) {
        __builtin_prefetch(row + kRowsAhead * channels + c);
        store(lanes + c, load(lanes + c) + f(load_up_to(row + c, count - c), c));
      }
    }
    for_columns(a, groups, [&](int64_t c, int64_t) { totals[c / a.group] += lanes[c]; });
  }
}

template <typename T>
void group_norm_silu_last(const GroupNorm& a, Groups groups, float* scratch) {
  const Columns columns(a, groups, scratch);
  const double count = (double)(a.group * a.positions);
  const int64_t index = groups.sample * a.num_groups + groups.first;
  double totals[kMostGroups] = {};
  add_up<T>(a, groups, columns, totals, [](Vector x, int64_t) { return x; });
  for (int64_t g = 0; g < groups.count; ++g) {
    a.mean[index + g] = (float)(totals[g] / count);
    totals[g] = 0.0;
  }
  for_columns(a, groups, [&](int64_t c, int64_t group) { columns.mean[c] = a.mean[group]; });
  const float* mean = columns.mean;
  add_up<T>(a, groups, columns, totals, [mean](Vector x, int64_t c) {
    const Vector distance = x - load(mean + c);
    return distance * distance;
  });
  for (int64_t g = 0; g < groups.count; ++g) {
    a.rstd[index + g] = inverse_deviation(totals[g] / count, a.eps);
  }
  set_affine(a, groups, columns);
  const float *scale = columns.scale, *bias = columns.bias;
  const T* row = at<T>(a.x, columns.offset);
  T* out = at<T>(a.out, columns.offset);
  for (int64_t i = 0; i < a.positions; ++i, row += a.channels, out += a.channels) {
    for (int64_t c = 0; c < columns.count; c += kWidth) {
      const int64_t left = columns.count - c;
      __builtin_prefetch(out + kRowsAhead * a.channels + c, 1);
      store_up_to(out + c, silu(fused(load_up_to(row + c, left) - load(mean + c), load(scale + c), load(bias + c))), left);
    }
  }
}

template <typename T>
void group_norm_silu_backward_last(const GroupNorm& a, Groups groups, float* scratch) {
  const Columns columns(a, groups, scratch);
  set_affine(a, groups, columns);
  const int64_t channels = a.channels, count = columns.count;
  const float *mean = columns.mean, *scale = columns.scale, *bias = columns.bias;
  float *ones = columns.lanes, *distances = columns.more_lanes, *grad_z = scratch + kColumnArrays * columns.padded;
  int64_t padded = columns.padded;
  if constexpr (sizeof(T) == sizeof(float)) {
    grad_z = at<float>(a.out, columns.offset);
    padded = channels;
  }
  double *bias_sums = a.bias_sums + groups.sample * channels + columns.first;
  double *weight_sums = a.weight_sums + groups.sample * channels + columns.first;
  // grad_z and x - mean of one vector.
  const auto step = [=](const T* x, const T* grad, int64_t c, int64_t left, Vector* distance) {
    *distance = load_up_to(x + c, left) - load(mean + c);
    Vector slope;
    silu(fused(*distance, load(scale + c), load(bias + c)), &slope);
    return load_up_to(grad + c, left) * slope;
  };
  for (int64_t c = 0; c < count; ++c) {
    bias_sums[c] = weight_sums[c] = 0.0;
  }
  for (int64_t begin = 0; begin < a.positions; begin += kRows) {
    const int64_t end = begin + kRows < a.positions ? begin + kRows : a.positions;
    std::memset(ones, 0, 2 * columns.padded * sizeof(float));
    for (int64_t i = begin; i < end; ++i) {
      const T *x = at<T>(a.x, columns.offset + i * channels), *grad = at<T>(a.grad, columns.offset + i * channels);
      for (int64_t c = 0; c < count; c += kWidth) {
        __builtin_prefetch(x + kRowsAhead * channels + c);
        __builtin_prefetch(grad + kRowsAhead * channels + c);
        __builtin_prefetch(grad_z + (i + kRowsAhead) * padded + c, 1);
        Vector distance;
        const Vector g = step(x, grad, c, count - c, &distance);
        store_up_to(grad_z + i * padded + c, g, count - c);
        store(ones + c, load(ones + c) + g);
        store(distances + c, load(distances + c) + g * distance);
      }
    }
    for_columns(a, groups, [&](int64_t c, int64_t group) {
      bias_sums[c] += ones[c];
      weight_sums[c] += (double)distances[c] * a.rstd[group];
    });
  }
  float *slope = columns.slope, *shift = columns.shift;
  for (int64_t g = 0; g < groups.count; ++g) {
    const Pull pulled = pull(a, groups.sample, groups.first + g);
    for (int64_t c = g * a.group; c < (g + 1) * a.group; ++c) {
      slope[c] = pulled.slope;
      shift[c] = pulled.offset;
    }
  }
  for (int64_t i = 0; i < a.positions; ++i) {
    const T* x = at<T>(a.x, columns.offset + i * channels);
    T* out = at<T>(a.out, columns.offset + i * channels);
    for (int64_t c = 0; c < count; c += kWidth) {
      const Vector distance = load_up_to(x + c, count - c) - load(mean + c);
      store_up_to(out + c, fused(load_up_to(grad_z + i * padded + c, count - c), load(scale + c), fused(distance, load(slope + c), load(shift + c))), count - c);
    }
  }
}

template <typename T>
void group_norm_silu(const GroupNorm& a, Groups groups, float* scratch) {
  if (a.is_channels_last) {
    return group_norm_silu_last<T>(a, groups, scratch);
  }
  for (int64_t g = groups.first; g < groups.first + groups.count; ++g) {
    group_norm_silu_first<T>(a, groups.sample, g);
  }
}

template <typename T>
void group_norm_silu_backward(const GroupNorm& a, Groups groups, float* scratch) {
  if (a.is_channels_last) {
    return group_norm_silu_backward_last<T>(a, groups, scratch);
  }
  for (int64_t g = groups.first; g < groups.first + groups.count; ++g) {
    group_norm_silu_backward_first<T>(a, groups.sample, g, scratch);
  }
}

}  // namespace dmd2_fast::DMD2_FAST_ISA
