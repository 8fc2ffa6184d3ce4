// Attention over int8 keys and values: queries and softmax weights become integers too, so sums are exact.

namespace {

constexpr int kQuads = kSegment / 4;
constexpr int kQueryQuads = kvik::kMaxInt8HeadDim / 4;

// What makes a row's whole numbers values again.
struct RowUnit {
  float value;     // of 1
  int32_t offsets; // 128 times the sum of the factors: what the bytes' offset adds to each sum of products
};

inline RowUnit quantize_query(const float *q, int64_t head_dim, float scale, Factors *factors) {
  const Unit unit = unit_of(q, head_dim, kFactorLevels, 1e-30f);
  float padded[kvik::kMaxInt8HeadDim + kWideLanes];
  std::memcpy(padded, q, static_cast<std::size_t>(head_dim) * sizeof(float));
  std::memset(padded + head_dim, 0, kWideLanes * sizeof(float));
  const Wide max_level = wide_broadcast(kFactorLevels), min_level = wide_broadcast(-kFactorLevels);
  WideInt sum = wide_broadcast_int(0);
  for (int64_t d = 0; d < head_dim; d += kWideLanes) {
    const WideInt whole = to_int(max(min(wide_load(padded + d) * wide_broadcast(unit.inverse), max_level), min_level));
    sum = sum + whole;
    store_factors(factors + d / 4, whole);
  }
  return {unit.value * scale, 128 * add_lanes(sum)};
}

// A row's softmax times the scales of the values; tokens of `all` that the row doesn't see get the factor zero. Values
// are kept `offset` above what they are.
inline RowUnit quantize_weights(float *p, Span seen, Span all, const float *scales, int32_t offset, Factors *factors) {
  Wide largest = wide_zero(), defect = wide_zero();
  for_vectors(seen, [&](int i, auto edge) {
    const Wide weight = load_as<Wide>(p + i) * load_as<Wide>(scales + i);
    const Wide w = only_seen(edge, seen, i, weight, wide_zero()); // zero times what lies there may be NaN
    store(p + i, w);
    largest = max(w, max(wide_zero() - w, largest)); // scales of codes may be below zero
    defect = defect + (w - w);
  });
  const Unit unit = unit_of(max_of(largest), add_eights(zero8(), defect), kFactorLevels, 1e-34f);
  WideInt sum = wide_broadcast_int(0);
  const Wide inverse = wide_broadcast(unit.inverse);
  const Wide max_level = wide_broadcast(kFactorLevels), min_level = wide_broadcast(-kFactorLevels);
  int first = seen.first / kWideLanes * kWideLanes, last = first;
  for (; last < seen.last; last += kWideLanes) {
    const WideInt whole = to_int(max(min(load_as<Wide>(p + last) * inverse, max_level), min_level));
    sum = sum + whole;
    store_factors(factors + last / 4, whole);
  }
  for (int quad = all.first / 4; quad < first / 4; ++quad) factors[quad] = Factors{};
  for (int quad = last / 4; quad < (all.last + 3) / 4; ++quad) factors[quad] = Factors{};
  return {unit.value, offset * add_lanes(sum)};
}

template <int rows> inline void score_quads(const Factors *q, const RowUnit *units, const uint8_t *tile,
                                            const uint8_t *ahead, int64_t head_dim, float *scores) {
  QuadSum sum[rows][kTileVectors];
  for (auto &row : sum)
    for (QuadSum &lane : row) lane = no_quads();
  for (int64_t quad = 0; quad < head_dim / 4; ++quad) {
    prefetch_bytes<4 * kBlockSize>(ahead + quad * 4 * kBlockSize);
    for (int i = 0; i < kTileVectors; ++i) {
      const Quads k = load_quads(tile + (quad * kBlockSize + i * kWideLanes) * 4);
      for (int r = 0; r < rows; ++r) sum[r][i] = add_products(sum[r][i], k, q[r * kQueryQuads + quad]);
    }
  }
  const float *scales = reinterpret_cast<const float *>(tile + kBlockSize * head_dim);
  prefetch_bytes<4 * kBlockSize>(ahead + kBlockSize * head_dim);
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < kTileVectors; ++i) {
      const Wide scale = wide_load(scales + i * kWideLanes) * wide_broadcast(units[r].value);
      store(scores + r * kSegment + i * kWideLanes,
            to_float(total(sum[r][i]) - wide_broadcast_int(units[r].offsets)) * scale);
    }
}

