// IEEE 754 half precision and bfloat16 as storage types, converted in plain C++ (round to nearest even).
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float to_float(BFloat16 h) { return float_from_bits(static_cast<uint32_t>(h.bits) << 16); }

inline float to_float(Half h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  const uint32_t magnitude = h.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) { // infinity, or NaN made quiet as the hardware does
    const uint32_t quiet = magnitude > 0x7c00u ? 0x400000u : 0u;
    return float_from_bits(sign | 0x7f800000u | quiet | (magnitude & 0x3ffu) << 13);
  }
  if (magnitude >= 0x400u) return float_from_bits(sign | ((magnitude << 13) + 0x38000000u));
  // Subnormal: the integer times 2**-24, which float32 holds exactly.
  const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
  return sign ? -value : value;
}

inline Half to_half(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) { // rounds to 2**16 or more
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {
    // Subnormal: adding 0.5 leaves the rounded multiple of 2**-24 in the low bits of the sum.
    half = bits_of(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  }
  return {static_cast<uint16_t>(sign | half)};
}

} // namespace
