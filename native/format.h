// How weights lie in memory: the one packed container.
//
// A weight matrix (rows, columns) is cut into row blocks of 8 rows. Quantised formats cut columns by 32:
//
//   4 bits: 4 vectors of 32 bytes; in vector v, byte 4r+b holds row r: low nibble k = 4v+b, high nibble k = 16+4v+b
//   8 bits: 8 vectors of 32 bytes; in vector v, byte 4r+b holds row r, k = 4v+b, signed
//   then for each scale group: 8 scales (one a row), and after all scales 8 minima a scale group where they are stored
//
// so that one vector is 8 rows by 4 columns, and no matrix product adds across lanes. Float formats are
// [column][8 rows].
// value = scale * quant + minimum.
#pragma once

#include <cstdint>

namespace kvik {

constexpr int kRowBlock = 8; // rows that are interleaved
constexpr int kGroup = 32;   // columns of one packed block, and of the activations that share a scale

enum class Minimum : uint8_t {
  none,
  stored,
  implied, // -8 * scale: unsigned nibbles that stand for -8 ... 7
};

struct BlockFormat {
  int bits;
  int scale_group; // columns that share a scale
  Minimum minimum;
  int scale_bytes; // 2: float16, 4: float32

  constexpr int scale_groups() const { return kGroup / scale_group; }
  constexpr int quant_bytes() const { return kRowBlock * kGroup * bits / 8; }
  constexpr int scales_bytes() const { return scale_groups() * kRowBlock * scale_bytes; }
  constexpr int block_bytes() const { return quant_bytes() + scales_bytes() * (minimum == Minimum::stored ? 2 : 1); }
};

// The GGUF formats that each of them holds without loss stand behind it.
inline constexpr BlockFormat kBlockFormats[] = {
    {4, 32, Minimum::implied, 2}, // Q4_0
    {4, 32, Minimum::stored, 2},  // Q4_1
    {4, 32, Minimum::stored, 4},  // Q4_K
    {8, 32, Minimum::none, 2},    // Q5_0, Q8_0
    {8, 32, Minimum::stored, 2},  // Q5_1
    {8, 32, Minimum::stored, 4},  // Q5_K
    {8, 16, Minimum::none, 4},    // Q3_K, Q6_K
    {8, 16, Minimum::stored, 4},  // Q2_K
};
constexpr int kNumBlockFormats = sizeof(kBlockFormats) / sizeof(kBlockFormats[0]);

enum class FloatFormat : uint8_t { f16, bf16, f32 };
constexpr int kNumFloatFormats = 3;

} // namespace kvik
