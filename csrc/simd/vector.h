// Vectors of one instruction set, for kernels.cpp, which is compiled once for each: a GCC/Clang vector type, and the few
// operations that the compiler does not find by itself.
//
// Nothing of torch or the standard library's templates may be used in this folder: the linker keeps one copy of an inline
// function, and that could be the one compiled for an instruction set that the machine lacks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../arguments.h"

#if defined(__AVX512F__)
#define DMD2_FAST_ISA avx512
#define DMD2_FAST_BYTES 64
#elif defined(__AVX2__)
#define DMD2_FAST_ISA avx2
#define DMD2_FAST_BYTES 32
#else
#define DMD2_FAST_ISA portable
#define DMD2_FAST_BYTES 16
#endif

namespace dmd2_fast::DMD2_FAST_ISA {

// f32 lanes of a vector, and vectors of as many lanes.
constexpr int kWidth = DMD2_FAST_BYTES / 4;
typedef float Vector __attribute__((vector_size(DMD2_FAST_BYTES)));
typedef int32_t Ints __attribute__((vector_size(DMD2_FAST_BYTES)));
typedef uint32_t Words __attribute__((vector_size(DMD2_FAST_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(DMD2_FAST_BYTES / 2)));
// 32-bit words in 64-bit lanes, for products of 64 bits: half as many.
typedef uint64_t Wide __attribute__((vector_size(DMD2_FAST_BYTES)));

inline Vector all(float value) { return value - Vector{}; }

// a * b + c, rounded once where the instruction set can. Elsewhere twice: use it where either will do.
inline Vector fused(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline Vector root(Vector x) {
#if defined(__AVX512F__)
  return (Vector)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vector)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (Vector)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kWidth; ++i) {
    x[i] = __builtin_sqrtf(x[i]);
  }
  return x;
#endif
}

// The 64-bit products of the low words of each lane.
inline Wide wide_product(Wide a, Wide b) {
#if defined(__AVX512F__)
  return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

inline Vector absolute(Vector x) { return (Vector)((Words)x & 0x7FFFFFFFu); }

// a where the mask is all ones, b where it is zero.
inline Vector select(Ints mask, Vector a, Vector b) { return mask ? a : b; }

// The sum of the lanes, halves upon halves.
inline float sum(Vector x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX2__)
  const __m128 quarter = _mm256_castps256_ps128((__m256)x) + _mm256_extractf128_ps((__m256)x, 1);
  const __m128 pair = quarter + _mm_movehl_ps(quarter, quarter);
  return pair[0] + pair[1];
#else
  float lanes[kWidth];
  std::memcpy(lanes, &x, sizeof lanes);
  for (int width = kWidth / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      lanes[i] += lanes[i + width];
    }
  }
  return lanes[0];
#endif
}

// --- loads and stores: T is float, BFloat16 or Float16 ---

inline Vector widen(Halves bits, BFloat16) { return (Vector)(__builtin_convertvector(bits, Words) << 16); }

// To nearest, ties to even, in the high half of each word; what is in the low half does not count. A NaN stays one.
inline Words rounded_to_bf16(Vector x) {
  const Words bits = (Words)x;
  return x == x ? bits + 0x7FFFu + ((bits >> 16) & 1u) : bits | 0x400000u;
}

inline Halves narrow(Vector x, BFloat16) { return __builtin_convertvector(rounded_to_bf16(x) >> 16, Halves); }

