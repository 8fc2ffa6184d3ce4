// Exact sums of products of 8-bit weights and activations, four neighbouring columns to a 32-bit lane: what weight
// matrices are multiplied with.
#pragma once

#include "simd.h"

namespace {

#if KVIK_SIMD_AVX512

// The sum of products, and of a number to start from. The instruction multiplies unsigned by signed bytes and no sum
// overflows, however large the weights are.
constexpr bool kUnsignedBytes = true; // weights of 8 bits are kept as byte + 128
template <int largest> struct Dot {
  static constexpr int kQuads = 1; // that one `add` takes
  __m512i sum;
  explicit Dot(int32_t start = 0) : sum(_mm512_set1_epi32(start)) {}
  void add(const WideBytes (&w)[1], const WideBytes (&a)[1]) {
    sum = _mm512_dpbusd_epi32(sum, w[0].v, a[0].v);
    asm("" : "+v"(sum));
  }
  WideInt total(int32_t) const { return {sum}; }
};

// For products by tiles.
inline WideInt wide_load(const int32_t *p) { return {_mm512_loadu_si512(p)}; }
inline WideBytes subtract(WideBytes a, int x) { return {_mm512_sub_epi8(a.v, _mm512_set1_epi8(static_cast<char>(x)))}; }

#else

// The sum of products, and of a number to start from. Weights up to `largest` are unsigned, and as many products are
// added in 16 bits as fit; above 127 they are signed bytes.
constexpr bool kUnsignedBytes = false;
template <int largest> struct Dot;
// At most 8 * 2 * 15 * 127 = 30,480 fits 16 bits, so the widening waits until the group ends.
template <> struct Dot<15> {
  static constexpr int kQuads = 1;
  Int16x16 sum = zero16();
  explicit Dot(int32_t = 0) {}
  void add(const WideBytes (&w)[1], const WideBytes (&a)[1]) {
    sum = sum + multiply_pairs(w[0], a[0]);
    pin(sum);
  }
  WideInt total(int32_t start) const { return add_pairs(sum) + broadcast_int(start); }
};
// 2 * 2 * 63 * 127 = 32,004.
template <> struct Dot<63> {
  static constexpr int kQuads = 2;
  Int32x8 sum;
  explicit Dot(int32_t start = 0) : sum(broadcast_int(start)) {}
  void add(const WideBytes (&w)[2], const WideBytes (&a)[2]) {
    sum = sum + add_pairs(multiply_pairs(w[0], a[0]) + multiply_pairs(w[1], a[1]));
    pin(sum);
  }
  WideInt total(int32_t) const { return sum; }
};
template <> struct Dot<255> {
  static constexpr int kQuads = 1;
  Int32x8 sum = zero32();
  explicit Dot(int32_t = 0) {}
  // |w| * (sign(w) a): at most 2 * 128 * 127 = 32,512 a pair.
  void add(const WideBytes (&w)[1], const WideBytes (&a)[1]) {
    sum = sum + add_pairs(multiply_pairs(abs_bytes(w[0]), apply_sign(a[0], w[0])));
    pin(sum);
  }
  WideInt total(int32_t) const { return sum; }
};

inline WideInt wide_load(const int32_t *p) {
  WideInt out;
  std::memcpy(&out.v, p, sizeof out.v);
  return out;
}
#if !KVIK_SIMD_AVX2
inline WideBytes subtract(WideBytes a, int x) {
  return each_byte([&](int i) { return a.v[i] - x; });
}
#endif

#endif

} // namespace
