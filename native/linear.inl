// y = x W^T over packed weights. Lanes are output rows; every output adds its groups in column order, one fused
// multiply-add each for scale and minimum, whether one token is computed or a thousand: the same bits.

namespace {

using kvik::kBlockFormats;
using kvik::LinearArgs;
using kvik::QuantizedRows;

constexpr int kTileWides = 2; // of a tile of several tokens
constexpr int kTileBlocks = kTileWides / kWidesOfBlock;
constexpr int64_t kPanelsAhead = 4; // that are fetched into the L2 cache while one is multiplied
constexpr int64_t kChunk = 60;      // tokens whose activations stay in the L2 cache while the weights stream by

// Lanes of a row block's rows for one token, the residual added.
inline void store_rows(const LinearArgs &args, int64_t row_block, int64_t token, const float *sums) {
  const int64_t at = token * args.rows + row_block * kRowBlock;
  const int64_t rows = smaller(args.rows - row_block * kRowBlock, kRowBlock);
  const std::size_t bytes = static_cast<std::size_t>(rows) * sizeof(float);
  float lanes[kRowBlock] = {};
  if (args.residual) std::memcpy(lanes, args.residual + at, bytes);
  for (int i = 0; args.residual && i < kRowBlock; i += kWideLanes)
    store(lanes + i, wide_load(lanes + i) + wide_load(sums + i));
  std::memcpy(args.y + at, args.residual ? lanes : sums, bytes);
}

// Adds a scale group's products to a token's output.
template <bool minimum>
inline Wide add_group(Wide y, Wide scale, Wide minima, WideInt dot, float activation_scale, float activation_sum) {
  y = fma(scale * wide_broadcast(activation_scale), to_float(dot), y);
  if constexpr (minimum) y = fma(minima, wide_broadcast(activation_sum), y);
  return y;
}

#if KVIK_SIMD_AVX2 // plain C++ would take minutes to compile and gain nothing

// One token: weights go from memory into products. sums is (row blocks, kRowBlock).
template <BlockFormat format, bool int16_activations>
[[gnu::noinline]] void multiply_one_token(const LinearArgs &args, int64_t first, int64_t last, float *sums) {
  // Row blocks one by one make a single stream, which memory serves best. What the L1 cache is asked for holds one of
  // its few fill buffers until memory answers, and the core waits once all are taken; the L2 cache has more of them.
  constexpr int64_t kAheadInL1 = 2048, kAheadInL2 = 8192; // bytes
  constexpr int kGroups = format.scale_groups(), kQuadsOfGroup = kQuadsOfPart / kGroups;
  using Sum = Dot<largest_weight(format)>;
  const QuantizedRows &a = args.quantized;
  const int64_t blocks = args.columns / format.columns;
  const uint8_t *block = args.weight + first * blocks * format.block_bytes();
  for (int64_t row_block = first; row_block < last; ++row_block, sums += kRowBlock) {
    Wide y[kWidesOfBlock];
    for (Wide &lanes : y) lanes = wide_zero();
    for (int64_t b = 0; b < blocks; ++b, block += format.block_bytes()) {
      const int64_t of_part = b * format.parts();
      const int64_t first_group = a.group_at(of_part / a.kGroups, args.first_token) + of_part % a.kGroups;
      unrolled<format.parts()>([&](auto part) KVIK_INLINE {
        constexpr int kLines = (format.block_bytes() / format.parts() + 63) / 64;
        for (int line = 0; line < kLines; ++line) {
          const uint8_t *here = block + part.value * (format.block_bytes() / format.parts()) + 64 * line;
          prefetch(here + kAheadInL1);
          prefetch_to_l2(here + kAheadInL2);
        }
        const int64_t group = first_group + part.value, start = group * kGroup;
        unrolled<kGroups>([&](auto scale_group) KVIK_INLINE {
          constexpr int kIndex = part.value * kGroups + scale_group.value,
                        kSum = kGroups == 1 ? 0 : 1 + scale_group.value;
          const int32_t zero = format.minimum ? 0 : -format.zero * a.totals[3 * group + kSum];
          unrolled<kWidesOfBlock>([&](auto wide) KVIK_INLINE {
            Sum high(int16_activations ? 0 : zero), low(zero);
            unrolled<kQuadsOfGroup / Sum::kQuads>([&](auto step) KVIK_INLINE {
              WideBytes w[Sum::kQuads], q[Sum::kQuads], rest[Sum::kQuads];
              unrolled<Sum::kQuads>([&](auto i) KVIK_INLINE {
                constexpr int kQuad = scale_group.value * kQuadsOfGroup + step.value * Sum::kQuads + i.value;
                w[i.value] = quants<format, part.value, kQuad>(block + wide.value * kWideBytes);
                q[i.value] = wide_broadcast4(a.high + start + 4 * kQuad);
                if constexpr (int16_activations) rest[i.value] = wide_broadcast4(a.low + start + 4 * kQuad);
              });
              high.add(w, q);
              if constexpr (int16_activations) low.add(w, rest);
            });
            WideInt dot = high.total(int16_activations ? 0 : zero);
            if constexpr (int16_activations) dot = scale_int(dot, 254) + low.total(zero);
            const BlockScales<format> scales(block, wide.value);
            const Wide minima = format.minimum ? scales.group_minimum(kIndex) : wide_zero();
            y[wide.value] = add_group<format.minimum>(y[wide.value], scales.group_scale(kIndex), minima, dot,
                                                      a.scale[group], a.sums[3 * group + kSum]);
          });
        });
      });
    }
    for (int w = 0; w < kWidesOfBlock; ++w) store(sums + w * kWideLanes, y[w]);
  }
}

#endif

// What a tile of several tokens needs to know of its weights' format.
struct TileKind {
  int largest_weight, scale_groups;
  bool minimum;
};
constexpr TileKind tile_kind(const BlockFormat &format) {
  // All weights are unsigned bytes to AVX-512.
  return {kUnsignedBytes ? 255 : largest_weight(format), format.scale_groups(), format.minimum};
}

// One tile of products of a panel, for some tokens: adds to sums (tokens, wides, kWideLanes).
template <TileKind kind, bool int16_activations> struct QuantizedTile {
  using Sum = Dot<kind.largest_weight>;
  // With two wide vectors the sums of a tile, float and integer, take 24 of 32 registers, or 12 of 16, fewer where
  // weights of two quads take registers too.
  static constexpr int kTokens = (KVIK_SIMD_AVX512 ? 12 : Sum::kQuads == 2 ? 4 : 6) / (int16_activations ? 3 : 2);

  template <int wides, int tokens> [[gnu::noinline]] static void
  run(const Panel<wides> &panel, int parts, int zero, const QuantizedRows &a, int64_t first_group, float *sums) {
    constexpr int kQuadsOfGroup = kQuadsOfPart / kind.scale_groups;
    const int8_t *high_quants = a.high + first_group * kGroup;
    const int8_t *low_quants = int16_activations ? a.low + first_group * kGroup : nullptr;
    const float *activation_scales = a.scale + first_group, *activation_sums = a.sums + 3 * first_group;
    const int32_t *totals = a.totals + 3 * first_group;
    Wide y[wides][tokens];
    KVIK_UNROLL
    for (int t = 0; t < tokens; ++t) KVIK_UNROLL
    for (int b = 0; b < wides; ++b) y[b][t] = wide_load(sums + (t * wides + b) * kWideLanes);
    for (int group = 0; group < parts * kind.scale_groups; ++group) {
      const int part = group / kind.scale_groups, first = group % kind.scale_groups * kQuadsOfGroup;
      const int sum = kind.scale_groups == 1 ? 0 : 1 + group % kind.scale_groups;
      const auto starts_at = [&](int t) KVIK_INLINE {
        return kind.minimum ? 0 : -zero * totals[3 * (part + t * a.kGroups) + sum];
      };
      Sum high[wides][tokens], low[wides][tokens];
      KVIK_UNROLL
      for (int t = 0; t < tokens; ++t) {
        const int32_t begin = starts_at(t);
        KVIK_UNROLL
        for (int b = 0; b < wides; ++b) (int16_activations ? low : high)[b][t] = Sum(begin);
      }
      KVIK_UNROLL
      for (int step = 0; step < kQuadsOfGroup; step += Sum::kQuads) {
        const int quad = first + step;
        WideBytes w[wides][Sum::kQuads];
        KVIK_UNROLL
        for (int b = 0; b < wides; ++b) KVIK_UNROLL
        for (int i = 0; i < Sum::kQuads; ++i) w[b][i] = wide_load_bytes(panel.quants[part][quad + i][b]);
        KVIK_UNROLL
        for (int t = 0; t < tokens; ++t) {
          WideBytes q[Sum::kQuads];
          KVIK_UNROLL
          for (int i = 0; i < Sum::kQuads; ++i)
            q[i] = wide_broadcast4(high_quants + part * kGroup + t * a.kColumns + 4 * (quad + i));
          KVIK_UNROLL
          for (int b = 0; b < wides; ++b) high[b][t].add(w[b], q);
          if constexpr (int16_activations) {
            KVIK_UNROLL
            for (int i = 0; i < Sum::kQuads; ++i)
              q[i] = wide_broadcast4(low_quants + part * kGroup + t * a.kColumns + 4 * (quad + i));
            KVIK_UNROLL
            for (int b = 0; b < wides; ++b) low[b][t].add(w[b], q);
          }
        }
      }
      KVIK_UNROLL
      for (int b = 0; b < wides; ++b) {
        const Wide scale = wide_load(panel.scales[group][b]), minima = wide_load(panel.minima[group][b]);
        KVIK_UNROLL
        for (int t = 0; t < tokens; ++t) {
          const int of_token = part + t * a.kGroups;
          WideInt dot = high[b][t].total(int16_activations ? 0 : starts_at(t));
          if constexpr (int16_activations) dot = scale_int(dot, 254) + low[b][t].total(starts_at(t));
          y[b][t] = add_group<kind.minimum>(y[b][t], scale, minima, dot, activation_scales[of_token],
                                            activation_sums[3 * of_token + sum]);
        }
      }
    }
    KVIK_UNROLL
    for (int t = 0; t < tokens; ++t) KVIK_UNROLL
    for (int b = 0; b < wides; ++b) store(sums + (t * wides + b) * kWideLanes, y[b][t]);
  }

  // All tokens of a chunk in tiles of `tokens`, and one smaller tile for the rest.
  template <int wides, int tokens = kTokens> static void cover(const Panel<wides> &panel, int parts, int zero,
                                                               const QuantizedRows &a, int64_t first_group,
                                                               int64_t count, float *sums) {
    for (; count >= tokens; count -= tokens, first_group += tokens * a.kGroups, sums += tokens * wides * kWideLanes)
      run<wides, tokens>(panel, parts, zero, a, first_group, sums);
    if constexpr (tokens > 1) {
      if (count > 0) cover<wides, tokens - 1>(panel, parts, zero, a, first_group, count, sums);
    }
  }
};

// Several tokens, `wides` wide vectors of rows from one row block on; `multiply` is what takes a panel, as
// QuantizedTile::cover does.
template <int wides, class Multiply> void multiply_panels(const BlockFormat &format, Unpack<wides> unpack,
                                                          const Multiply &multiply, const LinearArgs &args,
                                                          int64_t row_block, int64_t first_token, int64_t count) {
  const QuantizedRows &a = args.quantized;
  const int64_t row_block_bytes = args.columns / format.columns * format.block_bytes();
  const uint8_t *block = args.weight + row_block * row_block_bytes;
  alignas(64) float sums[kChunk * wides * kWideLanes];
  std::memset(sums, 0, static_cast<std::size_t>(count) * wides * kWideLanes * sizeof(float));
  Panel<wides> panel;
  constexpr int kBlocks = wides / kWidesOfBlock;
  const int64_t num_panels = a.panels(args.columns), panel_bytes = kParts / format.parts() * format.block_bytes();
  for (int64_t index = 0; index < num_panels; ++index) {
    const int parts = static_cast<int>(smaller(args.columns / kGroup - index * a.kGroups, a.kGroups));
    const int64_t later = index + kPanelsAhead;
    const uint8_t *later_block =
        args.weight + (row_block + later / num_panels * kBlocks) * row_block_bytes + later % num_panels * panel_bytes;
    unpack(block, later_block, row_block_bytes, parts, panel);
    multiply(panel, parts, format.zero, a, a.group_at(index, args.first_token + first_token), count, sums);
    block += parts / format.parts() * format.block_bytes();
  }
  for (int64_t t = 0; t < count; ++t)
    for (int b = 0; b < kBlocks; ++b)
      store_rows(args, row_block + b, first_token + t, sums + (t * kBlocks + b) * kRowBlock);
}

template <int index, bool int16_activations>
void quantized_linear(const LinearArgs &args, int64_t first, int64_t last) {
  constexpr BlockFormat kFormat = kBlockFormats[index];
#if KVIK_SIMD_AVX2
  if (args.num_tokens == 1) {
    constexpr int64_t kCall = 32;
    for (; first < last; first += kCall) {
      const int64_t end = smaller(first + kCall, last);
      alignas(64) float sums[kCall * kRowBlock];
      multiply_one_token<kFormat, int16_activations>(args, first, end, sums);
      for (int64_t block = first; block < end; ++block) store_rows(args, block, 0, sums + (block - first) * kRowBlock);
    }
    return;
  }
#endif
  using Tile = QuantizedTile<tile_kind(kFormat), int16_activations>;
  for (int64_t token = 0; token < args.num_tokens; token += kChunk) {
    const int64_t count = smaller(kChunk, args.num_tokens - token);
    int64_t block = first;
    for (; block + kTileBlocks <= last; block += kTileBlocks)
      multiply_panels<kTileWides>(kFormat, unpack<kFormat, kTileWides>, Tile::template cover<kTileWides>, args, block,
                                  token, count);
    if (block < last)
      multiply_panels<kWidesOfBlock>(kFormat, unpack<kFormat, kWidesOfBlock>, Tile::template cover<kWidesOfBlock>, args,
                                     block, token, count);
  }
}

// One tile of products with float weights, all columns: sums is (tokens, wides, kWideLanes).
template <class Weight> struct FloatTile {
  static constexpr int kTokens = KVIK_SIMD_AVX512 ? 12 : 6; // sums in 24 of 32 registers, or 12 of 16

  template <int wides, int tokens>
  [[gnu::noinline]] static void run(const LinearArgs &args, int64_t row_block, int64_t token, float *sums) {
    const int64_t columns = args.columns, row_block_size = columns * kRowBlock;
    const Weight *weight = reinterpret_cast<const Weight *>(args.weight) + row_block * row_block_size;
    const float *x = args.x + token * columns;
    Wide y[wides][tokens];
    KVIK_UNROLL
    for (int b = 0; b < wides; ++b) KVIK_UNROLL
    for (int t = 0; t < tokens; ++t) y[b][t] = wide_zero();
    for (int64_t k = 0; k < columns; ++k) {
      Wide w[wides];
      KVIK_UNROLL
      for (int b = 0; b < wides; ++b)
        w[b] = wide_load(weight + b / kWidesOfBlock * row_block_size + k * kRowBlock + b % kWidesOfBlock * kWideLanes);
      KVIK_UNROLL
      for (int t = 0; t < tokens; ++t) {
        const Wide value = wide_broadcast(x[t * columns + k]);
        KVIK_UNROLL
        for (int b = 0; b < wides; ++b) y[b][t] = fma(w[b], value, y[b][t]);
      }
    }
    KVIK_UNROLL
    for (int t = 0; t < tokens; ++t) KVIK_UNROLL
    for (int b = 0; b < wides; ++b) store(sums + (t * wides + b) * kWideLanes, y[b][t]);
  }
};

// Some row blocks for tokens [token, end) in tiles of `tokens`, and one smaller tile for the rest.
template <class Tile, int blocks, int tokens>
void cover_tokens(const LinearArgs &args, int64_t row_block, int64_t token, int64_t end) {
  constexpr int kWides = blocks * kWidesOfBlock;
  for (; token + tokens <= end; token += tokens) {
    alignas(64) float sums[tokens * blocks * kRowBlock];
    Tile::template run<kWides, tokens>(args, row_block, token, sums);
    for (int t = 0; t < tokens; ++t)
      for (int b = 0; b < blocks; ++b) store_rows(args, row_block + b, token + t, sums + (t * blocks + b) * kRowBlock);
  }
  if constexpr (tokens > 1) cover_tokens<Tile, blocks, tokens - 1>(args, row_block, token, end);
}

template <class Weight> void float_linear(const LinearArgs &args, int64_t first, int64_t last) {
  using Tile = FloatTile<Weight>;
  for (int64_t token = 0; token < args.num_tokens; token += kChunk) {
    const int64_t end = smaller(token + kChunk, args.num_tokens);
    int64_t block = first;
    // A sum takes four cycles a column: for one token, so many of them at once keep ahead of memory.
    constexpr int kBlocksOfOne = 4 / kWidesOfBlock;
    if (args.num_tokens == 1)
      for (; block + kBlocksOfOne <= last; block += kBlocksOfOne)
        cover_tokens<Tile, kBlocksOfOne, 1>(args, block, token, end);
    for (; block + kTileBlocks <= last; block += kTileBlocks)
      cover_tokens<Tile, kTileBlocks, Tile::kTokens>(args, block, token, end);
    if (block < last) cover_tokens<Tile, 1, Tile::kTokens>(args, block, token, end);
  }
}

} // namespace
