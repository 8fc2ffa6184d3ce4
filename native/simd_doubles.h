// Lanes of float64 and of 64-bit integers, and masks of float lanes: what the sampler computes with.
//
// No operation is fused, so every instruction set and NumPy give the same bits.
#pragma once

#include "simd.h"

namespace {

#if KVIK_SIMD_AVX512

constexpr int kDoubles = 8;
struct Doubles {
  __m512d v;
};
struct Int64s {
  __m512i v;
};
inline Doubles doubles(double x) { return {_mm512_set1_pd(x)}; }
inline Doubles load_doubles(const float *p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
inline Doubles operator+(Doubles a, Doubles b) { return {_mm512_add_pd(a.v, b.v)}; }
inline Doubles operator-(Doubles a, Doubles b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline Doubles operator*(Doubles a, Doubles b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline Doubles max(Doubles a, Doubles b) { return {_mm512_max_pd(a.v, b.v)}; }
inline Int64s int64s(int64_t x) { return {_mm512_set1_epi64(x)}; }
inline Int64s operator+(Int64s a, Int64s b) { return {_mm512_add_epi64(a.v, b.v)}; }
inline Int64s operator-(Int64s a, Int64s b) { return {_mm512_sub_epi64(a.v, b.v)}; }
inline Int64s to_exponent(Int64s a) { return {_mm512_slli_epi64(a.v, 52)}; }
inline Int64s bits_of(Doubles a) { return {_mm512_castpd_si512(a.v)}; }
inline Doubles from_bits(Int64s a) { return {_mm512_castsi512_pd(a.v)}; }
inline void store(int64_t *p, Int64s a) { _mm512_storeu_si512(p, a.v); }

// Bit i: lane i of a is at least `least` and below `above`.
inline uint32_t lanes_between(Wide a, Wide least, Wide above) {
  return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(a.v, least.v, _CMP_GE_OQ), a.v, above.v, _CMP_LT_OQ);
}

#elif KVIK_SIMD_AVX2

constexpr int kDoubles = 4;
struct Doubles {
  __m256d v;
};
struct Int64s {
  __m256i v;
};
inline Doubles doubles(double x) { return {_mm256_set1_pd(x)}; }
inline Doubles load_doubles(const float *p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
inline Doubles operator+(Doubles a, Doubles b) { return {_mm256_add_pd(a.v, b.v)}; }
inline Doubles operator-(Doubles a, Doubles b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline Doubles operator*(Doubles a, Doubles b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline Doubles max(Doubles a, Doubles b) { return {_mm256_max_pd(a.v, b.v)}; }
inline Int64s int64s(int64_t x) { return {_mm256_set1_epi64x(x)}; }
inline Int64s operator+(Int64s a, Int64s b) { return {_mm256_add_epi64(a.v, b.v)}; }
inline Int64s operator-(Int64s a, Int64s b) { return {_mm256_sub_epi64(a.v, b.v)}; }
inline Int64s to_exponent(Int64s a) { return {_mm256_slli_epi64(a.v, 52)}; }
inline Int64s bits_of(Doubles a) { return {_mm256_castpd_si256(a.v)}; }
inline Doubles from_bits(Int64s a) { return {_mm256_castsi256_pd(a.v)}; }
inline void store(int64_t *p, Int64s a) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), a.v); }

inline uint32_t lanes_between(Wide a, Wide least, Wide above) {
  const __m256 both = _mm256_and_ps(_mm256_cmp_ps(a.v, least.v, _CMP_GE_OQ), _mm256_cmp_ps(a.v, above.v, _CMP_LT_OQ));
  return static_cast<uint32_t>(_mm256_movemask_ps(both));
}

#else

constexpr int kDoubles = 4;
struct Doubles : Lanes<double, kDoubles> {};
struct Int64s : Lanes<uint64_t, kDoubles> {}; // unsigned: sums wrap, as the instructions do

template <class V, class Function> inline V each(Function function) {
  V out;
  for (int i = 0; i < kDoubles; ++i) out.v[i] = function(i);
  return out;
}
inline Doubles doubles(double x) {
  return each<Doubles>([&](int) { return x; });
}
inline Doubles load_doubles(const float *p) {
  return each<Doubles>([&](int i) { return static_cast<double>(p[i]); });
}
inline Doubles operator+(Doubles a, Doubles b) {
  return each<Doubles>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Doubles operator-(Doubles a, Doubles b) {
  return each<Doubles>([&](int i) { return a.v[i] - b.v[i]; });
}
inline Doubles operator*(Doubles a, Doubles b) {
  return each<Doubles>([&](int i) { return a.v[i] * b.v[i]; });
}
inline Doubles max(Doubles a, Doubles b) {
  return each<Doubles>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Int64s int64s(int64_t x) {
  return each<Int64s>([&](int) { return static_cast<uint64_t>(x); });
}
inline Int64s operator+(Int64s a, Int64s b) {
  return each<Int64s>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Int64s operator-(Int64s a, Int64s b) {
  return each<Int64s>([&](int i) { return a.v[i] - b.v[i]; });
}
inline Int64s to_exponent(Int64s a) {
  return each<Int64s>([&](int i) { return a.v[i] << 52; });
}
inline Int64s bits_of(Doubles a) {
  Int64s out;
  std::memcpy(out.v, a.v, sizeof out.v);
  return out;
}
inline Doubles from_bits(Int64s a) {
  Doubles out;
  std::memcpy(out.v, a.v, sizeof out.v);
  return out;
}
inline void store(int64_t *p, Int64s a) { std::memcpy(p, a.v, sizeof a.v); }

inline uint32_t lanes_between(Wide a, Wide least, Wide above) {
  uint32_t mask = 0;
  for (int i = 0; i < kWideLanes; ++i) mask |= static_cast<uint32_t>(a.v[i] >= least.v[i] && a.v[i] < above.v[i]) << i;
  return mask;
}

#endif

// Writes first + i for each bit i of the mask, ascending, and what it likes to the rest of kWideLanes places; the end
// of the former.
#if KVIK_SIMD_AVX512
inline int32_t *store_places(int32_t *out, uint32_t mask, int32_t first) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_add_epi32(lane, _mm512_set1_epi32(first));
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), places));
  return out + __builtin_popcount(mask);
}
#else
inline int32_t *store_places(int32_t *out, uint32_t mask, int32_t first) {
  for (; mask != 0; mask &= mask - 1) *out++ = first + __builtin_ctz(mask);
  return out;
}
#endif

// Lane i keeps a where bit i is set, else takes b.
#if KVIK_SIMD_AVX2
inline F32x8 select_lanes(uint8_t bits, F32x8 a, F32x8 b) {
  const __m256i lane_bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), lane_bits), lane_bits);
  return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(set))};
}
#else
inline F32x8 select_lanes(uint8_t bits, F32x8 a, F32x8 b) {
  return each_lane([&](int i) { return (bits >> i & 1) != 0 ? a.v[i] : b.v[i]; });
}
#endif

} // namespace
