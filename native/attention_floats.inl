// Attention over float32 and float16 keys and values.

namespace {

// Scores of some rows against the keys of some blocks: scores (rows, 256), from the first block's column. For each of
// them a tile is fetched.
template <class Stored, int rows, int blocks>
inline void score_blocks(const float *const *q, const uint8_t *const *tiles, const uint8_t *const *ahead,
                         int64_t head_dim, float scale, float *scores) {
  const Stored *keys[blocks];
  for (int b = 0; b < blocks; ++b) keys[b] = reinterpret_cast<const Stored *>(tiles[b]);
  Wide sum[rows][blocks * kTileVectors];
  KVIK_UNROLL
  for (int r = 0; r < rows; ++r) KVIK_UNROLL
  for (int i = 0; i < blocks * kTileVectors; ++i) sum[r][i] = wide_zero();
  for (int64_t d = 0; d < head_dim; ++d) {
    Wide x[rows];
    KVIK_UNROLL
    for (int r = 0; r < rows; ++r) x[r] = wide_broadcast(q[r][d]);
    KVIK_UNROLL
    for (int b = 0; b < blocks; ++b) {
      prefetch_bytes<kBlockSize * sizeof(Stored)>(ahead[b] + d * kBlockSize * sizeof(Stored));
      KVIK_UNROLL
      for (int i = 0; i < kTileVectors; ++i) {
        const Wide k = pinned(wide_load(keys[b] + d * kBlockSize + i * kWideLanes));
        KVIK_UNROLL
        for (int r = 0; r < rows; ++r) sum[r][b * kTileVectors + i] = fma(k, x[r], sum[r][b * kTileVectors + i]);
      }
    }
  }
  KVIK_UNROLL
  for (int r = 0; r < rows; ++r) KVIK_UNROLL
  for (int i = 0; i < blocks * kTileVectors; ++i)
    store(scores + r * kSegment + i * kWideLanes, sum[r][i] * wide_broadcast(scale));
}

// value[r][d ...) += sum over tokens of p[r][token] * V[token][d ...), token after token. What is ahead is fetched in
// the order it lies in, from that many bytes on; a pass over some dimensions takes their share of it.
template <class V, class Stored, int rows, int vectors>
inline void add_values(const uint8_t *const *tiles, const Ahead &ahead, int64_t from, Span tokens, const float *p,
                       int64_t head_dim, int64_t d, float *value) {
  constexpr int kVectorLanes = sizeof(V) / sizeof(float);
  constexpr int kFetched = vectors * kVectorLanes * sizeof(Stored);
  const int64_t all_tokens = tokens.last - tokens.first;
  V sum[rows][vectors];
  KVIK_UNROLL
  for (int r = 0; r < rows; ++r) KVIK_UNROLL
  for (int i = 0; i < vectors; ++i) sum[r][i] = load_as<V>(value + r * head_dim + d + i * kVectorLanes);
  for (int token = tokens.first; token < tokens.last;) {
    const int block = token / kBlockSize, end = smaller_int(tokens.last, (block + 1) * kBlockSize);
    const Stored *row = reinterpret_cast<const Stored *>(tiles[block]) + token % kBlockSize * head_dim + d;
    const int64_t fetched_before = d * all_tokens * sizeof(Stored) + (token - tokens.first) * kFetched;
    const uint8_t *fetched = ahead.at(from + fetched_before);
    const int64_t step = fetched ? kFetched : 0; // with nothing ahead, a line that is there already
    if (!fetched) fetched = reinterpret_cast<const uint8_t *>(row);
    for (; token < end; ++token, row += head_dim, fetched += step) {
      prefetch_bytes<kFetched>(fetched);
      V weight[rows];
      KVIK_UNROLL
      for (int r = 0; r < rows; ++r) weight[r] = spread<V>(p[r * kSegment + token]);
      KVIK_UNROLL
      for (int i = 0; i < vectors; ++i) {
        const V v = pinned(load_as<V>(row + i * kVectorLanes));
        KVIK_UNROLL
        for (int r = 0; r < rows; ++r) sum[r][i] = fma(v, weight[r], sum[r][i]);
      }
    }
  }
  KVIK_UNROLL
  for (int r = 0; r < rows; ++r) KVIK_UNROLL
  for (int i = 0; i < vectors; ++i) store(value + r * head_dim + d + i * kVectorLanes, sum[r][i]);
}

template <class Stored, int rows> inline void add_all_values(const uint8_t *const *tiles, const Ahead &ahead,
                                                             int64_t from, Span tokens, const float *p,
                                                             int64_t head_dim, float *value) {
  if (tokens.first >= tokens.last) return;
  int64_t d = 0;
  for (; d + 4 * kWideLanes <= head_dim; d += 4 * kWideLanes)
    add_values<Wide, Stored, rows, 4>(tiles, ahead, from, tokens, p, head_dim, d, value);
  for (; d + kWideLanes <= head_dim; d += kWideLanes)
    add_values<Wide, Stored, rows, 1>(tiles, ahead, from, tokens, p, head_dim, d, value);
  for (; d < head_dim; d += kLanes)
    add_values<F32x8, Stored, rows, 1>(tiles, ahead, from, tokens, p, head_dim, d, value);
}

// Tiles that were widened wait for nothing: some lines of what comes next are fetched for each slice of rows and for
// each row. Others are read from memory by the first slice of rows, which fetches what is ahead (lines_a_call: 0).
template <class Stored> void score_floats(const Work &work, float *scores, Ahead &ahead, int64_t lines_a_call) {
  const int64_t head_dim = work.head_dim;
  const Span all = work.all;
  const Ahead nothing{.lines = ahead.lines};
  for (int column = all.first / kBlockSize * kBlockSize; column < all.last;) {
    // Two blocks at once give the sums that are needed to keep wide multipliers busy.
    const int blocks = kWideLanes > kLanes && column + kBlockSize < all.last ? 2 : 1;
    for_slices(work.num_rows, [&](int64_t row, auto count) {
      constexpr int rows = decltype(count)::value;
      const float *q[rows];
      for (int r = 0; r < rows; ++r) q[r] = work.query(row + r);
      const auto *tiles = work.keys + column / kBlockSize;
      const uint8_t *fetched[2];
      for (int b = 0; b < blocks; ++b)
        fetched[b] = (row == 0 && lines_a_call == 0 ? ahead : nothing)
                         .tile_at(column / kBlockSize + b - work.first_block(), tiles[b]);
      float *slice = scores + row * kSegment + column;
      ahead.fetch(lines_a_call);
      if (blocks == 2)
        score_blocks<Stored, rows, 2>(q, tiles, fetched, head_dim, work.scale, slice);
      else
        score_blocks<Stored, rows, 1>(q, tiles, fetched, head_dim, work.scale, slice);
    });
    column += blocks * kBlockSize;
  }
}

template <class Stored>
void add_floats(const Work &work, float *scores, const Partial &out, const Ahead &ahead, int64_t lines_a_call) {
  const int64_t head_dim = work.head_dim;
  const int64_t values_from = (work.end_block() - work.first_block() + kSoftmaxTiles) * 64 * ahead.lines;
  const Ahead nothing{.lines = ahead.lines};
  for (int64_t i = 0; i < work.num_rows * head_dim; i += kLanes) store(out.value + i, zero8());
  for_slices(work.num_rows, [&](int64_t row, auto count) {
    constexpr int rows = decltype(count)::value;
    // A token that a row doesn't see must not be added with weight zero: zero times what lies there may be NaN. So the
    // rows go together over what all of them see, and each alone before and after.
    const Span shared = overlap(work.seen(row), work.seen(row + rows - 1));
    float *p = scores + row * kSegment, *value = out.value + row * head_dim;
    const auto alone = [&](int r, Span tokens) {
      add_all_values<Stored, 1>(work.values, nothing, 0, tokens, p + r * kSegment, head_dim, value + r * head_dim);
    };
    if (shared.first >= shared.last) {
      for (int r = 0; r < rows; ++r) alone(r, work.seen(row + r));
      return;
    }
    for (int r = 0; r < rows; ++r) alone(r, {work.seen(row + r).first, shared.first});
    add_all_values<Stored, rows>(work.values, row == 0 && lines_a_call == 0 ? ahead : nothing, values_from, shared, p,
                                 head_dim, value);
    for (int r = 0; r < rows; ++r) alone(r, {shared.last, work.seen(row + r).last});
  });
}

// Tiles of halves as tiles of floats, for many rows to read; gives the end of those.
inline float *widen(const Work &work, const uint8_t **tiles, float *floats) {
  const int64_t count = kBlockSize * work.head_dim;
  for (int block = work.first_block(); block < work.end_block(); ++block, floats += count) {
    const Half *halves = reinterpret_cast<const Half *>(tiles[block]);
    for (int64_t i = 0; i < count; i += kWideLanes) store(floats + i, wide_load(halves + i));
    tiles[block] = reinterpret_cast<const uint8_t *>(floats);
  }
  return floats;
}

} // namespace
