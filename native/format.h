// How weights lie in memory: the one packed container, as large as the file's own formats.
//
// A weight matrix (rows, columns) is cut into row blocks of 16 rows, and each of them into packed blocks of 32 or 256
// columns. Quants lie in planes of 1, 2, 4 or 8 bits, low bits first. A plane is vectors of 64 bytes: byte 4r+b of a
// vector belongs to row r and to columns 4j+b, so that one vector is 16 rows by 4 columns (a *quad*, j of 8 in a *part*
// of 32 columns), and no matrix product adds across lanes. A byte has 8 / bits fields, the lowest first:
//
//   32 columns:  quad j is field j / bits of vector j % bits
//   256 columns: quad j of part p is field p % fields of vector p / fields * 8 + j
//
// Behind the planes come the scales, then what Scales says. Float formats are [column][16 rows].
// value = scale * (quant - zero) + minimum.
#pragma once

#include <cstdint>

namespace kvik {

constexpr int kRowBlock = 16; // rows that are interleaved
constexpr int kGroup = 32;    // columns of a part, and of the activations that share a scale
constexpr int kQuadsOfPart = kGroup / 4;
constexpr int kParts = 8; // of the largest packed block

// What a quant of 4 bits stands for.
enum class Codes : uint8_t { integers, iq4, mxfp4 };

// Each array is (..., 16 rows). Q4_K and their like have scales of their own for 256 columns, float16, which the small
// integer of a scale group multiplies: the product is exact in float32.
enum class Scales : uint8_t {
  halves,       // float16 scales; float16 minima
  exponents,    // E8M0: 2 ** (byte - 128)
  bytes,        // float16 of 256 columns, the same for minima; unsigned bytes (8), minima (8)
  signed_bytes, // float16 of 256 columns; signed bytes
  six_bits,     // float16 of 256 columns; twelve bytes as in a Q3_K block
  nibbles,      // float16 of 256 columns, the same for minima; bytes (16): low nibble the scale, high the minimum
};

struct BlockFormat {
  int columns;             // of a packed block
  int low_bits, high_bits; // of the two planes
  Codes codes;
  int zero;
  int scale_group; // columns that share a scale
  Scales scales;
  bool minimum;

  constexpr int parts() const { return columns / kGroup; }
  constexpr int scale_groups() const { return kGroup / scale_group; } // of a part
  constexpr int low_bytes() const { return kRowBlock * columns * low_bits / 8; }
  constexpr int quant_bytes() const { return low_bytes() + kRowBlock * columns * high_bits / 8; }
  constexpr int scale_bytes() const {
    const int halves = 2 * (minimum ? 2 : 1), count = columns / scale_group;
    switch (scales) {
    case Scales::halves:
      return kRowBlock * halves;
    case Scales::exponents:
      return kRowBlock;
    case Scales::bytes:
      return kRowBlock * (halves + 2 * count);
    case Scales::six_bits:
      return kRowBlock * (halves + 12);
    default:
      return kRowBlock * (halves + count);
    }
  }
  constexpr int block_bytes() const { return quant_bytes() + scale_bytes(); }
};

// The vector of a plane that holds a quad, and its field there.
struct PlacedQuad {
  int vector, field;
};
constexpr PlacedQuad placed(const BlockFormat &format, int bits, int part, int quad) {
  if (format.columns == kGroup) return {quad % bits, quad / bits};
  const int fields = 8 / bits;
  return {part / fields * kQuadsOfPart + quad, part % fields};
}

enum class Format : uint8_t { q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl, mxfp4, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_xs };

// In the order of Format. Quants of 8 bits are signed: there zero is what makes the byte unsigned, as in a table's
// codes.
inline constexpr BlockFormat kBlockFormats[] = {
    {32, 4, 0, Codes::integers, 8, 32, Scales::halves, false},
    {32, 4, 0, Codes::integers, 0, 32, Scales::halves, true},
    {32, 4, 1, Codes::integers, 16, 32, Scales::halves, false},
    {32, 4, 1, Codes::integers, 0, 32, Scales::halves, true},
    {32, 8, 0, Codes::integers, 128, 32, Scales::halves, false},
    {32, 4, 0, Codes::iq4, 128, 32, Scales::halves, false},
    {32, 4, 0, Codes::mxfp4, 12, 32, Scales::exponents, false},
    {256, 2, 0, Codes::integers, 0, 16, Scales::nibbles, true},
    {256, 2, 1, Codes::integers, 4, 16, Scales::six_bits, false},
    {256, 4, 0, Codes::integers, 0, 32, Scales::bytes, true},
    {256, 4, 1, Codes::integers, 0, 32, Scales::bytes, true},
    {256, 4, 2, Codes::integers, 32, 16, Scales::signed_bytes, false},
    {256, 4, 0, Codes::iq4, 128, 32, Scales::signed_bytes, false},
};
constexpr int kNumBlockFormats = sizeof(kBlockFormats) / sizeof(kBlockFormats[0]);

// GGUF specification: the values of IQ4_NL's and IQ4_XS's codes, and twice those of MXFP4's.
inline constexpr int8_t kIq4Values[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
inline constexpr int8_t kMxfp4Values[] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

enum class FloatFormat : uint8_t { f16, bf16, f32 };
constexpr int kNumFloatFormats = 3;

} // namespace kvik
