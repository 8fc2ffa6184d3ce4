// Products of bytes with 16-bit factors, four to a 32-bit lane: what 8-bit keys and values are multiplied with.
//
// A byte is kept as byte + 128, so that it is unsigned: AVX2 widens it without a sign, VNNI takes it as it is. The sums
// run modulo 2**32; the caller takes 128 times the sum of its factors off again, and chooses levels at which the true
// sum fits 32 bits. So every instruction set gives the same integer.
#pragma once

#include "simd.h"

namespace {

// Factors lie within it: 127 * 256 + 127, what two signed bytes hold.
constexpr int kFactorLevels = 32639;

#if KVIK_SIMD_AVX512

// One bit pattern for four factors 256 * high + low.
struct Factors {
  int8_t high[4], low[4];
};
struct Quads {
  __m512i v;
};
struct QuadSum {
  __m512i high, low;
};

inline WideInt to_int(Wide a) { return {_mm512_cvtps_epi32(a.v)}; }
inline int32_t add_lanes(WideInt a) { return _mm512_reduce_add_epi32(a.v); }
// One lane after the other, four to an element of `out`.
inline void store_factors(Factors *out, WideInt a) {
  const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(a.v, _mm512_set1_epi32(128)), 8);
  const __m128i highs = _mm512_cvtepi32_epi8(high), lows = _mm512_cvtepi32_epi8(a.v);
  _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm_unpacklo_epi32(highs, lows));
  _mm_storeu_si128(reinterpret_cast<__m128i *>(out + 2), _mm_unpackhi_epi32(highs, lows));
}
inline Quads load_quads(const uint8_t *p) { return {_mm512_loadu_si512(p)}; }
// Two to a byte, the first in the low bits: codes of 4 bits.
struct PackedQuads {
  __m512i v;
};
inline PackedQuads load_packed_quads(const uint8_t *p) { return {_mm512_loadu_si512(p)}; }
inline Quads low_quads(const PackedQuads &a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline Quads high_quads(const PackedQuads &a) {
  return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))};
}
// Eight lanes of them; the others hold anything.
inline Quads load_eight_quads(const uint8_t *p) {
  return {_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)))};
}
inline F32x8 first_eight(Wide a) { return low_half(a); }
inline QuadSum no_quads() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
// Sums go in and come out by value: an array of them that inline assembly refers to would stay in memory.
inline QuadSum add_products(QuadSum sum, Quads a, const Factors &factors) {
  int32_t high, low;
  std::memcpy(&high, factors.high, 4);
  std::memcpy(&low, factors.low, 4);
  __m512i highs = sum.high, lows = sum.low;
  // gcc would copy each sum before the intrinsic adds to it.
  asm("vpdpbusd %2, %1, %0" : "+v"(highs) : "v"(a.v), "v"(_mm512_set1_epi32(high)));
  asm("vpdpbusd %2, %1, %0" : "+v"(lows) : "v"(a.v), "v"(_mm512_set1_epi32(low)));
  return {highs, lows};
}
inline WideInt total(QuadSum sum) { return {_mm512_add_epi32(_mm512_slli_epi32(sum.high, 8), sum.low)}; }

#else

struct Factors {
  int16_t even[2], odd[2];
};

#if KVIK_SIMD_AVX2

struct Quads {
  __m256i even, odd;
};
struct QuadSum {
  __m256i v;
};

inline void store_factors(Factors *out, WideInt a) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  const __m128i swapped = _mm_shufflehi_epi16(_mm_shufflelo_epi16(words, 0xd8), 0xd8); // 0 2 1 3
  _mm_storeu_si128(reinterpret_cast<__m128i *>(out), swapped);
}
inline Quads load_quads(const uint8_t *p) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  return {_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)};
}
struct PackedQuads {
  __m256i v;
};
inline PackedQuads load_packed_quads(const uint8_t *p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))};
}
inline Quads low_quads(const PackedQuads &a) {
  const __m256i mask = _mm256_set1_epi16(15);
  return {_mm256_and_si256(a.v, mask), _mm256_and_si256(_mm256_srli_epi16(a.v, 8), mask)};
}
inline Quads high_quads(const PackedQuads &a) {
  return {_mm256_and_si256(_mm256_srli_epi16(a.v, 4), _mm256_set1_epi16(15)), _mm256_srli_epi16(a.v, 12)};
}
inline QuadSum no_quads() { return {_mm256_setzero_si256()}; }
inline QuadSum add_products(QuadSum sum, Quads a, const Factors &factors) {
  int32_t even, odd;
  std::memcpy(&even, factors.even, 4);
  std::memcpy(&odd, factors.odd, 4);
  const __m256i first = _mm256_add_epi32(sum.v, _mm256_madd_epi16(a.even, _mm256_set1_epi32(even)));
  return {_mm256_add_epi32(first, _mm256_madd_epi16(a.odd, _mm256_set1_epi32(odd)))};
}
inline WideInt total(QuadSum sum) { return {sum.v}; }

#else

struct Quads {
  const uint8_t *bytes;
};
struct QuadSum {
  uint32_t v[kLanes];
};

inline void store_factors(Factors *out, WideInt a) {
  for (int i = 0; i < kLanes; ++i) {
    Factors &four = out[i / 4];
    (i % 2 == 0 ? four.even : four.odd)[i % 4 / 2] = static_cast<int16_t>(a.v[i]);
  }
}
inline Quads load_quads(const uint8_t *p) { return {p}; }
struct PackedQuads {
  uint8_t low[4 * kLanes], high[4 * kLanes];
};
inline PackedQuads load_packed_quads(const uint8_t *p) {
  PackedQuads a;
  for (int i = 0; i < 4 * kLanes; ++i) a.low[i] = p[i] & 15, a.high[i] = static_cast<uint8_t>(p[i] >> 4);
  return a;
}
inline Quads low_quads(const PackedQuads &a) { return {a.low}; }
inline Quads high_quads(const PackedQuads &a) { return {a.high}; }
inline QuadSum no_quads() { return {}; }
inline QuadSum add_products(QuadSum sum, Quads a, const Factors &factors) {
  for (int i = 0; i < kLanes; ++i) {
    const uint8_t *b = a.bytes + 4 * i;
    sum.v[i] += static_cast<uint32_t>(b[0] * factors.even[0] + b[1] * factors.odd[0] + b[2] * factors.even[1] +
                                      b[3] * factors.odd[1]);
  }
  return sum;
}
inline WideInt total(QuadSum sum) {
  WideInt out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = static_cast<int32_t>(sum.v[i]);
  return out;
}

#endif

inline Quads load_eight_quads(const uint8_t *p) { return load_quads(p); }
inline F32x8 first_eight(Wide a) { return a; }

#endif

} // namespace
