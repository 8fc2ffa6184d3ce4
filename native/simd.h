// Eight lanes of float or 32-bit integers, sixteen of 16 bits, thirty-two bytes: the only vector code in kvik.
//
// Kernels are written once over these types and compiled once per instruction set. Both versions round the same way
// at every operation (each `fma` is fused, nothing else is), so all instruction sets give the same bits.
// Everything lives in an anonymous namespace, and no inline function of the standard library is called: the linker must
// not serve plain processors a shared copy that was compiled for another instruction set.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#include "half.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define KVIK_SIMD_AVX2 1
#include <immintrin.h>
#else
#define KVIK_SIMD_AVX2 0
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) &&                 \
    defined(__AVX512VNNI__)
#define KVIK_SIMD_AVX512 1
#else
#define KVIK_SIMD_AVX512 0
#endif

// Before a loop over an array that should live in registers: for that every index must be a constant.
#if defined(__clang__)
#define KVIK_UNROLL _Pragma("unroll")
#else
#define KVIK_UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

constexpr int kLanes = 8;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A number that a generic lambda may use as a constant.
template <int n> struct Count {
  static constexpr int value = n;
};

#if KVIK_SIMD_AVX2

struct F32x8 {
  __m256 v;
};
struct Int32x8 {
  __m256i v;
};
struct Int16x16 {
  __m256i v;
};
struct Byte32 {
  __m256i v;
};

inline F32x8 zero8() { return {_mm256_setzero_ps()}; }
inline F32x8 broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline F32x8 load(const float *p) { return {_mm256_loadu_ps(p)}; }
inline void store(float *p, F32x8 a) { _mm256_storeu_ps(p, a.v); }
inline F32x8 load(const Half *p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)))}; }
inline void store(Half *p, F32x8 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline F32x8 load(const BFloat16 *p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline F32x8 operator+(F32x8 a, F32x8 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32x8 operator-(F32x8 a, F32x8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32x8 operator*(F32x8 a, F32x8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32x8 operator/(F32x8 a, F32x8 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32x8 fma(F32x8 a, F32x8 b, F32x8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x8 max(F32x8 a, F32x8 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F32x8 min(F32x8 a, F32x8 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F32x8 abs(F32x8 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline F32x8 round_even(F32x8 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32x8 to_float(Int32x8 a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline Int32x8 to_int(F32x8 a) { return {_mm256_cvtps_epi32(a.v)}; }

// 2**n for lanes that hold whole numbers in [-126, 127].
inline F32x8 power_of_two(F32x8 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))};
}

// Lanes 0 ... count-1 keep a, the others take b; count may be negative or above 8.
inline F32x8 first_lanes(int count, F32x8 a, F32x8 b) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane)))};
}
// Lanes of x above 0 take a, the others b.
inline F32x8 if_positive(F32x8 x, F32x8 a, F32x8 b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_GT_OQ))};
}

inline Byte32 load_bytes(const void *p) { return {_mm256_loadu_si256(static_cast<const __m256i *>(p))}; }
inline void store_bytes(uint8_t *p, Byte32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), a.v); }
inline Byte32 operator|(Byte32 a, Byte32 b) { return {_mm256_or_si256(a.v, b.v)}; }
// Bits [from, from + count) of each byte, moved to begin at bit `to`.
template <int from, int count, int to> inline Byte32 bit_field(Byte32 a) {
  if constexpr (count == 8) return a;
  const __m256i moved = from >= to ? _mm256_srli_epi16(a.v, from > to ? from - to : 0)
                                   : _mm256_slli_epi16(a.v, from < to ? to - from : 0);
  return {_mm256_and_si256(moved, _mm256_set1_epi8(static_cast<char>(((1 << count) - 1) << to)))};
}
inline Byte32 look_up(const int8_t (&table)[16], Byte32 index) {
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i *>(table));
  return {_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), index.v)};
}
// The same four bytes in every 32-bit lane.
inline Byte32 broadcast4(const int8_t *p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return {_mm256_set1_epi32(word)};
}
inline Int32x8 load_as_ints(const uint8_t *p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)))};
}
inline Int32x8 load_as_ints(const int8_t *p) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)))};
}
// Bits [from, from + count) of integers that are not negative.
inline Int32x8 bit_field(Int32x8 a, int from, int count) {
  return {_mm256_and_si256(_mm256_srl_epi32(a.v, _mm_cvtsi32_si128(from)), _mm256_set1_epi32((1 << count) - 1))};
}
// As unsigned: |-128| is 128.
inline Byte32 abs_bytes(Byte32 a) { return {_mm256_abs_epi8(a.v)}; }
inline Byte32 apply_sign(Byte32 a, Byte32 sign) { return {_mm256_sign_epi8(a.v, sign.v)}; }
// Unsigned times signed bytes, neighbouring products added; callers keep the sums inside 16 bits.
inline Int16x16 multiply_pairs(Byte32 a, Byte32 b) { return {_mm256_maddubs_epi16(a.v, b.v)}; }
inline Int16x16 operator+(Int16x16 a, Int16x16 b) { return {_mm256_add_epi16(a.v, b.v)}; }
inline Int16x16 zero16() { return {_mm256_setzero_si256()}; }
inline Int32x8 add_pairs(Int16x16 a) { return {_mm256_madd_epi16(a.v, _mm256_set1_epi16(1))}; }
inline Int32x8 operator+(Int32x8 a, Int32x8 b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Int32x8 zero32() { return {_mm256_setzero_si256()}; }
inline Int32x8 broadcast_int(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline Int32x8 scale_int(Int32x8 a, int32_t factor) { return {_mm256_mullo_epi32(a.v, _mm256_set1_epi32(factor))}; }
inline void store(int32_t *p, Int32x8 a) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), a.v); }
inline Int32x8 operator-(Int32x8 a, Int32x8 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
// 32 integers that fit into bytes.
inline void store_bytes(int8_t *p, const Int32x8 (&a)[4]) {
  const __m256i low = _mm256_packs_epi32(a[0].v, a[1].v), high = _mm256_packs_epi32(a[2].v, a[3].v);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); // packing works on each 128-bit half
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), bytes);
}
// gcc must hold `a` in a register here: left alone it postpones sums until they no longer fit the registers.
inline void pin(Int16x16 &a) { asm("" : "+x"(a.v)); }
inline void pin(Int32x8 &a) { asm("" : "+x"(a.v)); }
// Keeps a value in a register where the compiler would load it anew for each use.
inline F32x8 pinned(F32x8 a) {
  asm("" : "+x"(a.v));
  return a;
}
// Ask for the cache line at p; reading past the end of an array is harmless here.
// Not the intrinsic, which gcc 12 drops from a loop that it has inlined into another.
inline void prefetch(const void *p) { asm volatile("prefetcht0 %0" : : "m"(*static_cast<const char *>(p))); }
inline void prefetch_to_l2(const void *p) { asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char *>(p))); }

