// y = x W^T over packed weights. Lanes are output rows; every output adds its groups in column order, one fused
// multiply-add each for scale and minimum, whether one token is computed or a thousand: the same bits.

namespace {

using kvik::BlockFormat;
using kvik::kBlockFormats;
using kvik::kGroup;
using kvik::kRowBlock;
using kvik::LinearArgs;
using kvik::Minimum;
using kvik::QuantizedRows;

template <int scale_bytes> inline F32x8 load_scales(const uint8_t *p) {
  if constexpr (scale_bytes == 2)
    return load(reinterpret_cast<const Half *>(p));
  else
    return load(reinterpret_cast<const float *>(p));
}
template <int scale_bytes> inline Wide wide_scales(const uint8_t *p, int64_t next) {
  if constexpr (scale_bytes == 2)
    return wide_load(reinterpret_cast<const Half *>(p), next / 2);
  else
    return wide_load(reinterpret_cast<const float *>(p), next / 4);
}

inline void store_rows(const LinearArgs &args, int64_t row_block, int64_t token, F32x8 y) {
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

// Of packed bytes, the weights in nibble 0 or 1; or the bytes themselves.
template <int bits> inline WideBytes unpack(WideBytes packed, int nibble) {
  if constexpr (bits == 8) return packed;
  return nibble == 0 ? low_nibbles(packed) : high_nibbles(packed);
}

// What one tile computes: some neighbouring row blocks for some neighbouring tokens.
struct Place {
  int64_t row_block, end; // at most the row blocks [row_block, end)
  int64_t token;
};

// How far the second half of a tile's wide vector b lies behind the first: it is the next row block. Where there is
// none the same one is read again, and never stored.
inline int64_t to_next(const Place &place, int b, int64_t row_block_size) {
  return place.row_block + b * kWideBlocks + 1 < place.end ? row_block_size : 0;
}

template <int wides, int tokens> inline void store_tile(const LinearArgs &args, const Place &place, const float *sums) {
  const int64_t end = smaller(place.end, place.row_block + wides * kWideBlocks);
  for (int t = 0; t < tokens; ++t) {
    for (int64_t block = place.row_block; block < end; ++block) {
      const int64_t i = block - place.row_block;
      const float *lanes = sums + (i / kWideBlocks * tokens + t) * kWideLanes + i % kWideBlocks * kLanes;
      store_rows(args, block, place.token + t, load(lanes));
    }
  }
}

// One tile of products with quantised weights, all columns: sums is (wides, tokens, kWideLanes).
template <BlockFormat format, bool int16_activations> struct QuantizedTile {
  // With two wide vectors the sums of a tile, float and integer, take 24 of 32 registers, or 12 of 16.
  static constexpr int kTokens = (KVIK_SIMD_AVX512 ? 12 : 6) / (int16_activations ? 3 : 2);
  // One token waits for its weights. Row blocks one by one make a single stream, which memory serves best; a vector of
  // AVX-512 is two streams in any case, and four are what was measured there.
  static constexpr int kWidesOfOne = KVIK_SIMD_AVX512 ? 2 : 1;
  static constexpr int64_t kPrefetchAhead = 1536; // bytes, in a single stream

  template <int wides, int tokens>
  [[gnu::always_inline]] static inline void run(const LinearArgs &args, const Place &place, float *sums) {
    constexpr bool one_stream = wides * kWideBlocks * tokens == 1;
    constexpr int kVectors = format.quant_bytes() / 32 / format.scale_groups(); // of a group, as they lie in memory
    constexpr int kPacked = 8 / format.bits;                                    // weights in a byte
    const QuantizedRows a = args.quantized;
    const int64_t columns = args.columns, groups = columns / kGroup;
    const int64_t row_block_bytes = groups * format.block_bytes(), wide_bytes = kWideBlocks * row_block_bytes;
    const uint8_t *weight = args.weight + place.row_block * row_block_bytes;
    int64_t next[wides];
    KVIK_UNROLL
    for (int b = 0; b < wides; ++b) next[b] = to_next(place, b, row_block_bytes);

    Wide y[wides][tokens];
    KVIK_UNROLL
    for (int b = 0; b < wides; ++b) KVIK_UNROLL
    for (int t = 0; t < tokens; ++t) y[b][t] = wide_zero();
    for (int64_t group = 0; group < groups; ++group, weight += format.block_bytes()) {
      for (int part = 0; part < format.scale_groups(); ++part) {
        const int64_t at = place.token * groups + group;           // of the first token's scale
        const int sum = format.scale_groups() == 1 ? 0 : 1 + part; // which of an activation group's three sums
        Dot<format.bits> high[wides][tokens], low[wides][tokens];
        KVIK_UNROLL
        for (int b = 0; b < wides; ++b) KVIK_UNROLL
        for (int t = 0; t < tokens; ++t)
          (int16_activations ? low : high)[b][t] = Dot<format.bits>(a.excess[3 * (at + t * groups) + sum]);

        for (int v = part * kVectors; v < (part + 1) * kVectors; ++v) {
          WideBytes packed[wides];
          KVIK_UNROLL
          for (int b = 0; b < wides; ++b) {
            const uint8_t *p = weight + b * wide_bytes + 32 * v;
            if (one_stream) {
              if (v % 2 == 0) prefetch(p + kPrefetchAhead);
            } else if (tokens < kTokens && v % 2 == 0) { // full tiles wait for arithmetic, not for memory
              KVIK_UNROLL
              for (int i = 0; i < kWideBlocks; ++i) prefetch(p + wides * wide_bytes + i * row_block_bytes); // next tile
            }
            packed[b] = wide_load_bytes(p, next[b]);
          }
          KVIK_UNROLL
          for (int nibble = 0; nibble < kPacked; ++nibble) {
            WideBytes w[wides];
            KVIK_UNROLL
            for (int b = 0; b < wides; ++b) w[b] = unpack<format.bits>(packed[b], nibble);
            const int64_t column = group * kGroup + 16 * nibble + 4 * v;
            KVIK_UNROLL
            for (int t = 0; t < tokens; ++t) {
              const WideBytes q = wide_broadcast4(a.high + (place.token + t) * columns + column);
              KVIK_UNROLL
              for (int b = 0; b < wides; ++b) high[b][t].add(w[b], q);
              if constexpr (int16_activations) {
                const WideBytes rest = wide_broadcast4(a.low + (place.token + t) * columns + column);
                KVIK_UNROLL
                for (int b = 0; b < wides; ++b) low[b][t].add(w[b], rest);
              }
            }
          }
        }

        KVIK_UNROLL
        for (int b = 0; b < wides; ++b) {
          const uint8_t *scales =
              weight + b * wide_bytes + format.quant_bytes() + part * kRowBlock * format.scale_bytes;
          if (one_stream) prefetch(scales + kPrefetchAhead);
          const Wide scale = wide_scales<format.scale_bytes>(scales, next[b]);
          Wide minimum;
          if constexpr (format.minimum == Minimum::implied) minimum = scale * wide_broadcast(-8.0f);
          if constexpr (format.minimum == Minimum::stored)
            minimum = wide_scales<format.scale_bytes>(scales + format.scales_bytes(), next[b]);
          KVIK_UNROLL
          for (int t = 0; t < tokens; ++t) {
            WideInt dot = high[b][t].total();
            if constexpr (int16_activations) dot = scale_int(dot, 254) + low[b][t].total();
            y[b][t] = fma(scale * wide_broadcast(a.scale[at + t * groups]), to_float(dot), y[b][t]);
            if constexpr (format.minimum != Minimum::none)
              y[b][t] = fma(minimum, wide_broadcast(a.sums[3 * (at + t * groups) + sum]), y[b][t]);
          }
        }
      }
    }
    KVIK_UNROLL
    for (int b = 0; b < wides; ++b) KVIK_UNROLL
    for (int t = 0; t < tokens; ++t) store(sums + (b * tokens + t) * kWideLanes, y[b][t]);
  }
};

// The same for float weights.
template <class Weight> struct FloatTile {
  static constexpr int kTokens = KVIK_SIMD_AVX512 ? 12 : 6; // sums in 24 of 32 registers, or 12 of 16
  // A sum takes four cycles a column: so many of them at once keep ahead of memory.
  static constexpr int kWidesOfOne = KVIK_SIMD_AVX512 ? 2 : 4;

  template <int wides, int tokens>
  [[gnu::always_inline]] static inline void run(const LinearArgs &args, const Place &place, float *sums) {
    const int64_t columns = args.columns, row_block_size = columns * kRowBlock;
    const Weight *weight = reinterpret_cast<const Weight *>(args.weight) + place.row_block * row_block_size;
    const float *x = args.x + place.token * columns;
    int64_t next[wides];
    KVIK_UNROLL
    for (int b = 0; b < wides; ++b) next[b] = to_next(place, b, row_block_size);
    Wide y[wides][tokens];
    KVIK_UNROLL
    for (int b = 0; b < wides; ++b) KVIK_UNROLL
    for (int t = 0; t < tokens; ++t) y[b][t] = wide_zero();
    for (int64_t k = 0; k < columns; ++k) {
      Wide w[wides];
      KVIK_UNROLL
      for (int b = 0; b < wides; ++b)
        w[b] = wide_load(weight + b * kWideBlocks * row_block_size + k * kRowBlock, next[b]);
      KVIK_UNROLL
      for (int t = 0; t < tokens; ++t) {
        const Wide value = wide_broadcast(x[t * columns + k]);
        KVIK_UNROLL
        for (int b = 0; b < wides; ++b) y[b][t] = fma(w[b], value, y[b][t]);
      }
    }
    KVIK_UNROLL
    for (int b = 0; b < wides; ++b) KVIK_UNROLL
    for (int t = 0; t < tokens; ++t) store(sums + (b * tokens + t) * kWideLanes, y[b][t]);
  }
};

// Not inline: a call in the same function, as of memcpy, would have gcc keep the sums on the stack throughout.
template <class Tile, int wides, int tokens>
[[gnu::noinline]] void run_tile(const LinearArgs &args, const Place &place, float *sums) {
  Tile::template run<wides, tokens>(args, place, sums);
}

// Tokens [place.token, end) in tiles of `tokens`, and one smaller tile for the rest.
template <class Tile, int wides, int tokens>
inline void cover_tokens(const LinearArgs &args, Place place, int64_t end) {
  for (; place.token + tokens <= end; place.token += tokens) {
    alignas(64) float sums[wides * tokens * kWideLanes];
    run_tile<Tile, wides, tokens>(args, place, sums);
    store_tile<wides, tokens>(args, place, sums);
  }
  if constexpr (tokens > 1) cover_tokens<Tile, wides, tokens - 1>(args, place, end);
}

// One token's tiles for all blocks of a place, in one call: sums is (tiles, wides, kWideLanes).
template <class Tile, int wides> [[gnu::noinline]] void run_tiles(const LinearArgs &args, Place place, float *sums) {
  for (; place.row_block < place.end; place.row_block += wides * kWideBlocks, sums += wides * kWideLanes)
    Tile::template run<wides, 1>(args, place, sums);
}

// One token: row blocks from `first` on in whole tiles, and smaller ones for the rest.
template <class Tile, int wides> inline void cover_one_token(const LinearArgs &args, int64_t first, int64_t last) {
  constexpr int64_t kTile = wides * kWideBlocks, kCall = 32;
  static_assert(kCall % kTile == 0);
  const int64_t end = wides == 1 ? last : last - (last - first) % kTile;
  for (; first < end; first += kCall) {
    const Place place{first, smaller(first + kCall, end), 0};
    alignas(64) float sums[kCall * kLanes];
    run_tiles<Tile, wides>(args, place, sums);
    for (int64_t block = first; block < place.end; ++block)
      store_rows(args, block, 0, load(sums + (block - first) * kLanes));
  }
  if constexpr (wides > 1) cover_one_token<Tile, wides / 2>(args, end, last);
}

// Covers row blocks [first, last) and all tokens: several with tiles of two wide vectors, then what is left.
// Chunks of tokens keep the activations in the L2 cache while the weights stream by once a chunk.
template <class Tile> void cover(const LinearArgs &args, int64_t first, int64_t last) {
  if (args.num_tokens == 1) return cover_one_token<Tile, Tile::kWidesOfOne>(args, first, last);
  constexpr int64_t kChunk = 60; // a multiple of every tile's tokens
  static_assert(kChunk % Tile::kTokens == 0);
  for (int64_t chunk = 0; chunk < args.num_tokens; chunk += kChunk) {
    const int64_t end = smaller(chunk + kChunk, args.num_tokens);
    int64_t block = first;
    for (; block + kWideBlocks < last; block += 2 * kWideBlocks)
      cover_tokens<Tile, 2, Tile::kTokens>(args, {block, last, chunk}, end);
    if (block < last) cover_tokens<Tile, 1, Tile::kTokens>(args, {block, last, chunk}, end);
  }
}

template <int format, bool int16_activations>
void quantized_linear(const LinearArgs &args, int64_t first, int64_t last) {
  cover<QuantizedTile<kBlockFormats[format], int16_activations>>(args, first, last);
}
template <class Weight> void float_linear(const LinearArgs &args, int64_t first, int64_t last) {
  cover<FloatTile<Weight>>(args, first, last);
}

// Four vectors make a group. Values too small for a scale that float32 divides by become zero.
void quantize_row(const float *x, int64_t columns, bool int16_activations, const kvik::QuantizedRowsOut &out) {
  const float levels = int16_activations ? 32384.0f : 127.0f; // 254 * 127.5 - 1: the high half must not round to 128
  for (int64_t group = 0; group < columns / kGroup; ++group) {
    const float *values = x + group * kGroup;
    F32x8 largest = zero8(), defect = zero8(); // x - x: NaN where x is NaN or infinite, else zero
    for (int i = 0; i < kGroup; i += kLanes) {
      const F32x8 v = load(values + i);
      largest = max(abs(v), largest);
      defect = defect + (v - v);
    }
    const float top = max_lanes(largest);
    const bool usable = top > 1e-30f;
    const F32x8 inverse = broadcast(usable ? levels / top : 0.0f);
    const float scale = (usable ? top / levels : 0.0f) + add_lanes(defect); // what is no number must not vanish

    Int32x8 quants[4], high[4];
    for (int i = 0; i < 4; ++i) {
      const F32x8 scaled = load(values + i * kLanes) * inverse;
      quants[i] = to_int(max(min(scaled, broadcast(levels)), broadcast(-levels)));
    }
    if (int16_activations) {
      Int32x8 low[4];
      for (int i = 0; i < 4; ++i) {
        high[i] = to_int(to_float(quants[i]) * broadcast(1.0f / 254));
        low[i] = quants[i] - scale_int(high[i], 254);
      }
      store_bytes(out.high + group * kGroup, high);
      store_bytes(out.low + group * kGroup, low);
    } else {
      store_bytes(out.high + group * kGroup, quants);
    }
    const int32_t sums[2] = {add_lanes(quants[0] + quants[1]), add_lanes(quants[2] + quants[3])};
    out.excess[3 * group] = -128 * (sums[0] + sums[1]);
    out.excess[3 * group + 1] = -128 * sums[0];
    out.excess[3 * group + 2] = -128 * sums[1];
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
      const uint8_t *scales = block + format.quant_bytes() + k / format.scale_group * kRowBlock * format.scale_bytes;
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
