// What one CUDA thread does in r1_perturb. Plain C++ as well, so that a test can run every thread of a grid on the CPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "philox.h"

namespace dmd2_fast {

// Tensors are contiguous. x, noise and out: N samples of D elements; out first a copy of them, then the perturbed ones.
struct R1Arguments {
  const void* x;
  const float* std;    // (N,)
  const void* noise;   // null with a key
  const int64_t* ids;  // (N,), null: 0 .. N - 1
  void* out;
  int64_t num_samples;  // N
  int64_t sample_size;  // D
  NoiseStream key;
  // From prepared():
  uint32_t num_tiles;   // of a sample, one block each
  uint32_t is_aligned;  // whether every run of x, noise and out is aligned
};

struct Keyed {};  // in the place of the noise's type

constexpr int kR1Threads = 128;  // a block

// Elements of one thread in a row: x moves 128 bits at a time.
template <typename T>
constexpr int kR1Run = 16 / sizeof(T);

// A thread takes this many runs, each as far from the last as a block's threads reach together.
constexpr int kR1Runs = 2;

template <typename T>
constexpr int64_t kR1Tile = int64_t{kR1Threads} * kR1Runs * kR1Run<T>;

// The arguments of a grid of num_samples * num_tiles blocks.
template <typename T>
R1Arguments prepared(R1Arguments arguments) {
  const auto is_aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  arguments.num_tiles = static_cast<uint32_t>((arguments.sample_size + kR1Tile<T> - 1) / kR1Tile<T>);
  arguments.is_aligned = arguments.sample_size % kR1Run<T> == 0 && is_aligned(arguments.x) && is_aligned(arguments.noise) &&
                         is_aligned(arguments.out);
  return arguments;
}

// In one access of up to 128 bits; fewer where a narrower noise goes with x.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Run {
  T values[kCount];
};

template <typename T, int kCount>
DMD2_FAST_HOST_DEVICE inline Run<T, kCount> load_run(const T* from, int count, bool is_aligned) {
  Run<T, kCount> run;
  if (is_aligned) {
    return *reinterpret_cast<const Run<T, kCount>*>(from);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    run.values[i] = i < count ? from[i] : T(0.0f);
  }
  return run;
}

template <typename T, int kCount>
DMD2_FAST_HOST_DEVICE inline void store_run(T* to, const Run<T, kCount>& run, int count, bool is_aligned) {
  if (is_aligned) {
    static_assert(sizeof run == 16);
#ifdef __CUDA_ARCH__
    uint4 bits;
    std::memcpy(&bits, &run, 16);
    __stwb(reinterpret_cast<uint4*>(to), bits);  // nvcc would store the struct in pieces of 32 bits
#else
    *reinterpret_cast<Run<T, kCount>*>(to) = run;
#endif
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count) {
      to[i] = run.values[i];
    }
  }
}

// Thread `thread` of block `block`. NoiseT: the noise's type, or Keyed.
template <typename T, typename NoiseT>
DMD2_FAST_HOST_DEVICE inline void r1_perturb_thread(const R1Arguments& arguments, uint32_t block, uint32_t thread) {
  constexpr int kRun = kR1Run<T>;
  const uint32_t sample = block / arguments.num_tiles;
  const int64_t tile_begin = static_cast<int64_t>(block - sample * arguments.num_tiles) * kR1Tile<T>;
  const int64_t row = sample * arguments.sample_size;
  const float scale = arguments.std[sample];
  const auto id = static_cast<uint32_t>(arguments.ids ? arguments.ids[sample] : sample);
  const T* x = static_cast<const T*>(arguments.x) + row;
  T* copy = static_cast<T*>(arguments.out) + row;
  T* perturbed = copy + arguments.num_samples * arguments.sample_size;
  const bool is_aligned = arguments.is_aligned;

#pragma unroll
  for (int run = 0; run < kR1Runs; ++run) {
    const int64_t element = tile_begin + (run * kR1Threads + thread) * kRun;
    const int64_t left = arguments.sample_size - element;
    if (left <= 0) {
      return;
    }
    const int count = left < kRun ? static_cast<int>(left) : kRun;
    const Run<T, kRun> values = load_run<T, kRun>(x + element, count, is_aligned);
    Run<float, kRun> noise;
    if constexpr (std::is_same_v<NoiseT, Keyed>) {
#pragma unroll
      for (int i = 0; i < kRun; i += 4) {
        const Normals drawn = normals(arguments.key, id, static_cast<uint32_t>((element + i) / 4));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          noise.values[i + j] = drawn.z[j];
        }
      }
    } else {
      const NoiseT* given = static_cast<const NoiseT*>(arguments.noise) + row + element;
      const Run<NoiseT, kRun> loaded = load_run<NoiseT, kRun>(given, count, is_aligned);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        noise.values[i] = static_cast<float>(loaded.values[i]);
      }
    }
    Run<T, kRun> result;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      result.values[i] = static_cast<T>(static_cast<float>(values.values[i]) + scale * noise.values[i]);
    }
    store_run<T, kRun>(copy + element, values, count, is_aligned);
    store_run<T, kRun>(perturbed + element, result, count, is_aligned);
  }
}

}  // namespace dmd2_fast
