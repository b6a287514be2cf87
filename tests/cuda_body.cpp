// Runs every thread of r1_perturb's CUDA grid on the CPU, one after another: for tests/test_cuda_body.py.
#include <cstddef>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "r1_body.h"

using namespace dmd2_fast;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// The grid from first_block on.
template <typename T, typename NoiseT>
int64_t run(R1Arguments arguments, int64_t first_block) {
  arguments = prepared<T>(arguments);
  const int64_t blocks = arguments.num_samples * arguments.num_tiles;
  for (int64_t block = first_block; block < blocks; ++block) {
    for (int thread = 0; thread < kR1Threads; ++thread) {
      r1_perturb_thread<T, NoiseT>(arguments, block, thread);
    }
  }
  return blocks;
}

template <typename T>
int64_t run_with(int noise_dtype, const R1Arguments& arguments, int64_t first_block) {
  switch (noise_dtype) {
    case 0: return run<T, float>(arguments, first_block);
    case 1: return run<T, BFloat16>(arguments, first_block);
    case 2: return run<T, Half>(arguments, first_block);
    default: return run<T, Keyed>(arguments, first_block);
  }
}

// dtypes: 0 f32, 1 bf16, 2 f16; noise_dtype 3: keyed. Gives the number of blocks.
extern "C" int64_t r1_perturb(int dtype, int noise_dtype, const void* x, const float* std, const void* noise, const int64_t* ids,
                              void* out, int64_t num_samples, int64_t sample_size, uint64_t seed, uint32_t step, uint32_t stream, int64_t first_block) {
  R1Arguments arguments{};
  arguments.x = x;
  arguments.std = std;
  arguments.noise = noise;
  arguments.ids = ids;
  arguments.out = out;
  arguments.num_samples = num_samples;
  arguments.sample_size = sample_size;
  arguments.key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), step, stream};
  switch (dtype) {
    case 0: return run_with<float>(noise_dtype, arguments, first_block);
    case 1: return run_with<BFloat16>(noise_dtype, arguments, first_block);
    default: return run_with<Half>(noise_dtype, arguments, first_block);
  }
}

// What the struct's other description (tests/compiled/test_cuda_r1.py) and the tests' sizes must agree with.
extern "C" void r1_layout(int64_t* out) {
  out[0] = sizeof(R1Arguments);
  out[1] = offsetof(R1Arguments, key);
  out[2] = offsetof(R1Arguments, num_tiles);
  out[3] = kR1Tile<float>;
  out[4] = kR1Tile<Half>;
  out[5] = kR1Threads;
}