#else

template <class T, int N> struct Lanes {
  T v[N];
};
struct F32x8 : Lanes<float, 8> {};
struct Int32x8 : Lanes<int32_t, 8> {};
struct Int16x16 : Lanes<int16_t, 16> {};
struct Byte32 : Lanes<uint8_t, 32> {};

template <class Function> inline F32x8 each_lane(Function function) {
  F32x8 out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = function(i);
  return out;
}

inline F32x8 broadcast(float x) {
  return each_lane([&](int) { return x; });
}
inline F32x8 zero8() { return broadcast(0.0f); }
inline F32x8 load(const float *p) {
  return each_lane([&](int i) { return p[i]; });
}
inline void store(float *p, F32x8 a) { std::memcpy(p, a.v, sizeof a.v); }
inline F32x8 load(const Half *p) {
  return each_lane([&](int i) { return to_float(p[i]); });
}
inline void store(Half *p, F32x8 a) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_half(a.v[i]);
}
inline F32x8 load(const BFloat16 *p) {
  return each_lane([&](int i) { return to_float(p[i]); });
}
inline F32x8 operator+(F32x8 a, F32x8 b) {
  return each_lane([&](int i) { return a.v[i] + b.v[i]; });
}
inline F32x8 operator-(F32x8 a, F32x8 b) {
  return each_lane([&](int i) { return a.v[i] - b.v[i]; });
}
inline F32x8 operator*(F32x8 a, F32x8 b) {
  return each_lane([&](int i) { return a.v[i] * b.v[i]; });
}
inline F32x8 operator/(F32x8 a, F32x8 b) {
  return each_lane([&](int i) { return a.v[i] / b.v[i]; });
}
inline F32x8 fma(F32x8 a, F32x8 b, F32x8 c) {
  return each_lane([&](int i) { return fmaf(a.v[i], b.v[i], c.v[i]); });
}
// A NaN on the left gives the right operand, as the x86 instructions do.
inline F32x8 max(F32x8 a, F32x8 b) {
  return each_lane([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x8 min(F32x8 a, F32x8 b) {
  return each_lane([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x8 if_positive(F32x8 x, F32x8 a, F32x8 b) {
  return each_lane([&](int i) { return x.v[i] > 0 ? a.v[i] : b.v[i]; });
}
inline F32x8 abs(F32x8 a) {
  return each_lane([&](int i) { return fabsf(a.v[i]); });
}
inline F32x8 round_even(F32x8 a) {
  return each_lane([&](int i) { return nearbyintf(a.v[i]); });
}
inline F32x8 to_float(Int32x8 a) {
  return each_lane([&](int i) { return static_cast<float>(a.v[i]); });
}
// Callers clamp first: a cast of a value outside the integer's range would be undefined.
inline Int32x8 to_int(F32x8 a) {
  Int32x8 out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = static_cast<int32_t>(nearbyintf(a.v[i]));
  return out;
}
inline F32x8 power_of_two(F32x8 n) {
  return each_lane([&](int i) {
    if (n.v[i] != n.v[i]) return n.v[i]; // to cast a NaN would be undefined
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  });
}
inline F32x8 first_lanes(int count, F32x8 a, F32x8 b) {
  return each_lane([&](int i) { return i < count ? a.v[i] : b.v[i]; });
}

template <class Function> inline Byte32 each_byte(Function function) {
  Byte32 out;
  for (int i = 0; i < 32; ++i) out.v[i] = static_cast<uint8_t>(function(i));
  return out;
}

inline Byte32 load_bytes(const void *p) {
  Byte32 out;
  std::memcpy(out.v, p, 32);
  return out;
}
inline void store_bytes(uint8_t *p, Byte32 a) { std::memcpy(p, a.v, 32); }
inline Byte32 operator|(Byte32 a, Byte32 b) {
  return each_byte([&](int i) { return a.v[i] | b.v[i]; });
}
template <int from, int count, int to> inline Byte32 bit_field(Byte32 a) {
  return each_byte([&](int i) { return (a.v[i] >> from & ((1 << count) - 1)) << to; });
}
inline Byte32 look_up(const int8_t (&table)[16], Byte32 index) {
  return each_byte([&](int i) { return table[index.v[i]]; });
}
inline Byte32 broadcast4(const int8_t *p) {
  return each_byte([&](int i) { return p[i & 3]; });
}
template <class Byte> inline Int32x8 load_as_ints(const Byte *p) {
  Int32x8 out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = p[i];
  return out;
}
inline Int32x8 bit_field(Int32x8 a, int from, int count) {
  Int32x8 out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = a.v[i] >> from & ((1 << count) - 1);
  return out;
}
inline Byte32 abs_bytes(Byte32 a) {
  return each_byte([&](int i) { return static_cast<int8_t>(a.v[i]) < 0 ? -static_cast<int8_t>(a.v[i]) : a.v[i]; });
}
inline Byte32 apply_sign(Byte32 a, Byte32 sign) {
  return each_byte([&](int i) {
    const int s = static_cast<int8_t>(sign.v[i]);
    return s == 0 ? 0 : (s < 0 ? -a.v[i] : a.v[i]);
  });
}
inline Int16x16 multiply_pairs(Byte32 a, Byte32 b) {
  Int16x16 out;
  for (int i = 0; i < 16; ++i)
    out.v[i] = static_cast<int16_t>(a.v[2 * i] * static_cast<int8_t>(b.v[2 * i]) +
                                    a.v[2 * i + 1] * static_cast<int8_t>(b.v[2 * i + 1]));
  return out;
}
inline Int16x16 operator+(Int16x16 a, Int16x16 b) {
  Int16x16 out;
  for (int i = 0; i < 16; ++i) out.v[i] = static_cast<int16_t>(a.v[i] + b.v[i]);
  return out;
}
inline Int16x16 zero16() { return {}; }
inline Int32x8 add_pairs(Int16x16 a) {
  Int32x8 out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = a.v[2 * i] + a.v[2 * i + 1];
  return out;
}
inline Int32x8 operator+(Int32x8 a, Int32x8 b) {
  Int32x8 out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = a.v[i] + b.v[i];
  return out;
}
inline Int32x8 zero32() { return {}; }
inline Int32x8 broadcast_int(int32_t x) {
  Int32x8 out;
  for (int32_t &lane : out.v) lane = x;
  return out;
}
inline Int32x8 scale_int(Int32x8 a, int32_t factor) {
  Int32x8 out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = a.v[i] * factor;
  return out;
}
inline void store(int32_t *p, Int32x8 a) { std::memcpy(p, a.v, sizeof a.v); }
inline Int32x8 operator-(Int32x8 a, Int32x8 b) {
  Int32x8 out;
  for (int i = 0; i < kLanes; ++i) // modulo 2**32, as the instruction
    out.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) - static_cast<uint32_t>(b.v[i]));
  return out;
}
// 32 integers that fit into bytes.
inline void store_bytes(int8_t *p, const Int32x8 (&a)[4]) {
  for (int i = 0; i < 32; ++i) p[i] = static_cast<int8_t>(a[i / kLanes].v[i % kLanes]);
}
inline void pin(Int16x16 &) {}
inline void pin(Int32x8 &) {}
inline F32x8 pinned(F32x8 a) { return a; }
inline void prefetch(const void *) {}
inline void prefetch_to_l2(const void *) {}

#endif

// The widest vector of floats: what holds independent outputs may use it, since lanes never meet.
#if KVIK_SIMD_AVX512

constexpr int kWideLanes = 16;
struct Wide {
  __m512 v;
};
inline Wide wide_zero() { return {_mm512_setzero_ps()}; }
inline Wide wide_broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Wide wide_load(const float *p) { return {_mm512_loadu_ps(p)}; }
inline Wide wide_load(const Half *p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)))};
}
inline Wide wide_load(const BFloat16 *p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline void store(float *p, Wide a) { _mm512_storeu_ps(p, a.v); }
inline Wide operator+(Wide a, Wide b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Wide operator-(Wide a, Wide b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Wide operator*(Wide a, Wide b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Wide fma(Wide a, Wide b, Wide c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Wide operator/(Wide a, Wide b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Wide max(Wide a, Wide b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Wide min(Wide a, Wide b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Wide round_even(Wide a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Wide power_of_two(Wide n) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}
inline Wide first_lanes(int count, Wide a, Wide b) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_mask_blend_ps(_mm512_cmpgt_epi32_mask(_mm512_set1_epi32(count), lane), b.v, a.v)};
}
inline F32x8 low_half(Wide a) { return {_mm512_castps512_ps256(a.v)}; }
inline F32x8 high_half(Wide a) { return {_mm512_extractf32x8_ps(a.v, 1)}; }
inline Wide pinned(Wide a) {
  asm("" : "+v"(a.v));
  return a;
}

// Integers of the same width.
struct WideBytes {
  __m512i v;
};
struct WideInt {
  __m512i v;
};
// Two vectors of eight side by side.
inline Wide join(F32x8 low, F32x8 high) { return {_mm512_insertf32x8(_mm512_castps256_ps512(low.v), high.v, 1)}; }
template <class Stored> inline Wide wide_load(const Stored *p, int64_t next) { return join(load(p), load(p + next)); }
inline WideBytes wide_load_bytes(const uint8_t *p) { return {_mm512_loadu_si512(p)}; }
inline void store_bytes(uint8_t *p, WideBytes a) { _mm512_storeu_si512(p, a.v); }
inline WideBytes operator|(WideBytes a, WideBytes b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int from, int count, int to> inline WideBytes bit_field(WideBytes a) {
  if constexpr (count == 8) return a;
  const __m512i moved = from >= to ? _mm512_srli_epi16(a.v, from > to ? from - to : 0)
                                   : _mm512_slli_epi16(a.v, from < to ? to - from : 0);
  return {_mm512_and_si512(moved, _mm512_set1_epi8(static_cast<char>(((1 << count) - 1) << to)))};
}
inline WideBytes look_up(const int8_t (&table)[16], WideBytes index) {
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i *>(table));
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), index.v)};
}
inline WideBytes flip_high_bits(WideBytes a) { return {_mm512_xor_si512(a.v, _mm512_set1_epi8(-128))}; }
inline WideInt wide_load_as_ints(const uint8_t *p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)))};
}
inline WideInt wide_load_as_ints(const int8_t *p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)))};
}
inline WideInt bit_field(WideInt a, int from, int count) {
  return {_mm512_and_si512(_mm512_srl_epi32(a.v, _mm_cvtsi32_si128(from)), _mm512_set1_epi32((1 << count) - 1))};
}
inline WideBytes wide_broadcast4(const int8_t *p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return {_mm512_set1_epi32(word)};
}
inline WideInt operator+(WideInt a, WideInt b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline WideInt operator-(WideInt a, WideInt b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline WideInt wide_broadcast_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline WideInt scale_int(WideInt a, int32_t factor) { return {_mm512_mullo_epi32(a.v, _mm512_set1_epi32(factor))}; }
inline Wide to_float(WideInt a) { return {_mm512_cvtepi32_ps(a.v)}; }

#else

constexpr int kWideLanes = kLanes;
using Wide = F32x8;
inline Wide wide_zero() { return zero8(); }
inline Wide wide_broadcast(float x) { return broadcast(x); }
template <class Stored> inline Wide wide_load(const Stored *p) { return load(p); }

using WideBytes = Byte32;
using WideInt = Int32x8;
template <class Stored> inline Wide wide_load(const Stored *p, int64_t) { return load(p); }
inline WideBytes wide_load_bytes(const uint8_t *p) { return load_bytes(p); }
inline WideBytes wide_broadcast4(const int8_t *p) { return broadcast4(p); }
inline WideInt wide_broadcast_int(int32_t x) { return broadcast_int(x); }
template <class Byte> inline WideInt wide_load_as_ints(const Byte *p) { return load_as_ints(p); }

#endif

// For code written over both widths: V is F32x8 or Wide.
template <class V> inline V spread(float x) {
  if constexpr (sizeof(V) == sizeof(F32x8))
    return broadcast(x);
  else
    return wide_broadcast(x);
}
template <class V, class Stored> inline V load_as(const Stored *p) {
  if constexpr (sizeof(V) == sizeof(F32x8))
    return load(p);
  else
    return wide_load(p);
}
// Adds eight lanes after eight lanes, so that both widths add in the same order.
template <class V> inline F32x8 add_eights(F32x8 sum, V a) {
  if constexpr (sizeof(V) == sizeof(F32x8))
    return sum + a;
  else
    return (sum + low_half(a)) + high_half(a);
}

// Reductions across lanes happen only where an op needs one number per row. The tree is fixed: lanes 4 apart, then 2
// apart, then neighbours.
#if KVIK_SIMD_AVX2

inline float add_lanes(F32x8 a) {
  const __m128 fours = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 twos = _mm_add_ps(fours, _mm_movehl_ps(fours, fours));
  return _mm_cvtss_f32(_mm_add_ss(twos, _mm_movehdup_ps(twos)));
}
inline int32_t add_lanes(Int32x8 a) {
  const __m128i fours = _mm_add_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  const __m128i twos = _mm_add_epi32(fours, _mm_unpackhi_epi64(fours, fours));
  return _mm_cvtsi128_si32(_mm_add_epi32(twos, _mm_shuffle_epi32(twos, 1)));
}
inline float max_lanes(F32x8 a) {
  const __m128 fours = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 twos = _mm_max_ps(fours, _mm_movehl_ps(fours, fours));
  return _mm_cvtss_f32(_mm_max_ss(twos, _mm_movehdup_ps(twos)));
}

#else

inline float add_lanes(F32x8 a) {
  const float *v = a.v;
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
inline int32_t add_lanes(Int32x8 a) {
  int32_t sum = 0;
  for (int32_t lane : a.v) sum += lane;
  return sum;
}
inline float max_lanes(F32x8 a) {
  float best = a.v[0];
  for (int i = 1; i < kLanes; ++i) best = a.v[i] > best ? a.v[i] : best;
  return best;
}

#endif

// For what does not depend on the order of lanes.
template <class V> inline float max_of(V a) {
  if constexpr (sizeof(V) == sizeof(F32x8))
    return max_lanes(a);
  else
    return max_lanes(max(low_half(a), high_half(a)));
}

} // namespace
