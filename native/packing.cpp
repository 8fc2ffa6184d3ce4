#include "packing.h"

#include <cstring>
#include <new>
#include <vector>

#include "half.h"

namespace kvik {

// 32 columns of one row: value[k] = scales[k / scale_group] * quants[k] + minima[k / scale_group].
struct Group {
  int8_t quants[kGroup];
  float scales[2];
  float minima[2];
};

// Block layouts: GGUF specification and the format definitions in ggml-common.h.
struct GgufType {
  std::string_view name;
  int block_columns, block_bytes;
  int block_format; // index into kBlockFormats, or -1
  FloatFormat float_format;
  void (*unpack)(const uint8_t *block, int part, Group &out); // columns 32*part ... of a block
  int quants_at = -1; // where a block's quants begin that the container holds byte for byte, behind half scales
};

namespace {

float read_half(const uint8_t *p) {
  Half half;
  std::memcpy(&half, p, 2);
  return to_float(half);
}

uint32_t read_u32(const uint8_t *p) {
  uint32_t value;
  std::memcpy(&value, p, 4);
  return value;
}

int nibble(const uint8_t *quants, int k) { return k < 16 ? quants[k] & 15 : quants[k - 16] >> 4; }
int fifth_bit(uint32_t bits, int k) { return static_cast<int>(bits >> k & 1) << 4; }

void unpack_q4_0(const uint8_t *block, int, Group &out) {
  out.scales[0] = read_half(block);
  for (int k = 0; k < kGroup; ++k) out.quants[k] = static_cast<int8_t>(nibble(block + 2, k));
}

void unpack_q4_1(const uint8_t *block, int, Group &out) {
  out.scales[0] = read_half(block);
  out.minima[0] = read_half(block + 2);
  for (int k = 0; k < kGroup; ++k) out.quants[k] = static_cast<int8_t>(nibble(block + 4, k));
}

void unpack_q5_0(const uint8_t *block, int, Group &out) {
  out.scales[0] = read_half(block);
  const uint32_t high = read_u32(block + 2);
  for (int k = 0; k < kGroup; ++k)
    out.quants[k] = static_cast<int8_t>((nibble(block + 6, k) | fifth_bit(high, k)) - 16);
}

void unpack_q5_1(const uint8_t *block, int, Group &out) {
  out.scales[0] = read_half(block);
  out.minima[0] = read_half(block + 2);
  const uint32_t high = read_u32(block + 4);
  for (int k = 0; k < kGroup; ++k) out.quants[k] = static_cast<int8_t>(nibble(block + 8, k) | fifth_bit(high, k));
}

void unpack_q8_0(const uint8_t *block, int, Group &out) {
  out.scales[0] = read_half(block);
  std::memcpy(out.quants, block + 2, kGroup);
}

// The K formats: 256 columns a block. Part p is columns 32p ... 32p+31; `half` and `shift` find its bits.

void unpack_q2_k(const uint8_t *block, int part, Group &out) {
  const uint8_t *quants = block + 16 + part / 4 * 32;
  const float scale = read_half(block + 80), minimum = read_half(block + 82);
  for (int i = 0; i < 2; ++i) {
    const uint8_t packed = block[2 * part + i];
    out.scales[i] = scale * static_cast<float>(packed & 15);
    out.minima[i] = -minimum * static_cast<float>(packed >> 4);
  }
  for (int k = 0; k < kGroup; ++k) out.quants[k] = static_cast<int8_t>(quants[k] >> (2 * (part % 4)) & 3);
}

void unpack_q3_k(const uint8_t *block, int part, Group &out) {
  const uint8_t *high = block, *quants = block + 32 + part / 4 * 32, *scales = block + 96;
  const float scale = read_half(block + 108);
  for (int i = 0; i < 2; ++i) {
    const int index = 2 * part + i;
    const int low4 = index < 8 ? scales[index] & 15 : scales[index - 8] >> 4;
    const int high2 = scales[8 + index % 4] >> (2 * (index / 4)) & 3;
    out.scales[i] = scale * static_cast<float>((low4 | high2 << 4) - 32);
  }
  for (int k = 0; k < kGroup; ++k) {
    const int low2 = quants[k] >> (2 * (part % 4)) & 3;
    out.quants[k] = static_cast<int8_t>(high[k] >> part & 1 ? low2 : low2 - 4);
  }
}

// Q4_K and Q5_K: eight 6-bit scales and minima in twelve bytes.
void read_scales_k(const uint8_t *block, int part, Group &out) {
  const uint8_t *packed = block + 4;
  const int j = part;
  const int scale = j < 4 ? packed[j] & 63 : (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4;
  const int minimum = j < 4 ? packed[j + 4] & 63 : packed[j + 4] >> 4 | (packed[j] >> 6) << 4;
  out.scales[0] = read_half(block) * static_cast<float>(scale);
  out.minima[0] = -read_half(block + 2) * static_cast<float>(minimum);
}

void unpack_q4_k(const uint8_t *block, int part, Group &out) {
  read_scales_k(block, part, out);
  const uint8_t *quants = block + 16 + part / 2 * 32;
  for (int k = 0; k < kGroup; ++k) out.quants[k] = static_cast<int8_t>(quants[k] >> (4 * (part % 2)) & 15);
}

void unpack_q5_k(const uint8_t *block, int part, Group &out) {
  read_scales_k(block, part, out);
  const uint8_t *high = block + 16, *quants = block + 48 + part / 2 * 32;
  for (int k = 0; k < kGroup; ++k)
    out.quants[k] = static_cast<int8_t>((quants[k] >> (4 * (part % 2)) & 15) | (high[k] >> part & 1) << 4);
}

void unpack_q6_k(const uint8_t *block, int part, Group &out) {
  const int half = part / 4, quarter = part % 4;
  const uint8_t *low = block + half * 64 + quarter % 2 * 32, *high = block + 128 + half * 32;
  const float scale = read_half(block + 208);
  for (int i = 0; i < 2; ++i)
    out.scales[i] = scale * static_cast<float>(static_cast<int8_t>(block[192 + 2 * part + i]));
  for (int k = 0; k < kGroup; ++k) {
    const int low4 = quarter < 2 ? low[k] & 15 : low[k] >> 4;
    out.quants[k] = static_cast<int8_t>((low4 | (high[k] >> (2 * quarter) & 3) << 4) - 32);
  }
}

constexpr int find_format(BlockFormat wanted) {
  for (int i = 0; i < kNumBlockFormats; ++i) {
    const BlockFormat &f = kBlockFormats[i];
    if (f.bits == wanted.bits && f.scale_group == wanted.scale_group && f.minimum == wanted.minimum &&
        f.scale_bytes == wanted.scale_bytes)
      return i;
  }
  return -1;
}

constexpr GgufType quantized(std::string_view name, int columns, int bytes, BlockFormat format,
                             void (*unpack)(const uint8_t *, int, Group &), int quants_at = -1) {
  return {name, columns, bytes, find_format(format), FloatFormat::f32, unpack, quants_at};
}
constexpr GgufType plain(std::string_view name, int bytes, FloatFormat format) {
  return {name, 1, bytes, -1, format, nullptr};
}

constexpr GgufType kTypes[] = {
    plain("F32", 4, FloatFormat::f32),
    plain("F16", 2, FloatFormat::f16),
    plain("BF16", 2, FloatFormat::bf16),
    quantized("Q4_0", 32, 18, {4, 32, Minimum::implied, 2}, unpack_q4_0, 2),
    quantized("Q4_1", 32, 20, {4, 32, Minimum::stored, 2}, unpack_q4_1, 4),
    quantized("Q5_0", 32, 22, {8, 32, Minimum::none, 2}, unpack_q5_0),
    quantized("Q5_1", 32, 24, {8, 32, Minimum::stored, 2}, unpack_q5_1),
    quantized("Q8_0", 32, 34, {8, 32, Minimum::none, 2}, unpack_q8_0, 2),
    quantized("Q2_K", 256, 84, {8, 16, Minimum::stored, 4}, unpack_q2_k),
    quantized("Q3_K", 256, 110, {8, 16, Minimum::none, 4}, unpack_q3_k),
    quantized("Q4_K", 256, 144, {4, 32, Minimum::stored, 4}, unpack_q4_k),
    quantized("Q5_K", 256, 176, {8, 32, Minimum::stored, 4}, unpack_q5_k),
    quantized("Q6_K", 256, 210, {8, 16, Minimum::none, 4}, unpack_q6_k),
};

void store_scales(uint8_t *out, const float *values, int scale_bytes) {
  for (int r = 0; r < kRowBlock; ++r) {
    if (scale_bytes == 4) {
      std::memcpy(out + 4 * r, values + r, 4);
    } else { // came from a half, so nothing is lost
      const Half half = to_half(values[r]);
      std::memcpy(out + 2 * r, &half, 2);
    }
  }
}

// Eight rows of 32 columns into one packed block.
void interleave(const Group (&rows)[kRowBlock], const BlockFormat &format, uint8_t *out) {
  for (int r = 0; r < kRowBlock; ++r) {
    const int8_t *quants = rows[r].quants;
    if (format.bits == 8) {
      for (int j = 0; j < 8; ++j) std::memcpy(out + 32 * j + 4 * r, quants + 4 * j, 4);
    } else {
      for (int k = 0; k < 16; ++k)
        out[32 * (k / 4) + 4 * r + k % 4] = static_cast<uint8_t>(quants[k] | quants[k + 16] << 4);
    }
  }
  uint8_t *scales = out + format.quant_bytes(), *minima = scales + format.scales_bytes();
  for (int part = 0; part < format.scale_groups(); ++part) {
    float lanes[2][kRowBlock];
    for (int r = 0; r < kRowBlock; ++r) {
      lanes[0][r] = rows[r].scales[part];
      lanes[1][r] = rows[r].minima[part];
    }
    const int at = part * kRowBlock * format.scale_bytes;
    store_scales(scales + at, lanes[0], format.scale_bytes);
    if (format.minimum == Minimum::stored) store_scales(minima + at, lanes[1], format.scale_bytes);
  }
}

// The same for blocks whose quants, and halves before them, are in the container as they are: only their places differ.
void interleave_bytes(const uint8_t *const (&blocks)[kRowBlock], const GgufType &type, uint8_t *out) {
  const BlockFormat &format = kBlockFormats[type.block_format];
  uint8_t *halves = out + format.quant_bytes();
  for (int r = 0; r < kRowBlock; ++r) {
    for (int at = 0; at < format.quant_bytes() / kRowBlock; at += 4)
      std::memcpy(out + kRowBlock * at + 4 * r, blocks[r] + type.quants_at + at, 4);
    for (int at = 0; at < type.quants_at; at += 2) std::memcpy(halves + kRowBlock * at + 2 * r, blocks[r] + at, 2);
  }
}

void pack_quantized_rows(const GgufType &type, const uint8_t *source, int64_t rows, int64_t columns, int64_t row_block,
                         uint8_t *out) {
  const BlockFormat &format = kBlockFormats[type.block_format];
  const int64_t source_row = row_bytes(type, columns);
  const int parts = type.block_columns / kGroup;
  if (type.quants_at >= 0) {
    const std::vector<uint8_t> zeros(static_cast<std::size_t>(type.block_bytes)); // rows past the end
    for (int64_t group = 0; group < columns / kGroup; ++group, out += format.block_bytes()) {
      const uint8_t *blocks[kRowBlock];
      for (int r = 0; r < kRowBlock; ++r) {
        const int64_t row = row_block * kRowBlock + r;
        blocks[r] = row < rows ? source + row * source_row + group * type.block_bytes : zeros.data();
      }
      interleave_bytes(blocks, type, out);
    }
    return;
  }
  for (int64_t group = 0; group < columns / kGroup; ++group, out += format.block_bytes()) {
    Group unpacked[kRowBlock] = {}; // rows past the end stay zero
    for (int r = 0; r < kRowBlock && row_block * kRowBlock + r < rows; ++r) {
      const uint8_t *row = source + (row_block * kRowBlock + r) * source_row;
      type.unpack(row + group / parts * type.block_bytes, static_cast<int>(group % parts), unpacked[r]);
    }
    interleave(unpacked, format, out);
  }
}

void pack_float_rows(const GgufType &type, const uint8_t *source, int64_t rows, int64_t columns, int64_t row_block,
                     uint8_t *out) {
  const int64_t size = type.block_bytes;
  std::memset(out, 0, static_cast<std::size_t>(columns * kRowBlock * size));
  for (int r = 0; r < kRowBlock && row_block * kRowBlock + r < rows; ++r) {
    const uint8_t *row = source + (row_block * kRowBlock + r) * columns * size;
    for (int64_t k = 0; k < columns; ++k)
      std::memcpy(out + (k * kRowBlock + r) * size, row + k * size, static_cast<std::size_t>(size));
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

WeightPacker::WeightPacker(const GgufType &type, int64_t rows, int64_t columns, WeightArena &arena)
    : type_(type), weight_{rows, columns, type.block_format, type.float_format, 0, nullptr} {
  row_block_bytes_ = weight_.quantized() ? columns / kGroup * kBlockFormats[type.block_format].block_bytes()
                                         : columns * kRowBlock * type.block_bytes;
  if (__builtin_mul_overflow(weight_.row_blocks(), row_block_bytes_, &weight_.num_bytes)) throw std::bad_alloc();
  weight_.data = arena.allocate(weight_.num_bytes);
}

void WeightPacker::add(const uint8_t *source, int64_t count, ThreadPool &pool) {
  const auto pack_rows = weight_.quantized() ? pack_quantized_rows : pack_float_rows;
  uint8_t *start = weight_.data.get() + filled_rows_ / kRowBlock * row_block_bytes_;
  pool.for_ranges((count + kRowBlock - 1) / kRowBlock, 1, [&](int64_t first, int64_t last) {
    for (int64_t row_block = first; row_block < last; ++row_block)
      pack_rows(type_, source, count, weight_.columns, row_block, start + row_block * row_block_bytes_);
  });
  filled_rows_ += count;
}

} // namespace kvik
