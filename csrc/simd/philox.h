// The noise stream of ../philox.h in vectors: the same integers bit for bit; normals within 4e-6 of the exact ones.
#pragma once

#include "vector.h"

namespace dmd2_fast::DMD2_FAST_ISA {

// Counters in one vector: one a 64-bit lane. Four normals each, so two vectors of normals.
constexpr int kCounters = kWidth / 2;
// Vectors of counters that go through the rounds and functions side by side: each is one chain of dependent operations, and
// four of them keep the units busy (1.6 times as fast as one).
constexpr int kChains = 4;

// The words of kCounters counters: radius holds (w0, w2) of each counter in turn, angle (w1, w3).
struct Pairs {
  Words radius, angle;
};

class Stream {
 public:
  Stream(const Noise& noise, int64_t sample) : id_(wide(noise.ids[sample])), step_(wide(noise.step)), stream_(wide(noise.stream)) {
    uint32_t low = noise.seed_low, high = noise.seed_high;
    for (int round = 0; round < 10; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u) {
      keys_[round][0] = wide(low);
      keys_[round][1] = wide(high);
    }
  }

  // For K kCounters counters from `first` on. Bits above the low word run on in c1 and c3: products do not see them.
  template <int K>
  void pairs(uint64_t first, Pairs* out) const {
    Wide lane, c0[K], c1[K], c2[K], c3[K];
    for (int i = 0; i < kCounters; ++i) {
      lane[i] = i;
    }
    for (int k = 0; k < K; ++k) {
      c0[k] = wide(first + k * kCounters) + lane;
      c1[k] = id_;
      c2[k] = step_;
      c3[k] = stream_;
    }
    const Wide multiplier0 = wide(0xD2511F53u), multiplier1 = wide(0xCD9E8D57u);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        const Wide product0 = wide_product(c0[k], multiplier0);
        const Wide product1 = wide_product(c2[k], multiplier1);
        c0[k] = (product1 >> 32) ^ c1[k] ^ keys_[round][0];
        c1[k] = product1;
        c2[k] = (product0 >> 32) ^ c3[k] ^ keys_[round][1];
        c3[k] = product0;
      }
    }
    for (int k = 0; k < K; ++k) {
      out[k] = {(Words)((c0[k] & 0xFFFFFFFFu) | (c2[k] << 32)), (Words)((c1[k] & 0xFFFFFFFFu) | (c3[k] << 32))};
    }
  }

 private:
  static Wide wide(uint64_t value) { return value - Wide{}; }
  Wide id_, step_, stream_, keys_[10][2];
};

// u = f32(w) 2^-32 + 2^-33 in (0, 1]; the product is exact, so that the sum rounds once.
inline Vector uniform_of(Words words) {
#if defined(__AVX512F__)
  const Vector value = (Vector)_mm512_cvtepu32_ps((__m512i)words);
#else
  // The high half is exact, and so is the sum's first addend: one rounding, as in the conversion.
  const Vector high = __builtin_convertvector((Ints)(words >> 16), Vector) * 65536.0f;
  const Vector value = high + __builtin_convertvector((Ints)(words & 0xFFFFu), Vector);
#endif
  return value * 0x1p-32f + 0x1p-33f;
}

// sum of c[N - 1 - i] x^i
template <int K, int N>
inline void polynomial(const float (&c)[N], const Vector (&x)[K], Vector (&y)[K]) {
  for (int k = 0; k < K; ++k) {
    y[k] = all(c[0]);
  }
#pragma GCC unroll 8
  for (int i = 1; i < N; ++i) {
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      y[k] = fused(y[k], x[k], all(c[i]));
    }
  }
}

// Minimax fits: -2 ln(1 + x) / x to 1.7e-7 on [sqrt(1/2) - 1, sqrt(2) - 1]; sin x / x and cos x in x^2, to 3e-9, |x| <= pi / 2.
constexpr float kLog[] = {0.202137873f, -0.324451625f, 0.345016599f, -0.39800331f,
                          0.499398172f, -0.666701198f, 1.00000727f,  -1.99999988f};
constexpr float kSine[] = {2.59051126e-6f, -1.98009118e-4f, 8.33289977e-3f, -0.166666478f, 1.0f};
constexpr float kCosine[] = {-2.60514952e-7f, 2.4760162e-5f, -1.38883619e-3f, 4.16666381e-2f, -0.5f, 1.0f};

// Box-Muller: the even and the odd normals of K kCounters counters.
template <int K>
inline void normals_of(const Pairs* words, Two* out) {
  Vector rest[K], whole[K], log[K], angle[K], square[K], sine[K], cosine[K];
  for (int k = 0; k < K; ++k) {
    const Ints bits = (Ints)uniform_of(words[k].radius);
    const Ints exponent = (bits - 0x3F3504F3) >> 23;  // u = (1 + rest) 2^exponent, 1 + rest in [sqrt(1/2), sqrt(2))
    rest[k] = (Vector)(bits - (exponent << 23)) - 1.0f;
    whole[k] = __builtin_convertvector(exponent, Vector) * -1.38629436f;  // -2 ln 2
  }
  polynomial(kLog, rest, log);
  for (int k = 0; k < K; ++k) {
    // The angle is w 2^-32 turns. Twice that modulo a turn, read as signed, is the angle within half a turn around 0.
    const Words doubled = words[k].angle << 1;
    angle[k] = __builtin_convertvector((Ints)doubled, Vector) * 7.31459037e-10f;  // pi 2^-32
    square[k] = angle[k] * angle[k];
  }
  polynomial(kSine, square, sine);
  polynomial(kCosine, square, cosine);
  for (int k = 0; k < K; ++k) {
    const Vector radius = root(fused(log[k], rest[k], whole[k]));
    // The angle's two highest bits say whether half a turn was left out, which turns the sign of sine and cosine.
    const Words sign = (words[k].angle ^ (words[k].angle << 1)) & 0x80000000u;
    const Vector signed_radius = (Vector)((Words)radius ^ sign);
    out[k] = {signed_radius * cosine[k], signed_radius * (angle[k] * sine[k])};
  }
}

// f(i, normals, count) over [begin, end), begin a multiple of kTwo, as for_twos has it; laid out as by load_two of T.
template <typename T, typename F>
inline void for_normals(const Stream& stream, int64_t begin, int64_t end, const F& f) {
  const auto ordered = [](Two by_parity) { return kIsByParity<T> ? by_parity : interleaved(by_parity); };
  Pairs words[kChains];
  Two normals[kChains];
  int64_t i = begin;
  for (; i + kChains * kTwo <= end; i += kChains * kTwo) {
    stream.pairs<kChains>(i / 4, words);
    normals_of<kChains>(words, normals);
    for (int k = 0; k < kChains; ++k) {
      f(i + k * kTwo, ordered(normals[k]), Whole{});
    }
  }
  for_twos(i, end, [&](int64_t j, auto count) {
    stream.pairs<1>(j / 4, words);
    normals_of<1>(words, normals);
    f(j, ordered(normals[0]), count);
  });
}

}  // namespace dmd2_fast::DMD2_FAST_ISA
