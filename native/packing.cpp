#include "packing.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "half.h"

namespace kvik {

// Block layouts: GGUF specification and the format definitions in ggml-common.h.
struct GgufType {
  std::string_view name;
  int block_columns, block_bytes;
  int block_format; // index into kBlockFormats, or -1
  FloatFormat float_format;
  int low_at, high_at; // where a block's two planes of quants begin, in bytes
};

namespace {

constexpr GgufType quantized(std::string_view name, int bytes, Format format, int low_at, int high_at = 0) {
  const int index = static_cast<int>(format);
  return {name, kBlockFormats[index].columns, bytes, index, FloatFormat::f32, low_at, high_at};
}
constexpr GgufType plain(std::string_view name, int bytes, FloatFormat format) {
  return {name, 1, bytes, -1, format, 0, 0};
}

constexpr GgufType kTypes[] = {
    plain("F32", 4, FloatFormat::f32),
    plain("F16", 2, FloatFormat::f16),
    plain("BF16", 2, FloatFormat::bf16),
    quantized("Q4_0", 18, Format::q4_0, 2),
    quantized("Q4_1", 20, Format::q4_1, 4),
    quantized("Q5_0", 22, Format::q5_0, 6, 2),
    quantized("Q5_1", 24, Format::q5_1, 8, 4),
    quantized("Q8_0", 34, Format::q8_0, 2),
    quantized("IQ4_NL", 18, Format::iq4_nl, 2),
    quantized("MXFP4", 17, Format::mxfp4, 1),
    quantized("Q2_K", 84, Format::q2_k, 16),
    quantized("Q3_K", 110, Format::q3_k, 32, 0),
    quantized("Q4_K", 144, Format::q4_k, 16),
    quantized("Q5_K", 176, Format::q5_k, 48, 16),
    quantized("Q6_K", 210, Format::q6_k, 0, 128),
    quantized("IQ4_XS", 136, Format::iq4_xs, 8),
};

uint64_t read_u64(const uint8_t *p) {
  uint64_t value;
  std::memcpy(&value, p, 8);
  return value;
}

constexpr uint64_t kLowNibbles = 0x0f0f0f0f0f0f0f0f;

// The low nibbles of two runs of bytes side by side into one, the high ones into another.
void pair_nibbles(const uint8_t *a, const uint8_t *b, int count, uint8_t *low, uint8_t *high) {
  for (int i = 0; i < count; i += 8) {
    const uint64_t x = read_u64(a + i), y = read_u64(b + i);
    const uint64_t lows = (x & kLowNibbles) | (y & kLowNibbles) << 4;
    const uint64_t highs = (x >> 4 & kLowNibbles) | (y & ~kLowNibbles);
    std::memcpy(low + i, &lows, 8);
    std::memcpy(high + i, &highs, 8);
  }
}

// Bit k of 32 becomes bit k / 4 of byte k % 4.
uint32_t bits_by_quad(uint32_t bits) {
  uint32_t out = 0;
  for (int b = 0; b < 4; ++b) {
    const uint32_t every_fourth = bits >> b & 0x11111111;
    // Eight bits, four apart, meet in the top byte.
    const uint32_t pairs = (every_fourth | every_fourth >> 3) & 0x03030303;
    const uint32_t fours = (pairs | pairs >> 6) & 0x000f000f;
    out |= ((fours | fours >> 12) & 0xff) << (8 * b);
  }
  return out;
}

// One row's quants in the order of a plane: columns * bits / 8 bytes, most often those of the block.
const uint8_t *low_plane(const GgufType &type, const uint8_t *block, uint8_t *space) {
  const uint8_t *quants = block + type.low_at;
  if (type.block_format == static_cast<int>(Format::q6_k)) { // parts 0 and 2, 1 and 3 share bytes there
    for (int half = 0; half < 2; ++half, space += 64) {
      pair_nibbles(quants + 64 * half, quants + 64 * half + 32, 32, space, space + 32);
    }
    return space - 128;
  }
  if (type.block_format == static_cast<int>(Format::iq4_xs)) { // columns k and k + 16 of a part share a byte there
    for (int part = 0; part < kParts; part += 2)
      pair_nibbles(quants + 16 * part, quants + 16 * part + 16, 16, space + 16 * part, space + 16 * part + 16);
    return space;
  }
  return quants;
}
const uint8_t *high_plane(const GgufType &type, const uint8_t *block, uint8_t *space) {
  const uint8_t *quants = block + type.high_at;
  if (type.block_columns > kGroup) return quants;
  uint32_t bits;
  std::memcpy(&bits, quants, 4);
  bits = bits_by_quad(bits);
  std::memcpy(space, &bits, 4);
  return space;
}

// Sixteen bytes of a row: what the compiler has instructions for on any processor.
using FourBytes = uint32_t __attribute__((vector_size(16)));
using TwoBytes = uint16_t __attribute__((vector_size(16)));

template <class Vector> Vector load16(const uint8_t *source) {
  Vector value;
  std::memcpy(&value, source, 16);
  return value;
}

// Item i of four rows becomes row i, and goes to out + i * stride.
void store_transposed(const FourBytes (&rows)[4], uint8_t *out, int64_t stride) {
  const FourBytes a = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
  const FourBytes b = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
  const FourBytes c = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
  const FourBytes d = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
  const FourBytes items[] = {__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
                             __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) std::memcpy(out + i * stride, &items[i], 16);
}

// Rows of `bytes` bytes become [4 bytes][16 rows].
void interleave_plane(const uint8_t *const (&rows)[kRowBlock], int64_t bytes, uint8_t *out) {
  int64_t at = 0;
  for (; at + 16 <= bytes; at += 16, out += 16 * kRowBlock) {
    for (int r = 0; r < kRowBlock; r += 4) {
      const FourBytes four[] = {load16<FourBytes>(rows[r] + at), load16<FourBytes>(rows[r + 1] + at),
                                load16<FourBytes>(rows[r + 2] + at), load16<FourBytes>(rows[r + 3] + at)};
      store_transposed(four, out + 4 * r, 4 * kRowBlock);
    }
  }
  for (; at < bytes; at += 4, out += 4 * kRowBlock)
    for (int r = 0; r < kRowBlock; ++r) std::memcpy(out + 4 * r, rows[r] + at, 4);
}

// Rows of `bytes` bytes become [2 bytes][16 rows].
void interleave_halves(const uint8_t *const (&rows)[kRowBlock], int64_t bytes, uint8_t *out) {
  int64_t at = 0;
  for (; at + 16 <= bytes; at += 16, out += 16 * kRowBlock) {
    for (int first = 0; first < kRowBlock; first += 8) {
      FourBytes low[4], high[4]; // of two rows each: columns 0 to 3, columns 4 to 7
      for (int pair = 0; pair < 4; ++pair) {
        const TwoBytes a = load16<TwoBytes>(rows[first + 2 * pair] + at);
        const TwoBytes b = load16<TwoBytes>(rows[first + 2 * pair + 1] + at);
        low[pair] = reinterpret_cast<FourBytes>(__builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11));
        high[pair] = reinterpret_cast<FourBytes>(__builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15));
      }
      store_transposed(low, out + 2 * first, 2 * kRowBlock);
      store_transposed(high, out + 2 * first + 8 * kRowBlock, 2 * kRowBlock);
    }
  }
  for (; at < bytes; at += 2, out += 2 * kRowBlock)
    for (int r = 0; r < kRowBlock; ++r) std::memcpy(out + 2 * r, rows[r] + at, 2);
}