// value[r][d ...) = sum over tokens; with `eight` the last eight dimensions of a head.
template <bool eight, int rows, int vectors>
inline void value_quads(const uint8_t *const *tiles, const Ahead &ahead, int64_t from, Span tokens, const Factors *p,
                        const RowUnit *units, int64_t head_dim, int64_t d, float *value) {
  constexpr int kFetched = vectors * 4 * kWideLanes; // bytes for a quad, in the order they lie in
  QuadSum sum[rows][vectors];
  for (auto &row : sum)
    for (QuadSum &lane : row) lane = no_quads();
  const int last = (tokens.last + 3) / 4;
  for (int quad = tokens.first / 4; quad < last;) {
    const int block = quad / (kBlockSize / 4), end = smaller_int(last, (block + 1) * (kBlockSize / 4));
    const int64_t at = (quad % (kBlockSize / 4) * head_dim + d) * 4;
    const int64_t fetched_before = d * 4 * (last - tokens.first / 4) + (quad - tokens.first / 4) * kFetched;
    const uint8_t *bytes = tiles[block] + at, *fetched = ahead.at(from + fetched_before);
    const int64_t step = fetched ? kFetched : 0; // with nothing ahead, a line that is there already
    if (!fetched) fetched = bytes;
    for (; quad < end; ++quad, bytes += 4 * head_dim, fetched += step) {
      prefetch_bytes<kFetched>(fetched);
      for (int i = 0; i < vectors; ++i) {
        const Quads v = eight ? load_eight_quads(bytes) : load_quads(bytes + i * 4 * kWideLanes);
        for (int r = 0; r < rows; ++r) sum[r][i] = add_products(sum[r][i], v, p[r * kQuads + quad]);
      }
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < vectors; ++i) {
      const Wide y = to_float(total(sum[r][i]) - wide_broadcast_int(units[r].offsets)) * wide_broadcast(units[r].value);
      float *to = value + r * head_dim + d + i * kWideLanes;
      if constexpr (eight)
        store(to, first_eight(y));
      else
        store(to, y);
    }
}

// The factors of all rows (rows, kQueryQuads), or (rows, kQuads) which take less; then each row's unit.
inline RowUnit *units_behind(Factors *factors, int64_t num_rows) {
  return reinterpret_cast<RowUnit *>(factors + num_rows * kQueryQuads);
}

[[gnu::noinline]] void score_bytes(const Work &work, float *scores, float *scratch, const Ahead &ahead) {
  const int64_t head_dim = work.head_dim, num_rows = work.num_rows;
  Factors *factors = reinterpret_cast<Factors *>(scratch);
  RowUnit *units = units_behind(factors, num_rows);
  for (int64_t row = 0; row < num_rows; ++row)
    units[row] = quantize_query(work.query(row), head_dim, work.scale, factors + row * kQueryQuads);
  const int first_block = work.first_block();
  const Ahead nothing{.lines = ahead.lines};
  for (int block = first_block; block < work.end_block(); ++block) {
    const uint8_t *tile = work.keys[block];
    for_slices(num_rows, [&](int64_t row, auto count) {
      score_quads<decltype(count)::value>(factors + row * kQueryQuads, units + row, tile,
                                          (row == 0 ? ahead : nothing).tile_at(block - first_block, tile), head_dim,
                                          scores + row * kSegment + block * kBlockSize);
    });
  }
}

// Integer sums are exact, so rows may go over tokens that they don't see: those have the factor zero.
[[gnu::noinline]] void add_bytes(const Work &work, float *scores, float *scratch, const Partial &out,
                                 const Ahead &ahead) {
  const int64_t head_dim = work.head_dim, num_rows = work.num_rows;
  const Span all = work.all;
  Factors *factors = reinterpret_cast<Factors *>(scratch);
  RowUnit *units = units_behind(factors, num_rows);
  const int64_t values_from = (work.end_block() - work.first_block() + kSoftmaxTiles) * 64 * ahead.lines;
  const Ahead nothing{.lines = ahead.lines};
  float value_scales[kSegment];
  for (int block = work.first_block(); block < work.end_block(); ++block)
    std::memcpy(value_scales + block * kBlockSize, scales_of(work.values[block], head_dim), kBlockSize * sizeof(float));
  for (int64_t row = 0; row < num_rows; ++row)
    units[row] =
        quantize_weights(scores + row * kSegment, work.seen(row), all, value_scales, 128, factors + row * kQuads);
  for_slices(num_rows, [&](int64_t row, auto count) {
    constexpr int rows = decltype(count)::value;
    constexpr int kVectors = rows <= 3 ? 4 : 2; // each has two sums where the kernels are wide
    const auto run = [&](auto eight, auto vectors, int64_t d) {
      value_quads<decltype(eight)::value == 1, rows, decltype(vectors)::value>(
          work.values, row == 0 ? ahead : nothing, values_from, all, factors + row * kQuads, units + row, head_dim, d,
          out.value + row * head_dim);
    };
    int64_t d = 0;
    for (; d + kVectors * kWideLanes <= head_dim; d += kVectors * kWideLanes) run(Count<0>{}, Count<kVectors>{}, d);
    for (; d + kWideLanes <= head_dim; d += kWideLanes) run(Count<0>{}, Count<1>{}, d);
    for (; d < head_dim; d += kLanes) run(Count<1>{}, Count<1>{}, d);
  });
}

} // namespace
