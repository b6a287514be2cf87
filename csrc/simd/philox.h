// The noise stream of ../philox.h in vectors: the same integers bit for bit; normals within 4e-6 of the exact ones.
#pragma once

#include "vector.h"

namespace dmd2_fast::DMD2_FAST_ISA {

// Counters taken at a time: one a 64-bit lane. Four normals each, so two vectors of normals.
constexpr int kCounters = kWidth / 2;

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

  // For counters first .. first + kCounters - 1. Bits above the low word run on in c1 and c3: products do not see them.
  Pairs pairs(uint64_t first) const {
    Wide lane;
    for (int i = 0; i < kCounters; ++i) {
      lane[i] = i;
    }
    Wide c0 = wide(first) + lane, c1 = id_, c2 = step_, c3 = stream_;
    const Wide multiplier0 = wide(0xD2511F53u), multiplier1 = wide(0xCD9E8D57u);
    for (int round = 0; round < 10; ++round) {
      const Wide product0 = wide_product(c0, multiplier0);
      const Wide product1 = wide_product(c2, multiplier1);
      c0 = (product1 >> 32) ^ c1 ^ keys_[round][0];
      c1 = product1;
      c2 = (product0 >> 32) ^ c3 ^ keys_[round][1];
      c3 = product0;
    }
    return {(Words)((c0 & 0xFFFFFFFFu) | (c2 << 32)), (Words)((c1 & 0xFFFFFFFFu) | (c3 << 32))};
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

// Box-Muller. Polynomials are minimax fits: -2 ln m / (m - 1) to 1.7e-7, sine and cosine to 3e-8 on half a turn.
// The even and the odd normals.
inline Two normals_of(Pairs words) {
  const Vector u = uniform_of(words.radius);
  const Ints bits = (Ints)u;
  const Ints exponent = (bits - 0x3F3504F3) >> 23;  // u = m 2^exponent, m in [sqrt(1/2), sqrt(2))
  const Vector rest = (Vector)(bits - (exponent << 23)) - 1.0f;
  Vector log = all(0.202137873f);
  log = fused(log, rest, all(-0.324451625f));
  log = fused(log, rest, all(0.345016599f));
  log = fused(log, rest, all(-0.39800331f));
  log = fused(log, rest, all(0.499398172f));
  log = fused(log, rest, all(-0.666701198f));
  log = fused(log, rest, all(1.00000727f));
  log = fused(log, rest, all(-1.99999988f));
  log = fused(log, rest, __builtin_convertvector(exponent, Vector) * -1.38629436f);  // -2 ln u
  const Vector radius = root(log);

  // The angle is w 2^-32 turns. Twice that modulo a turn, read as signed, is the angle within half a turn around 0, and
  // w's two highest bits say whether half a turn was left out, which turns the sign of sine and cosine.
  const Words doubled = words.angle << 1;
  const Vector signed_radius = (Vector)((Words)radius ^ ((words.angle ^ doubled) & 0x80000000u));
  const Vector angle = __builtin_convertvector((Ints)doubled, Vector) * 7.31459037e-10f;  // pi 2^-32
  const Vector square = angle * angle;
  Vector sine = all(2.59051126e-6f);
  sine = fused(sine, square, all(-1.98009118e-4f));
  sine = fused(sine, square, all(8.33289977e-3f));
  sine = fused(sine, square, all(-0.166666478f));
  sine = fused(sine, square, all(1.0f));
  Vector cosine = all(-2.60514952e-7f);
  cosine = fused(cosine, square, all(2.4760162e-5f));
  cosine = fused(cosine, square, all(-1.38883619e-3f));
  cosine = fused(cosine, square, all(4.16666381e-2f));
  cosine = fused(cosine, square, all(-0.5f));
  cosine = fused(cosine, square, all(1.0f));
  return {signed_radius * cosine, signed_radius * (angle * sine)};
}

// The normals of kCounters counters, for the elements from i on, a multiple of kTwo; laid out as by load_two of T.
template <typename T>
inline Two normals(const Stream& stream, int64_t i) {
  const Two by_parity = normals_of(stream.pairs(i / 4));
  return kIsByParity<T> ? by_parity : interleaved(by_parity);
}

}  // namespace dmd2_fast::DMD2_FAST_ISA
