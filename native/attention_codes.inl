// Attention over codes: as over int8, but that 32 items have a scale, with which a sum of integers ends.

namespace {

constexpr int kQuadsOfCodes = kCodeGroup / 4;
constexpr int kCodeOffset = 8;

// What makes a row's whole numbers values again; offsets as in `RowUnit`, for each scale.
struct CodedUnit {
  float value;
  int32_t offsets[kvik::kMaxCodedHeadDim / kCodeGroup];
};

inline void quantize_coded_query(const float *q, int64_t head_dim, float scale, Factors *factors, CodedUnit *out) {
  const Unit unit = unit_of(q, head_dim, kFactorLevels, 1e-30f);
  const Wide max_level = wide_broadcast(kFactorLevels), min_level = wide_broadcast(-kFactorLevels);
  for (int64_t d = 0; d < head_dim; d += kCodeGroup) {
    WideInt sum = wide_broadcast_int(0);
    for (int64_t i = d; i < d + kCodeGroup; i += kWideLanes) {
      const WideInt whole = to_int(max(min(wide_load(q + i) * wide_broadcast(unit.inverse), max_level), min_level));
      sum = sum + whole;
      store_factors(factors + i / 4, whole);
    }
    out->offsets[d / kCodeGroup] = kCodeOffset * add_lanes(sum);
  }
  out->value = unit.value * scale;
}

// Scores add the sums of one scale after the other.
template <int rows> inline void score_codes(const Factors *q, const CodedUnit *units, const uint8_t *tile,
                                            int64_t head_dim, float *scores) {
  const Half *scales = code_scales(tile, head_dim);
  for (int64_t g = 0; g < head_dim / kCodeGroup; ++g) {
    QuadSum sum[rows][kTileVectors];
    for (auto &row : sum)
      for (QuadSum &lane : row) lane = no_quads();
    for (int64_t quad = g * kQuadsOfCodes; quad < (g + 1) * kQuadsOfCodes; quad += 2)
      for (int i = 0; i < kTileVectors; ++i) {
        const PackedQuads k = load_packed_quads(tile + (quad / 2 * kBlockSize + i * kWideLanes) * 4);
        for (int r = 0; r < rows; ++r) {
          sum[r][i] = add_products(sum[r][i], low_quads(k), q[r * kQueryQuads + quad]);
          sum[r][i] = add_products(sum[r][i], high_quads(k), q[r * kQueryQuads + quad + 1]);
        }
      }
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < kTileVectors; ++i) {
        float *score = scores + r * kSegment + i * kWideLanes;
        const Wide scale = wide_load(scales + g * kBlockSize + i * kWideLanes);
        const Wide products = to_float(total(sum[r][i]) - wide_broadcast_int(units[r].offsets[g]));
        store(score, g == 0 ? products * scale : fma(products, scale, wide_load(score)));
      }
  }
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < kTileVectors; ++i) {
      float *score = scores + r * kSegment + i * kWideLanes;
      store(score, wide_load(score) * wide_broadcast(units[r].value));
    }
}

// The 32 dimensions of a scale: value[r] = sum over tokens.
template <int rows> inline void value_codes(const uint8_t *const *tiles, Span tokens, const Factors *p,
                                            const RowUnit *units, int64_t head_dim, int64_t g, float *value) {
  constexpr int kVectors = kCodeGroup / 2 / kWideLanes;
  const int64_t stride = 2 * head_dim; // from four tokens to the next four
  QuadSum low[rows][kVectors], high[rows][kVectors];
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < kVectors; ++i) low[r][i] = no_quads(), high[r][i] = no_quads();
  const int last = (tokens.last + 3) / 4;
  for (int quad = tokens.first / 4; quad < last;) {
    const int block = quad / (kBlockSize / 4), end = smaller_int(last, (block + 1) * (kBlockSize / 4));
    const uint8_t *bytes = tiles[block] + quad % (kBlockSize / 4) * stride + g * 2 * kCodeGroup;
    for (; quad < end; ++quad, bytes += stride)
      for (int i = 0; i < kVectors; ++i) {
        const PackedQuads v = load_packed_quads(bytes + i * 4 * kWideLanes);
        for (int r = 0; r < rows; ++r) {
          low[r][i] = add_products(low[r][i], low_quads(v), p[r * kQuads + quad]);
          high[r][i] = add_products(high[r][i], high_quads(v), p[r * kQuads + quad]);
        }
      }
  }
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < kVectors; ++i) {
      float *to = value + r * head_dim + g * kCodeGroup + i * kWideLanes;
      const WideInt offset = wide_broadcast_int(units[r].offsets);
      const Wide unit = wide_broadcast(units[r].value);
      store(to, to_float(total(low[r][i]) - offset) * unit);
      store(to + kCodeGroup / 2, to_float(total(high[r][i]) - offset) * unit);
    }
}

[[gnu::noinline]] void score_all_codes(const Work &work, float *scores, float *scratch) {
  const int64_t head_dim = work.head_dim, num_rows = work.num_rows;
  Factors *factors = reinterpret_cast<Factors *>(scratch);
  CodedUnit *units = reinterpret_cast<CodedUnit *>(factors + num_rows * kQueryQuads);
  for (int64_t row = 0; row < num_rows; ++row)
    quantize_coded_query(work.query(row), head_dim, work.scale, factors + row * kQueryQuads, units + row);
  for (int block = work.first_block(); block < work.end_block(); ++block)
    for_slices(num_rows, [&](int64_t row, auto count) {
      score_codes<decltype(count)::value>(factors + row * kQueryQuads, units + row, work.keys[block], head_dim,
                                          scores + row * kSegment + block * kBlockSize);
    });
}

[[gnu::noinline]] void add_all_codes(const Work &work, const float *scores, float *scratch, const Partial &out) {
  const int64_t head_dim = work.head_dim, num_rows = work.num_rows;
  Factors *factors = reinterpret_cast<Factors *>(scratch);
  RowUnit *units = units_behind(factors, num_rows);
  for (int64_t g = 0; g < head_dim / kCodeGroup; ++g) {
    float scales[kSegment];
    for (int block = work.first_block(); block < work.end_block(); ++block)
      for (int i = 0; i < kBlockSize; i += kWideLanes)
        store(scales + block * kBlockSize + i,
              wide_load(code_scales(work.values[block], head_dim) + g * kBlockSize + i));
    for (int64_t row = 0; row < num_rows; ++row) {
      float weights[kSegment];
      std::memcpy(weights, scores + row * kSegment, sizeof weights);
      units[row] = quantize_weights(weights, work.seen(row), work.all, scales, kCodeOffset, factors + row * kQuads);
    }
    for_slices(num_rows, [&](int64_t row, auto count) {
      value_codes<decltype(count)::value>(work.values, work.all, factors + row * kQuads, units + row, head_dim, g,
                                          out.value + row * head_dim);
    });
  }
}

} // namespace
