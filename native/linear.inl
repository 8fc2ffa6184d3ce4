// y = x W^T over packed weights. Lanes are output rows; every output adds its groups in column order, one fused
// multiply-add each for scale and minimum, whether one token is computed or a thousand: the same bits.

namespace {

using kvik::Activations;
using kvik::BlockFormat;
using kvik::kBlockFormats;
using kvik::kGroup;
using kvik::kRowBlock;
using kvik::LinearArgs;
using kvik::Minimum;

template <int scale_bytes> inline Float8 load_scales(const uint8_t *p) {
  if constexpr (scale_bytes == 2)
    return load(reinterpret_cast<const Half *>(p));
  else
    return load(reinterpret_cast<const float *>(p));
}

// One packed block of 8 rows by 32 columns: the vector for columns 4j ... 4j+3, unpacked.
template <int bits> inline Byte32 unpack(const uint8_t *block, int j) {
  if constexpr (bits == 8)
    return load_bytes(block + 32 * j);
  else
    return j < 4 ? low_nibbles(load_bytes(block + 32 * j)) : high_nibbles(load_bytes(block + 32 * (j - 4)));
}

// The exact integer products of one weight vector with four activations a row, added up over columns.
// 4 bits: at most 8 * 2 * 15 * 127 = 30,480 fits 16 bits, so the widening waits until the group ends.
template <int bits> struct Dot;
template <> struct Dot<4> {
  Int16x16 sum = zero16();
  void add(Byte32 w, Byte32 a) { sum = sum + multiply_pairs(w, a); }
  Int32x8 total() const { return add_pairs(sum); }
};
template <> struct Dot<8> {
  Int32x8 sum = zero32();
  // |w| * (sign(w) a): at most 2 * 128 * 127 = 32,512 a pair.
  void add(Byte32 w, Byte32 a) { sum = sum + add_pairs(multiply_pairs(abs_bytes(w), apply_sign(a, w))); }
  Int32x8 total() const { return sum; }
};

inline void store_rows(const LinearArgs &args, int64_t row_block, int64_t token, Float8 y) {
  float *out = args.y + token * args.rows + row_block * kRowBlock;
  const float *residual = args.residual ? args.residual + token * args.rows + row_block * kRowBlock : nullptr;
  const int64_t rows = args.rows - row_block * kRowBlock;
  if (rows >= kRowBlock) return store(out, residual ? load(residual) + y : y);
  float lanes[kLanes] = {};
  if (residual) {
    std::memcpy(lanes, residual, static_cast<std::size_t>(rows) * sizeof(float));
    y = load(lanes) + y;
  }
  store(lanes, y);
  std::memcpy(out, lanes, static_cast<std::size_t>(rows) * sizeof(float));
}

// `blocks` neighbouring row blocks for `tokens` neighbouring tokens.
template <BlockFormat format, bool fine, int blocks, int tokens>
inline void quantized_tile(const LinearArgs &args, int64_t row_block, int64_t token) {
  constexpr int kVectors = 8 / format.groups(); // weight vectors of one scale
  const int64_t groups = args.columns / kGroup;
  const int64_t row_block_bytes = groups * format.block_bytes();
  const uint8_t *weight = args.weight + row_block * row_block_bytes;
  const Activations &a = args.quantized;

  Float8 y[blocks][tokens];
  for (auto &row : y)
    for (Float8 &lane : row) lane = zero8();

  for (int64_t group = 0; group < groups; ++group) {
    for (int part = 0; part < format.groups(); ++part) {
      Dot<format.bits> high[blocks][tokens];
      [[maybe_unused]] Dot<format.bits> low[blocks][tokens];
      for (int j = part * kVectors; j < (part + 1) * kVectors; ++j) {
        Byte32 w[blocks];
        for (int b = 0; b < blocks; ++b) {
          const uint8_t *block = weight + b * row_block_bytes + group * format.block_bytes();
          if (j % 2 == 0) prefetch(block + 2048 + 32 * j);
          w[b] = unpack<format.bits>(block, j);
        }
        for (int t = 0; t < tokens; ++t) {
          const int64_t at = (token + t) * args.columns + group * kGroup + 4 * j;
          const Byte32 q = broadcast4(a.high + at);
          for (int b = 0; b < blocks; ++b) high[b][t].add(w[b], q);
          if constexpr (fine) {
            const Byte32 rest = broadcast4(a.low + at);
            for (int b = 0; b < blocks; ++b) low[b][t].add(w[b], rest);
          }
        }
      }
      for (int b = 0; b < blocks; ++b) {
        const uint8_t *scales = weight + b * row_block_bytes + group * format.block_bytes() + format.quant_bytes() +
                                part * kRowBlock * format.scale_bytes;
        const Float8 scale = load_scales<format.scale_bytes>(scales);
        for (int t = 0; t < tokens; ++t) {
          const int64_t at = (token + t) * groups + group;
          Int32x8 dot = high[b][t].total();
          if constexpr (fine) dot = scale_int(dot, 254) + low[b][t].total();
          y[b][t] = fma(scale * broadcast(a.scale[at]), to_float(dot), y[b][t]);
          if constexpr (format.minimum != Minimum::none) {
            const Float8 minimum = format.minimum == Minimum::implied
                                       ? scale * broadcast(-8.0f)
                                       : load_scales<format.scale_bytes>(scales + format.scales_bytes());
            const float *sums = a.sums + 3 * at;
            y[b][t] = fma(minimum, broadcast(format.groups() == 1 ? sums[0] : sums[1 + part]), y[b][t]);
          }
        }
      }
    }
  }
  for (int b = 0; b < blocks; ++b)
    for (int t = 0; t < tokens; ++t) store_rows(args, row_block + b, token + t, y[b][t]);
}

template <class Weight, int blocks, int tokens>
inline void float_tile(const LinearArgs &args, int64_t row_block, int64_t token) {
  const Weight *weight = reinterpret_cast<const Weight *>(args.weight) + row_block * kRowBlock * args.columns;
  Float8 y[blocks][tokens];
  for (auto &row : y)
    for (Float8 &lane : row) lane = zero8();
  for (int64_t k = 0; k < args.columns; ++k) {
    Float8 w[blocks];
    for (int b = 0; b < blocks; ++b) w[b] = load(weight + (b * args.columns + k) * kRowBlock);
    for (int t = 0; t < tokens; ++t) {
      const Float8 x = broadcast(args.x[(token + t) * args.columns + k]);
      for (int b = 0; b < blocks; ++b) y[b][t] = fma(w[b], x, y[b][t]);
    }
  }
  for (int b = 0; b < blocks; ++b)
    for (int t = 0; t < tokens; ++t) store_rows(args, row_block + b, token + t, y[b][t]);
}

// Covers row blocks [first, last) and all tokens with tiles of 2 row blocks by 4 tokens, then what is left.
// Chunks of 64 tokens keep the activations in the L2 cache while the weights stream by once a chunk.
template <class Tile> inline void cover(const LinearArgs &args, int64_t first, int64_t last, Tile tile) {
  constexpr int64_t kChunk = 64;
  for (int64_t chunk = 0; chunk < args.num_tokens; chunk += kChunk) {
    const int64_t end = smaller(chunk + kChunk, args.num_tokens);
    int64_t block = first;
    for (; block + 2 <= last; block += 2) {
      int64_t token = chunk;
      for (; token + 4 <= end; token += 4) tile.template run<2, 4>(args, block, token);
      for (; token < end; ++token) tile.template run<2, 1>(args, block, token);
    }
    if (block < last) {
      int64_t token = chunk;
      for (; token + 4 <= end; token += 4) tile.template run<1, 4>(args, block, token);
      for (; token < end; ++token) tile.template run<1, 1>(args, block, token);
    }
  }
}

template <BlockFormat format, bool fine> struct QuantizedTile {
  template <int blocks, int tokens> static void run(const LinearArgs &args, int64_t row_block, int64_t token) {
    quantized_tile<format, fine, blocks, tokens>(args, row_block, token);
  }
};
template <class Weight> struct FloatTile {
  template <int blocks, int tokens> static void run(const LinearArgs &args, int64_t row_block, int64_t token) {
    float_tile<Weight, blocks, tokens>(args, row_block, token);
  }
};

template <int format, bool fine> void quantized_linear(const LinearArgs &args, int64_t first, int64_t last) {
  cover(args, first, last, QuantizedTile<kBlockFormats[format], fine>{});
}
template <class Weight> void float_linear(const LinearArgs &args, int64_t first, int64_t last) {
  cover(args, first, last, FloatTile<Weight>{});
}

// Four vectors make a group. Values too small for a scale that float32 divides by become zero.
void quantize_row(const float *x, int64_t columns, bool fine, const kvik::ActivationsOut &out) {
  const float levels = fine ? 32384.0f : 127.0f; // 254 * 127.5 - 1: the high half must not round to 128
  for (int64_t group = 0; group < columns / kGroup; ++group) {
    const float *values = x + group * kGroup;
    Float8 largest = zero8(), defect = zero8(); // x - x: NaN where x is NaN or infinite, else zero
    for (int i = 0; i < kGroup; i += kLanes) {
      const Float8 v = load(values + i);
      largest = max(abs(v), largest);
      defect = defect + (v - v);
    }
    const float top = max_lanes(largest);
    const bool usable = top > 1e-30f;
    const Float8 inverse = broadcast(usable ? levels / top : 0.0f);
    const float scale = (usable ? top / levels : 0.0f) + add_lanes(defect); // what is no number must not vanish

    int32_t quants[kGroup];
    for (int i = 0; i < kGroup; i += kLanes) {
      const Float8 scaled = max(min(load(values + i) * inverse, broadcast(levels)), broadcast(-levels));
      store(quants + i, to_int(scaled));
    }
    int32_t sums[2] = {0, 0};
    for (int i = 0; i < kGroup; ++i) {
      sums[i / 16] += quants[i];
      const int64_t at = group * kGroup + i;
      if (fine) {
        const int32_t high = static_cast<int32_t>(nearbyintf(static_cast<float>(quants[i]) * (1.0f / 254)));
        out.high[at] = static_cast<int8_t>(high);
        out.low[at] = static_cast<int8_t>(quants[i] - 254 * high);
      } else {
        out.high[at] = static_cast<int8_t>(quants[i]);
      }
    }
    out.scale[group] = scale;
    out.sums[3 * group] = scale * static_cast<float>(sums[0] + sums[1]);
    out.sums[3 * group + 1] = scale * static_cast<float>(sums[0]);
    out.sums[3 * group + 2] = scale * static_cast<float>(sums[1]);
  }
}

template <int bits> inline int quant_at(const uint8_t *block, int row, int k) {
  if constexpr (bits == 8) return static_cast<int8_t>(block[32 * (k / 4) + 4 * row + k % 4]);
  const int byte = block[32 * (k % 16 / 4) + 4 * row + k % 4];
  return k < 16 ? byte & 15 : byte >> 4;
}

// Rounds like the formats' own definition: the product, then the sum.
template <BlockFormat format> void dequantize_packed(const uint8_t *weight, int64_t columns, int64_t row, float *out) {
  const int lane = static_cast<int>(row % kRowBlock);
  const uint8_t *block = weight + row / kRowBlock * (columns / kGroup) * format.block_bytes();
  for (int64_t start = 0; start < columns; start += kGroup, block += format.block_bytes()) {
    for (int k = 0; k < kGroup; ++k) {
      const uint8_t *scales = block + format.quant_bytes() + k / format.group * kRowBlock * format.scale_bytes;
      float lanes[kLanes];
      store(lanes, load_scales<format.scale_bytes>(scales));
      const float scale = lanes[lane];
      float minimum = format.minimum == Minimum::implied ? -8.0f * scale : 0.0f;
      if constexpr (format.minimum == Minimum::stored) {
        store(lanes, load_scales<format.scale_bytes>(scales + format.scales_bytes()));
        minimum = lanes[lane];
      }
      out[start + k] = scale * static_cast<float>(quant_at<format.bits>(block, lane, k)) + minimum;
    }
  }
}

template <std::size_t... format> void dequantize_row(int index, const uint8_t *weight, int64_t columns, int64_t row,
                                                     float *out, std::index_sequence<format...>) {
  static constexpr void (*kernels[])(const uint8_t *, int64_t, int64_t,
                                     float *) = {dequantize_packed<kBlockFormats[format]>...};
  kernels[index](weight, columns, row, out);
}

void dequantize_row(int format, const uint8_t *weight, int64_t columns, int64_t row, float *out) {
  dequantize_row(format, weight, columns, row, out, std::make_index_sequence<kvik::kNumBlockFormats>{});
}

} // namespace
