// The noise stream of docs/design.md: Philox4x32-10 (Salmon et al., 2011), counter = (element / 4, sample id, step, stream),
// key = the low and high word of the 64-bit seed. The words equal those of every other backend bit for bit.
// Plain scalar code for the CPU and, through nvcc, for CUDA.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DMD2_FAST_HOST_DEVICE __host__ __device__
#else
#define DMD2_FAST_HOST_DEVICE
#endif

namespace dmd2_fast {

struct Words {
  uint32_t w[4];
};

struct Normals {
  float z[4];
};

// The part of a draw that is the same for all samples and elements of a call.
struct NoiseStream {
  uint32_t seed_low;
  uint32_t seed_high;
  uint32_t step;
  uint32_t stream;
};

DMD2_FAST_HOST_DEVICE inline Words philox4x32(const NoiseStream& key, uint32_t sample_id, uint32_t counter) {
  uint32_t c0 = counter, c1 = sample_id, c2 = key.step, c3 = key.stream;
  uint32_t k0 = key.seed_low, k1 = key.seed_high;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// In (0, 1]. The product is exact, so this rounds once, as fma(w, 2^-32, 2^-33) does.
DMD2_FAST_HOST_DEVICE inline float uniform_from_word(uint32_t word) {
  return static_cast<float>(word) * 0x1p-32f + 0x1p-33f;
}

// Box-Muller. The angle comes from the word read as signed, so that |angle| <= pi, where sin and cos are cheapest.
DMD2_FAST_HOST_DEVICE inline void normal_pair(uint32_t radius_word, uint32_t angle_word, float* out) {
  constexpr float kTwoPiOver2To32 = 1.4629180792671596e-09f;
  const float u = uniform_from_word(radius_word);
  const float angle = static_cast<float>(static_cast<int32_t>(angle_word)) * kTwoPiOver2To32;
#ifdef __CUDA_ARCH__
  // The hardware's own functions, good to 2^-20 for |angle| <= pi. At u = 1 a logarithm that is not exactly 0 must not
  // give the root of a negative number.
  constexpr float kMinus2Ln2 = -1.3862943611198906f;
  float radius;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(radius) : "f"(fmaxf(kMinus2Ln2 * __log2f(u), 0.0f)));
  out[0] = radius * __cosf(angle);
  out[1] = radius * __sinf(angle);
#else
  const float radius = std::sqrt(-2.0f * std::log(u));
  out[0] = radius * std::cos(angle);
  out[1] = radius * std::sin(angle);
#endif
}

// Normals 4 * counter .. 4 * counter + 3 of one sample.
DMD2_FAST_HOST_DEVICE inline Normals normals(const NoiseStream& key, uint32_t sample_id, uint32_t counter) {
  const Words words = philox4x32(key, sample_id, counter);
  Normals result;
  normal_pair(words.w[0], words.w[1], result.z);
  normal_pair(words.w[2], words.w[3], result.z + 2);
  return result;
}

}  // namespace dmd2_fast