#if defined(__AVX512F__)
inline Vector widen(Halves bits, Float16) { return (Vector)_mm512_cvtph_ps((__m256i)bits); }
inline Halves narrow(Vector x, Float16) { return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__AVX2__)
inline Vector widen(Halves bits, Float16) { return (Vector)_mm256_cvtph_ps((__m128i)bits); }
inline Halves narrow(Vector x, Float16) { return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
inline Vector widen(Halves bits, Float16) {
  const Words h = __builtin_convertvector(bits, Words);
  const Words sign = (h & 0x8000u) << 16;
  // The exponent of f16 read as one of f32 is 112 too small; a product mends it, for subnormals too.
  const Vector scaled = (Vector)((h & 0x7FFFu) << 13) * 0x1p112f;
  const Words magnitude = (h & 0x7C00u) == 0x7C00u ? (Words)scaled | 0x7F800000u : (Words)scaled;
  return (Vector)(magnitude | sign);
}
inline Halves narrow(Vector x, Float16) {
  const Words sign = ((Words)x >> 16) & 0x8000u;
  const Words magnitude = (Words)x & 0x7FFFFFFFu;
  // Normal: rebase the exponent and round the 13 bits that go. Subnormal: the sum with 1/2 lets the adder round.
  const Words normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const Words small = (Words)((Vector)magnitude + 0.5f) - 0x3F000000u;
  Words h = magnitude < 0x38800000u ? small : normal;
  h = magnitude >= 0x477FF000u ? h * 0u + 0x7C00u : h;
  h = magnitude > 0x7F800000u ? (magnitude >> 13 & 0x3FFu) | 0x7E00u : h;
  return __builtin_convertvector(h | sign, Halves);
}
#endif

// Element `offset` of an untyped tensor; null stays null.
template <typename T>
const T* at(const void* start, int64_t offset) {
  return start ? static_cast<const T*>(start) + offset : nullptr;
}
template <typename T>
T* at(void* start, int64_t offset) {
  return start ? static_cast<T*>(start) + offset : nullptr;
}

inline Vector load(const float* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <typename T>
inline Vector load(const T* from) {
  Halves bits;
  std::memcpy(&bits, from, sizeof bits);
  return widen(bits, T{});
}

inline void store(float* to, Vector x) { std::memcpy(to, &x, sizeof x); }

template <typename T>
inline void store(T* to, Vector x) {
  const Halves bits = narrow(x, T{});
  std::memcpy(to, &bits, sizeof bits);
}

// The first `count` lanes, 0 < count <= kWidth; the other lanes of a load are zero.
#if defined(__AVX512F__)
inline uint16_t mask_of(int64_t count) { return (uint16_t)((1u << count) - 1u); }
inline Vector load_part(const float* from, int64_t count) { return (Vector)_mm512_maskz_loadu_ps(mask_of(count), from); }
inline void store_part(float* to, Vector x, int64_t count) { _mm512_mask_storeu_ps(to, mask_of(count), (__m512)x); }
template <typename T>
inline Vector load_part(const T* from, int64_t count) {
  return widen((Halves)_mm256_maskz_loadu_epi16(mask_of(count), from), T{});
}
template <typename T>
inline void store_part(T* to, Vector x, int64_t count) {
  _mm256_mask_storeu_epi16(to, mask_of(count), (__m256i)narrow(x, T{}));
}
#else
template <typename T>
inline Vector load_part(const T* from, int64_t count) {
  T lanes[kWidth] = {};
  std::memcpy(lanes, from, count * sizeof(T));
  return load(lanes);
}
template <typename T>
inline void store_part(T* to, Vector x, int64_t count) {
  T lanes[kWidth];
  store(lanes, x);
  std::memcpy(to, lanes, count * sizeof(T));
}
#endif

template <typename T>
inline Vector load_up_to(const T* from, int64_t count) {
  return count >= kWidth ? load(from) : load_part(from, count);
}

template <typename T>
inline void store_up_to(T* to, Vector x, int64_t count) {
  if (count >= kWidth) {
    store(to, x);
  } else {
    store_part(to, x, count);
  }
}

// f(i, all lanes as a constant or those left) over the vectors of `count` elements, the last of which may be partial. Two
// calls, so that the whole vectors' code has no branches.
template <typename F>
inline void for_vectors(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    f(i, kWidth);
  }
  if (i < count) {
    f(i, count - i);
  }
}

// Lanes below `count` keep their value, the others become zero.
inline Vector keep_first(Vector x, int64_t count) {
  Ints lane;
  for (int i = 0; i < kWidth; ++i) {
    lane[i] = i;
  }
  return select(lane < (int32_t)count, x, Vector{});
}

// --- two vectors at a time, for what is done to each element alone ---

// 2 kWidth elements: the first and the second half, or, of bf16, the even and the odd ones, which take one operation each
// to widen and need no shuffles.
struct Two {
  Vector a, b;
};
constexpr int kTwo = 2 * kWidth;

inline Two operator+(Two x, Two y) { return {x.a + y.a, x.b + y.b}; }
inline Two operator-(Two x, Two y) { return {x.a - y.a, x.b - y.b}; }
inline Two operator*(Vector factor, Two x) { return {factor * x.a, factor * x.b}; }
inline Two fused(Vector factor, Two x, Two y) { return {fused(factor, x.a, y.a), fused(factor, x.b, y.b)}; }
inline Two absolute(Two x) { return {absolute(x.a), absolute(x.b)}; }
inline Two both(Vector x) { return {x, x}; }

// a0 b0 a1 b1 ..
inline Two interleaved(Two x) {
#if defined(__clang__)
  Two result;
  for (int i = 0; i < kWidth; ++i) {
    result.a[i] = i % 2 ? x.b[i / 2] : x.a[i / 2];
    result.b[i] = i % 2 ? x.b[(i + kWidth) / 2] : x.a[(i + kWidth) / 2];
  }
  return result;
#else
  Ints first, second;
  for (int i = 0; i < kWidth; ++i) {
    first[i] = i / 2 + (i % 2) * kWidth;
    second[i] = first[i] + kWidth / 2;
  }
  return {__builtin_shuffle(x.a, x.b, first), __builtin_shuffle(x.a, x.b, second)};
#endif
}

template <typename T>
constexpr bool kIsByParity = false;
template <>
inline constexpr bool kIsByParity<BFloat16> = true;

template <typename T>
inline Two load_two(const T* from) {
  if constexpr (kIsByParity<T>) {
    Words words;
    std::memcpy(&words, from, sizeof words);
    return {(Vector)(words << 16), (Vector)(words & 0xFFFF0000u)};
  } else {
    return {load(from), load(from + kWidth)};
  }
}

template <typename T>
inline void store_two(T* to, Two x) {
  if constexpr (kIsByParity<T>) {
    const Words even = rounded_to_bf16(x.a), odd = rounded_to_bf16(x.b);
    const Words words = (even >> 16) | (odd & 0xFFFF0000u);
    std::memcpy(to, &words, sizeof words);
  } else {
    store(to, x.a);
    store(to + kWidth, x.b);
  }
}

// How many of kTwo elements there are to load and store: all, known when compiling, or the first few.
struct Whole {};
struct Part {
  int64_t count;
};

template <typename T>
inline Two load_two(const T* from, Whole) {
  return load_two(from);
}
template <typename T>
inline Two load_two(const T* from, Part part) {
#if defined(__AVX512F__)
  if constexpr (kIsByParity<T>) {
    const Words words = (Words)_mm512_maskz_loadu_epi16((uint32_t)((uint64_t{1} << part.count) - 1u), from);
    return {(Vector)(words << 16), (Vector)(words & 0xFFFF0000u)};
  } else {
    const int64_t more = part.count - kWidth;
    return {load_up_to(from, part.count), more > 0 ? load_part(from + kWidth, more) : Vector{}};
  }
#else
  T lanes[kTwo] = {};
  std::memcpy(lanes, from, part.count * sizeof(T));
  return load_two(lanes);
#endif
}
template <typename T>
inline void store_two(T* to, Two x, Whole) {
  store_two(to, x);
}
template <typename T>
inline void store_two(T* to, Two x, Part part) {
  T lanes[kTwo];
  store_two(lanes, x);
  std::memcpy(to, lanes, part.count * sizeof(T));
}
// For sums: the elements that there are, zero for the others.
template <typename T>
inline Two keep(Two x, Whole) {
  return x;
}
template <typename T>
inline Two keep(Two x, Part part) {
  const Two ordered = kIsByParity<T> ? interleaved(x) : x;
  return {keep_first(ordered.a, part.count), keep_first(ordered.b, part.count - kWidth)};
}

// f(i, Whole{}) for each kTwo elements of [begin, end), f(i, Part) for what is left.
template <typename F>
inline void for_twos(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + kTwo <= end; i += kTwo) {
    f(i, Whole{});
  }
  if (i < end) {
    f(i, Part{end - i});
  }
}

}  // namespace dmd2_fast::DMD2_FAST_ISA