// Q4_K and Q5_K: eight 6-bit scales, then as many minima, in twelve bytes.
void read_scales_k(const uint8_t *packed, uint8_t *scales) {
  uint32_t a, b, c;
  std::memcpy(&a, packed, 4);
  std::memcpy(&b, packed + 4, 4);
  std::memcpy(&c, packed + 8, 4);
  constexpr uint32_t kSix = 0x3f3f3f3f, kFour = 0x0f0f0f0f, kTwo = 0x03030303;
  const uint32_t words[] = {a & kSix, (c & kFour) | (a >> 6 & kTwo) << 4, b & kSix,
                            (c >> 4 & kFour) | (b >> 6 & kTwo) << 4};
  std::memcpy(scales, words, 16);
}

// The first bytes of all rows, the second ones ...: `count` of them, of rows of 16 bytes.
void transpose_bytes(const uint8_t *const (&rows)[kRowBlock], int count, uint8_t *out) {
  using Bytes = uint8_t __attribute__((vector_size(16)));
  Bytes from[kRowBlock], to[kRowBlock];
  for (int r = 0; r < kRowBlock; ++r) from[r] = load16<Bytes>(rows[r]);
  for (int round = 0; round < 4; ++round) { // each deals the second half of the rows in between the first
    for (int r = 0; r < 8; ++r) {
      to[2 * r] = __builtin_shufflevector(from[r], from[r + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      to[2 * r + 1] =
          __builtin_shufflevector(from[r], from[r + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    std::memcpy(from, to, sizeof(to));
  }
  std::memcpy(out, from, static_cast<std::size_t>(count) * kRowBlock);
}

// The arrays that Scales names, of one packed block.
void pack_scales(const GgufType &type, const uint8_t *const (&blocks)[kRowBlock], uint8_t *out) {
  constexpr int kHalves = 2 * kRowBlock;
  const BlockFormat &format = kBlockFormats[type.block_format];
  const auto halves = [&](int index, int at) {
    for (int r = 0; r < kRowBlock; ++r) std::memcpy(out + kHalves * index + 2 * r, blocks[r] + at, 2);
  };
  uint8_t space[kRowBlock][16];
  const uint8_t *rows[kRowBlock];
  const auto bytes = [&](int count, const auto &of_block) {
    for (int r = 0; r < kRowBlock; ++r) rows[r] = of_block(blocks[r], space[r]);
    transpose_bytes(rows, count, out + kHalves * (format.minimum ? 2 : 1));
  };
  switch (static_cast<Format>(type.block_format)) {
  case Format::mxfp4:
    for (int r = 0; r < kRowBlock; ++r) out[r] = blocks[r][0];
    return;
  case Format::q2_k:
    halves(0, 80);
    halves(1, 82);
    return bytes(16, [](const uint8_t *block, uint8_t *) { return block; });
  case Format::q3_k:
    halves(0, 108);
    return bytes(12, [](const uint8_t *block, uint8_t *made) -> const uint8_t * {
      std::memcpy(made, block + 96, 12);
      std::memset(made + 12, 0, 4);
      return made;
    });
  case Format::q4_k:
  case Format::q5_k:
    halves(0, 0);
    halves(1, 2);
    return bytes(16, [](const uint8_t *block, uint8_t *made) -> const uint8_t * {
      read_scales_k(block + 4, made);
      return made;
    });
  case Format::q6_k:
    halves(0, 208);
    return bytes(16, [](const uint8_t *block, uint8_t *) { return block + 192; });
  case Format::iq4_xs:
    halves(0, 0);
    return bytes(8, [](const uint8_t *block, uint8_t *made) -> const uint8_t * {
      std::memset(made, 0, 16);
      for (int i = 0; i < kParts; ++i) {
        const int low4 = block[4 + i / 2] >> (4 * (i % 2)) & 15, high2 = block[2 + i / 4] >> (2 * (i % 4)) & 3;
        made[i] = static_cast<uint8_t>((low4 | high2 << 4) - 32);
      }
      return made;
    });
  default:
    halves(0, 0);
    if (format.minimum) halves(1, 2);
  }
}

void pack_quantized_rows(const GgufType &type, const uint8_t *source, int64_t rows, int64_t columns, int64_t row_block,
                         uint8_t *out) {
  const BlockFormat &format = kBlockFormats[type.block_format];
  static constexpr uint8_t kZeros[256] = {}; // rows past the end
  const int64_t source_row = row_bytes(type, columns), first = row_block * kRowBlock;
  const int count = static_cast<int>(std::min<int64_t>(kRowBlock, rows - first));
  for (int64_t at = 0; at < source_row; at += type.block_bytes, out += format.block_bytes()) {
    uint8_t space[kRowBlock][128];
    const uint8_t *blocks[kRowBlock], *planes[kRowBlock];
    for (int r = 0; r < kRowBlock; ++r) blocks[r] = r < count ? source + (first + r) * source_row + at : kZeros;
    for (int r = 0; r < kRowBlock; ++r) planes[r] = low_plane(type, blocks[r], space[r]);
    interleave_plane(planes, format.columns * format.low_bits / 8, out);
    if (format.high_bits) {
      for (int r = 0; r < kRowBlock; ++r) planes[r] = high_plane(type, blocks[r], space[r]);
      interleave_plane(planes, format.columns * format.high_bits / 8, out + format.low_bytes());
    }
    pack_scales(type, blocks, out + format.quant_bytes());
  }
}

void pack_float_rows(const GgufType &type, const uint8_t *source, int64_t rows, int64_t columns, int64_t row_block,
                     uint8_t *out) {
  constexpr int64_t kPiece = 1024;              // bytes of a row: what sixteen of them become stays in the L1 cache
  static constexpr uint8_t kZeros[kPiece] = {}; // rows past the end
  const int64_t row_bytes = columns * type.block_bytes, first = row_block * kRowBlock;
  const auto interleave = type.block_bytes == 2 ? interleave_halves : interleave_plane;
  for (int64_t at = 0; at < row_bytes; at += kPiece, out += kPiece * kRowBlock) {
    const uint8_t *pieces[kRowBlock];
    for (int r = 0; r < kRowBlock; ++r) pieces[r] = first + r < rows ? source + (first + r) * row_bytes + at : kZeros;
    interleave(pieces, std::min(kPiece, row_bytes - at), out);
  }
}

} // namespace

const GgufType *find_gguf_type(std::string_view name) {
  for (const GgufType &type : kTypes)
    if (type.name == name) return &type;
  return nullptr;
}

int64_t row_bytes(const GgufType &type, int64_t columns) { return columns / type.block_columns * type.block_bytes; }
int64_t columns_multiple(const GgufType &type) { return type.block_columns; }

PackedWeight unpacked_weight(const GgufType &type, int64_t rows, int64_t columns) {
  PackedWeight weight{rows, columns, type.block_format, type.float_format, 0, nullptr};
  const int64_t row_block_bytes = weight.quantized()
                                      ? columns / type.block_columns * kBlockFormats[type.block_format].block_bytes()
                                      : columns * kRowBlock * type.block_bytes;
  if (__builtin_mul_overflow(weight.row_blocks(), row_block_bytes, &weight.num_bytes)) throw std::bad_alloc();
  return weight;
}

void pack_row_block(const GgufType &type, const uint8_t *source, int64_t rows, int64_t columns, int64_t row_block,
                    uint8_t *out) {
  (type.block_format < 0 ? pack_float_rows : pack_quantized_rows)(type, source, rows, columns, row_block, out);
}

WeightPacker::WeightPacker(const GgufType &type, int64_t rows, int64_t columns, WeightArena &arena)
    : WeightPacker(type, rows, columns, arena.allocate(unpacked_weight(type, rows, columns).num_bytes)) {}

WeightPacker::WeightPacker(const GgufType &type, int64_t rows, int64_t columns, std::shared_ptr<uint8_t> memory)
    : type_(type), weight_(unpacked_weight(type, rows, columns)) {
  weight_.data = std::move(memory);
}

void WeightPacker::add(const uint8_t *source, int64_t count, ThreadPool &pool) {
  const int64_t row_block_bytes = weight_.row_block_bytes();
  uint8_t *start = weight_.data.get() + filled_rows_ / kRowBlock * row_block_bytes;
  pool.for_ranges((count + kRowBlock - 1) / kRowBlock, 1, [&](int64_t first, int64_t last) {
    for (int64_t row_block = first; row_block < last; ++row_block)
      pack_row_block(type_, source, count, weight_.columns, row_block, start + row_block * row_block_bytes);
  });
  filled_rows_ += count;
}

namespace {

int quant_at(const BlockFormat &format, const uint8_t *block, int row, int column) {
  const auto read = [&](int bits, const uint8_t *plane) {
    const auto [vector, field] = placed(format, bits, column / kGroup, column % kGroup / 4);
    return plane[4 * kRowBlock * vector + 4 * row + column % 4] >> (field * bits) & ((1 << bits) - 1);
  };
  int quant = read(format.low_bits, block);
  if (format.high_bits) quant |= read(format.high_bits, block + format.low_bytes()) << format.low_bits;
  if (format.codes == Codes::iq4) return kIq4Values[quant];
  if (format.codes == Codes::mxfp4) return kMxfp4Values[quant];
  return format.low_bits == 8 ? static_cast<int8_t>(quant) : quant - format.zero;
}

struct ScaleAndMinimum {
  float scale, minimum;
};

// Of scale group i of a packed block.
ScaleAndMinimum scale_at(const BlockFormat &format, const uint8_t *scales, int row, int i) {
  const auto half = [&](int index) {
    Half value;
    std::memcpy(&value, scales + 2 * (kRowBlock * index + row), 2);
    return to_float(value);
  };
  const uint8_t *bytes = scales + 2 * kRowBlock * (format.minimum ? 2 : 1) + row;
  const auto byte = [&](int index) { return static_cast<int>(bytes[kRowBlock * index]); };
  switch (format.scales) {
  case Scales::exponents:
    return {scales[row] < 2 ? 0 : std::ldexp(1.0f, scales[row] - 128), 0}; // subnormal, which counts as zero
  case Scales::bytes:
    return {half(0) * static_cast<float>(byte(i)), -half(1) * static_cast<float>(byte(kParts + i))};
  case Scales::signed_bytes:
    return {half(0) * static_cast<float>(static_cast<int8_t>(byte(i))), 0};
  case Scales::six_bits:
    return {half(0) * static_cast<float>(
                          ((byte(i % 8) >> (4 * (i / 8)) & 15) | (byte(8 + i % 4) >> (2 * (i / 4)) & 3) << 4) - 32),
            0};
  case Scales::nibbles:
    return {half(0) * static_cast<float>(byte(i) & 15), -half(1) * static_cast<float>(byte(i) >> 4)};
  default:
    return {half(0), format.minimum ? half(1) : 0};
  }
}

float read_float(const PackedWeight &weight, int64_t row, int64_t column) {
  const int64_t at = (row / kRowBlock * weight.columns + column) * kRowBlock + row % kRowBlock;
  switch (weight.float_format) {
  case FloatFormat::f16:
    return to_float(reinterpret_cast<const Half *>(weight.data.get())[at]);
  case FloatFormat::bf16:
    return to_float(reinterpret_cast<const BFloat16 *>(weight.data.get())[at]);
  default:
    return reinterpret_cast<const float *>(weight.data.get())[at];
  }
}

// Rounds like the formats' own definition: the product, then the sum.
void dequantize_row(const PackedWeight &weight, int64_t row, float *out) {
  const BlockFormat &format = kBlockFormats[weight.block_format];
  const int lane = static_cast<int>(row % kRowBlock);
  const int64_t blocks = weight.columns / format.columns;
  const uint8_t *block = weight.data.get() + row / kRowBlock * blocks * format.block_bytes();
  for (int64_t b = 0; b < blocks; ++b, block += format.block_bytes()) {
    for (int i = 0; i < format.columns / format.scale_group; ++i) {
      const auto [scale, minimum] = scale_at(format, block + format.quant_bytes(), lane, i);
      for (int k = i * format.scale_group; k < (i + 1) * format.scale_group; ++k)
        *out++ = scale * static_cast<float>(quant_at(format, block, lane, k)) + minimum;
    }
  }
}

} // namespace

void read_row(const PackedWeight &weight, int64_t row, float *out) {
  if (weight.quantized()) return dequantize_row(weight, row, out);
  for (int64_t k = 0; k < weight.columns; ++k) out[k] = read_float(weight, row, k);
}

} // namespace kvik
