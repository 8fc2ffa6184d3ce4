// Matrix products of several tokens by tiles: 16 tokens by 16 rows by the columns of a scale group at once. The sums go
// through memory, and are scaled and added as in linear.inl: the same integers, the same bits.

namespace {

constexpr int64_t kFewestTiled = 4; // tokens; fewer are left to the vector instructions
constexpr int kGroupsAtOnce = 4;    // whose products lie in the L1 cache before they are scaled
constexpr int kProducts = kGroupsAtOnce * kTileBlocks * kTileRows * kRowBlock;

// Weights enter the products signed, without their zero. Where a panel keeps signed bytes it is off already.
constexpr int remaining_zero(const BlockFormat &format) {
  return !kUnsignedBytes && largest_weight(format) > 127 ? 0 : format.zero;
}
constexpr TileKind tiled_kind(const BlockFormat &format) { return {0, format.scale_groups(), format.minimum}; }

// Adds products of some groups to the sums (tokens, wides, kWideLanes) of some tokens, in column order.
template <TileKind kind, bool int16_activations> struct ScaledProducts {
  template <int tokens> [[gnu::noinline]] static void run(const int32_t *high, const int32_t *low,
                                                          const Panel<kTileWides> &panel, int first, int groups,
                                                          const QuantizedRows &a, int64_t first_group, float *sums) {
    const float *activation_scales = a.scale + first_group, *activation_sums = a.sums + 3 * first_group;
    Wide y[kTileWides][tokens];
    KVIK_UNROLL
    for (int t = 0; t < tokens; ++t) KVIK_UNROLL
    for (int b = 0; b < kTileWides; ++b) y[b][t] = wide_load(sums + (t * kTileWides + b) * kWideLanes);
    for (int group = first; group < first + groups; ++group) {
      const int part = group / kind.scale_groups;
      const int sum = kind.scale_groups == 1 ? 0 : 1 + group % kind.scale_groups;
      KVIK_UNROLL
      for (int b = 0; b < kTileWides; ++b) {
        const Wide scale = wide_load(panel.scales[group][b]), minima = wide_load(panel.minima[group][b]);
        const int at = b / kWidesOfBlock * kTileRows * kRowBlock + b % kWidesOfBlock * kWideLanes;
        KVIK_UNROLL
        for (int t = 0; t < tokens; ++t) {
          const int of_token = part + t * a.kGroups;
          WideInt dot = wide_load(high + at + t * kRowBlock);
          if constexpr (int16_activations) dot = scale_int(dot, 254) + wide_load(low + at + t * kRowBlock);
          y[b][t] = add_group<kind.minimum>(y[b][t], scale, minima, dot, activation_scales[of_token],
                                            activation_sums[3 * of_token + sum]);
        }
      }
      high += kProducts / kGroupsAtOnce;
      low += kProducts / kGroupsAtOnce;
    }
    KVIK_UNROLL
    for (int t = 0; t < tokens; ++t) KVIK_UNROLL
    for (int b = 0; b < kTileWides; ++b) store(sums + (t * kTileWides + b) * kWideLanes, y[b][t]);
  }

  // `count` tokens, four at a time.
  static void cover(const int32_t *high, const int32_t *low, const Panel<kTileWides> &panel, int first, int groups,
                    const QuantizedRows &a, int64_t first_group, int64_t count, float *sums) {
    const auto forward = [&](int tokens) {
      high += tokens * kRowBlock, low += tokens * kRowBlock;
      first_group += tokens * a.kGroups, sums += tokens * kTileWides * kWideLanes, count -= tokens;
    };
    for (; count >= 4; forward(4)) run<4>(high, low, panel, first, groups, a, first_group, sums);
    for (; count > 0; forward(1)) run<1>(high, low, panel, first, groups, a, first_group, sums);
  }
};

// What multiplies a panel, whose quants become signed; `rows` tokens are in a tile. A tile that would end behind the
// last token begins before its own first one: the products of those that come twice are not looked at.
template <class Tiles, TileKind kind, bool int16_activations> struct TiledPanel {
  Tiles &tiles;
  int64_t rows;
  int zero; // of the panel's quants

  void operator()(Panel<kTileWides> &panel, int parts, int, const QuantizedRows &a, int64_t first_group, int64_t count,
                  float *sums) const {
    constexpr int kGroupColumns = kGroup / kind.scale_groups, kPanelRow = kTileWides * kWideBytes;
    alignas(64) int32_t products[2][int16_activations ? 2 : 1][kProducts];
    uint8_t *quants = panel.quants[0][0][0];
    for (int i = 0; zero != 0 && i < parts * kQuadsOfPart * kPanelRow; i += kWideBytes)
      store_bytes(quants + i, subtract(wide_load_bytes(quants + i), zero));
    const int groups = parts * kind.scale_groups, pieces_of_tile = (groups + kGroupsAtOnce - 1) / kGroupsAtOnce;
    const int64_t pieces = (count + rows - 1) / rows * pieces_of_tile;
    struct Piece {
      int group, groups;
      int64_t token, tokens;
    };
    const auto piece_at = [&](int64_t index) -> Piece {
      const int group = static_cast<int>(index % pieces_of_tile) * kGroupsAtOnce;
      const int64_t token = index / pieces_of_tile * rows;
      return {group, static_cast<int>(smaller(kGroupsAtOnce, groups - group)), token, smaller(rows, count - token)};
    };
    // The next piece is under way while one is scaled.
    for (int64_t index = 0; index <= pieces; ++index) {
      if (index < pieces) {
        const auto [group, some, token, tokens] = piece_at(index);
        const int64_t at = (first_group + (token + tokens - rows) * a.kGroups) * kGroup + group * kGroupColumns;
        TileOperands from = {a.high + at,   a.kColumns,
                             kGroupColumns, quants + group * kGroupColumns / 4 * kPanelRow,
                             kPanelRow,     kGroupColumns / 4 * kPanelRow};
        multiply_groups<kTileBlocks>(tiles, from, some, products[index % 2][0]);
        if constexpr (int16_activations) {
          from.activations = a.low + at;
          multiply_groups<kTileBlocks>(tiles, from, some, products[index % 2][1]);
        }
      }
      if (index > 0) {
        const auto [group, some, token, tokens] = piece_at(index - 1);
        const int64_t unused = (rows - tokens) * kRowBlock;
        const int32_t *high = products[(index - 1) % 2][0] + unused;
        const int32_t *low = int16_activations ? products[(index - 1) % 2][1] + unused : high;
        ScaledProducts<kind, int16_activations>::cover(high, low, panel, group, some, a,
                                                       first_group + token * a.kGroups, tokens,
                                                       sums + token * kTileWides * kWideLanes);
      }
    }
  }
};

// Whole tiles of row blocks.
template <class Tiles, TileKind kind, bool int16_activations>
void multiply_tiled(const BlockFormat &format, Unpack<kTileWides> unpack, const LinearArgs &args, int64_t first,
                    int64_t last) {
  const int64_t rows = smaller(kTileRows, args.num_tokens);
  Tiles tiles(products_config(static_cast<int>(rows), kQuadsOfPart / kind.scale_groups));
  const TiledPanel<Tiles, kind, int16_activations> multiply{tiles, rows, remaining_zero(format)};
  for (int64_t token = 0; token < args.num_tokens; token += kChunk)
    for (int64_t block = first; block < last; block += kTileBlocks)
      multiply_panels<kTileWides>(format, unpack, multiply, args, block, token,
                                  smaller(kChunk, args.num_tokens - token));
}

template <class Tiles, int index, bool int16_activations>
void tiled_linear(const LinearArgs &args, int64_t first, int64_t last) {
  constexpr BlockFormat kFormat = kBlockFormats[index];
  if (args.num_tokens >= kFewestTiled) {
    const int64_t end = first + (last - first) / kTileBlocks * kTileBlocks;
    if (first < end)
      multiply_tiled<Tiles, tiled_kind(kFormat), int16_activations>(kFormat, unpack<kFormat, kTileWides>, args, first,
                                                                    end);
    first = end;
  }
  if (first < last) quantized_linear<index, int16_activations>(args, first, last);
}

} // namespace
