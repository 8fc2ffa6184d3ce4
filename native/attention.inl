// Attention over blocks. Lanes are tokens for K and dimensions for V; a score adds its dimensions in order, a value its
// tokens in order. A segment of 256 absolute positions becomes (max, sum, value), and segments merge in order: how the
// work was cut can't show in the bits. Rows, the queries of some tokens and heads, share every load of K and V; what
// a row adds up never depends on the rows beside it.

namespace {

using kvik::AttendArgs;
using kvik::kBlockSize;
using kvik::kSegment;
using kvik::kSuperblock;
using kvik::LayerKV;
using kvik::Partial;
using kvik::SegmentTask;

enum Side { kKey = 0, kValue = 1 };

inline uint8_t *tile_of(const LayerKV &kv, int64_t block, int64_t head, Side side) {
  const int64_t superblock = block / kSuperblock, within = block % kSuperblock;
  const int64_t tile = (head * 2 + side) * kSuperblock + within;
  return static_cast<uint8_t *>(kv.data) + superblock * kv.superblock_bytes + tile * kv.tile_bytes;
}

// ---- Writing

// One head's key or value, converted eight at a time; `put(d, x)` stores dimension d.
template <class Stored, class Put> inline void convert(const float *x, int64_t head_dim, Put put) {
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    Stored eight[kLanes];
    store(eight, load(x + d));
    for (int i = 0; i < kLanes; ++i) put(d + i, eight[i]);
  }
}

template <class Stored> void write_token(const LayerKV &kv, const float *k, const float *v, int64_t slot) {
  const int64_t block = slot / kBlockSize, token = slot % kBlockSize, head_dim = kv.head_dim;
  for (int64_t head = 0; head < kv.num_kv_heads; ++head) {
    Stored *keys = reinterpret_cast<Stored *>(tile_of(kv, block, head, kKey)) + token;
    Stored *values = reinterpret_cast<Stored *>(tile_of(kv, block, head, kValue)) + token * head_dim;
    convert<Stored>(k + head * head_dim, head_dim, [&](int64_t d, Stored x) { keys[d * kBlockSize] = x; });
    for (int64_t d = 0; d < head_dim; d += kLanes) store(values + d, load(v + head * head_dim + d));
  }
}

// What an array is multiplied with to become whole numbers of at most `levels`, and the value of 1 afterwards. NaN and
// infinity have no such number: the unit becomes NaN, and with it everything that the array takes part in.
struct Unit {
  float inverse, value;
};
inline Unit unit_of(float top, Float8 defect, float levels, float least) {
  const bool usable = top > least;
  return {usable ? levels / top : 0.0f, (usable ? top / levels : 0.0f) + add_lanes(defect)};
}
inline Unit unit_of(const float *x, int64_t count, float levels, float least) {
  Float8 largest = zero8(), defect = zero8(); // x - x: NaN where x is NaN or infinite, else zero
  for (int64_t i = 0; i < count; i += kLanes) {
    const Float8 v = load(x + i);
    largest = max(abs(v), largest);
    defect = defect + (v - v);
  }
  return unit_of(max_lanes(largest), defect, levels, least);
}

// Writes the bytes through `put(d, byte)` and gives the scale.
template <class Put> inline float quantize_head(const float *x, int64_t head_dim, Put put) {
  const Unit unit = unit_of(x, head_dim, 127.0f, 1e-30f);
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const Float8 scaled = load(x + d) * broadcast(unit.inverse);
    int32_t quants[kLanes];
    store(quants, to_int(max(min(scaled, broadcast(127.0f)), broadcast(-127.0f))));
    for (int i = 0; i < kLanes; ++i) put(d + i, static_cast<uint8_t>(quants[i] + 128));
  }
  return unit.value;
}

inline float *scales_of(const LayerKV &kv, uint8_t *tile) {
  return reinterpret_cast<float *>(tile + kBlockSize * kv.head_dim);
}
inline const float *scales_of(const LayerKV &kv, const uint8_t *tile) {
  return reinterpret_cast<const float *>(tile + kBlockSize * kv.head_dim);
}

void write_quantized_token(const LayerKV &kv, const float *k, const float *v, int64_t slot) {
  const int64_t block = slot / kBlockSize, token = slot % kBlockSize, head_dim = kv.head_dim;
  for (int64_t head = 0; head < kv.num_kv_heads; ++head) {
    uint8_t *keys = tile_of(kv, block, head, kKey), *values = tile_of(kv, block, head, kValue);
    scales_of(kv, keys)[token] = quantize_head(k + head * head_dim, head_dim, [&](int64_t d, uint8_t byte) {
      keys[(d / 4 * kBlockSize + token) * 4 + d % 4] = byte;
    });
    scales_of(kv, values)[token] = quantize_head(v + head * head_dim, head_dim, [&](int64_t d, uint8_t byte) {
      values[(token / 4 * head_dim + d) * 4 + token % 4] = byte;
    });
  }
}

void write_kv(const LayerKV &kv, const float *k, const float *v, int64_t slot) {
  if (kv.type == kvik::KVType::int8) return write_quantized_token(kv, k, v, slot);
  if (kv.type == kvik::KVType::f16) return write_token<Half>(kv, k, v, slot);
  write_token<float>(kv, k, v, slot);
}

// ---- What is common to every format

// Rows that one pass over a tile serves: with four vectors a row they fill the registers.
#if KVIK_SIMD_AVX512
constexpr int kRowsAtOnce = 6;
#else
constexpr int kRowsAtOnce = 3;
#endif
constexpr int kTileVectors = kBlockSize / kWideLanes; // of 32 tokens

template <int n> struct Count {
  static constexpr int value = n;
};
// Calls function(Count<count>) for a count in 1 ... most.
template <int most, class Function> inline void with_count(int64_t count, const Function &function) {
  if constexpr (most > 1)
    if (count < most) return with_count<most - 1>(count, function);
  function(Count<most>{});
}
// Calls function(first row, Count<rows>) for slices of all rows.
template <class Function> inline void for_slices(int64_t num_rows, const Function &function) {
  for (int64_t row = 0; row < num_rows; row += kRowsAtOnce)
    with_count<kRowsAtOnce>(smaller(num_rows - row, kRowsAtOnce), [&](auto count) { function(row, count); });
}

// Columns of a segment, or a part of them.
struct Span {
  int first, last; // [first, last)
};
inline int larger_int(int a, int b) { return a > b ? a : b; }
inline int smaller_int(int a, int b) { return a < b ? a : b; }
inline Span overlap(Span a, Span b) { return {larger_int(a.first, b.first), smaller_int(a.last, b.last)}; }

// Where rows, tiles and what they see lie.
struct Work {
  int64_t num_rows, group, head_dim;
  const float *q; // of the first token and the KV head's first query head
  int64_t token_stride;
  Span all;                               // columns that some row sees
  int64_t first_count, window;            // columns that the first token may see; each later token sees one more
  const uint8_t *keys[kSuperblock + 2];   // tiles, then the first two of what comes next
  const uint8_t *values[kSuperblock + 2]; // tiles, then the first two of the next keys
  float scale;

  const float *query(int64_t row) const { return q + row / group * token_stride + row % group * head_dim; }
  Span seen(int64_t row) const {
    const int64_t count = first_count + row / group, first = count - window;
    return {static_cast<int>(first > 0 ? first : 0), static_cast<int>(smaller(kSegment, count))};
  }
};

inline Work work_of(const AttendArgs &args, const SegmentTask &task, const SegmentTask *next) {
  Work work;
  const LayerKV &kv = args.kv;
  const int64_t start = task.segment * kSegment;
  work.group = args.num_heads / kv.num_kv_heads;
  work.num_rows = task.num_tokens * work.group;
  work.head_dim = kv.head_dim;
  work.token_stride = args.num_heads * kv.head_dim;
  work.q = args.q + task.first_token * work.token_stride + task.kv_head * work.group * kv.head_dim;
  work.first_count = task.whole ? kSegment : args.positions[task.first_token] + 1 - start;
  work.window = task.whole ? kvik::kNoWindow : args.window;
  work.scale = args.scale;
  work.all = {work.seen(0).first, work.seen(work.num_rows - 1).last};

  const int32_t *table = args.block_tables + args.sequence_index[task.first_token] * args.table_width;
  const int first = work.all.first / kBlockSize, last = (work.all.last + kBlockSize - 1) / kBlockSize;
  for (int i = first; i < last; ++i) {
    const int32_t block = table[start / kBlockSize + i];
    work.keys[i] = tile_of(kv, block, task.kv_head, kKey);
    work.values[i] = tile_of(kv, block, task.kv_head, kValue);
  }
  // A tile prefetches the next but one: after the keys come the values, after the values the next task's keys.
  const uint8_t *upcoming[2] = {work.values[first], work.values[smaller_int(first + 1, last - 1)]};
  work.keys[last] = upcoming[0];
  work.keys[last + 1] = upcoming[1];
  if (next) {
    const int64_t next_start = next->segment * kSegment;
    const int64_t count = args.positions[next->first_token] + 1 - next_start, from = count - args.window;
    const int64_t begin = (from > 0 ? from : 0) / kBlockSize;
    const int64_t end = (smaller(kSegment, count) + kBlockSize - 1) / kBlockSize;
    const int32_t *next_table = args.block_tables + args.sequence_index[next->first_token] * args.table_width;
    for (int i = 0; i < 2; ++i) {
      const int64_t block = next_table[next_start / kBlockSize + smaller(begin + i, end - 1)];
      upcoming[i] = tile_of(kv, block, next->kv_head, kKey);
    }
  }
  work.values[last] = upcoming[0];
  work.values[last + 1] = upcoming[1];
  return work;
}

template <int bytes> inline void prefetch_bytes(const uint8_t *p) {
  for (int i = 0; i < bytes; i += 64) prefetch(p + i);
}

// What a thread reads next, fetched a little at a time while there is arithmetic enough to hide it.
struct Ahead {
  const uint8_t *tiles[2 * kSuperblock];
  int num_tiles = 0, tile = 0;
  int64_t lines = 0, line = 0; // cache lines of a tile, and the next one of them
  int64_t share = 0;           // lines of one call

  void fetch() {
    for (int64_t left = share; left > 0 && tile < num_tiles;) {
      const int64_t end = smaller(lines, line + left);
      left -= end - line;
      for (; line < end; ++line) prefetch(tiles[tile] + line * 64);
      if (line == lines) ++tile, line = 0;
    }
  }
};

inline Ahead ahead_of(const AttendArgs &args, const SegmentTask *next, int64_t num_calls) {
  Ahead ahead;
  if (!next) return ahead;
  const int64_t start = next->segment * kSegment;
  const int64_t last = smaller(kSegment, args.positions[next->first_token] + 1 - start);
  const int64_t first = args.positions[next->first_token] + 1 - start - args.window;
  const int32_t *table = args.block_tables + args.sequence_index[next->first_token] * args.table_width;
  for (const Side side : {kKey, kValue})
    for (int64_t i = (first > 0 ? first : 0) / kBlockSize; i * kBlockSize < last; ++i)
      ahead.tiles[ahead.num_tiles++] = tile_of(args.kv, table[start / kBlockSize + i], next->kv_head, side);
  ahead.lines = args.kv.tile_bytes / 64;
  ahead.share = ahead.num_tiles * ahead.lines / num_calls + 1;
  return ahead;
}

// Calls function(i, edge) for the vectors of a row that hold columns it sees; `edge` is Count<1> where they hold others
// too, so that only those pay for telling them apart.
template <class Function> inline void for_vectors(Span seen, const Function &function) {
  for (int i = seen.first / kWideLanes * kWideLanes; i < seen.last; i += kWideLanes)
    if (i < seen.first || i + kWideLanes > seen.last)
      function(i, Count<1>{});
    else
      function(i, Count<0>{});
}
template <class Edge> inline Wide only_seen(Edge, Span seen, int i, Wide inside, Wide outside) {
  if constexpr (Edge::value == 0) return inside;
  return first_lanes(seen.first - i, outside, first_lanes(seen.last - i, inside, outside));
}

// Turns scores into exp(score - max) in place; the other lanes of a vector that holds a seen column become zero.
inline void softmax_row(float *scores, Span seen, float *max_out, float *sum_out) {
  const Wide lowest = wide_broadcast(-INFINITY);
  Wide largest = lowest;
  for_vectors(seen, [&](int i, auto edge) {
    largest = max(only_seen(edge, seen, i, load_as<Wide>(scores + i), lowest), largest);
  });
  const float top = max_of(largest);
  Float8 sum = zero8();
  for_vectors(seen, [&](int i, auto edge) {
    const Wide p = exponential(load_as<Wide>(scores + i) - wide_broadcast(top));
    const Wide kept = only_seen(edge, seen, i, p, wide_zero());
    store(scores + i, kept);
    sum = add_eights(sum, kept);
  });
  *max_out = top;
  *sum_out = add_lanes(sum);
}

// ---- float32 and float16

// Scores of some rows against the keys of some blocks: scores (rows, 256), from the first block's column.
template <class Stored, int rows, int blocks> inline void score_blocks(const float *const *q,
                                                                       const uint8_t *const *tiles, bool fetch_ahead,
                                                                       int64_t head_dim, float scale, float *scores) {
  const Stored *keys[blocks];
  const uint8_t *ahead[blocks];
  for (int b = 0; b < blocks; ++b) {
    keys[b] = reinterpret_cast<const Stored *>(tiles[b]);
    ahead[b] = fetch_ahead ? tiles[b + 2] : tiles[b];
  }
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

// value[r][d ...) += sum over tokens of p[r][token] * V[token][d ...), token after token.
template <class V, class Stored, int rows, int vectors>
inline void add_values(const uint8_t *const *tiles, bool fetch_ahead, Span tokens, const float *p, int64_t head_dim,
                       int64_t d, float *value) {
  constexpr int kVectorLanes = sizeof(V) / sizeof(float);
  V sum[rows][vectors];
  KVIK_UNROLL
  for (int r = 0; r < rows; ++r) KVIK_UNROLL
  for (int i = 0; i < vectors; ++i) sum[r][i] = load_as<V>(value + r * head_dim + d + i * kVectorLanes);
  for (int token = tokens.first; token < tokens.last;) {
    const int block = token / kBlockSize, end = smaller_int(tokens.last, (block + 1) * kBlockSize);
    const Stored *row = reinterpret_cast<const Stored *>(tiles[block]) + token % kBlockSize * head_dim + d;
    const uint8_t *ahead = fetch_ahead ? tiles[block + 2] : tiles[block];
    ahead += (token % kBlockSize * head_dim + d) * sizeof(Stored);
    for (; token < end; ++token, row += head_dim, ahead += head_dim * sizeof(Stored)) {
      prefetch_bytes<vectors * kVectorLanes * sizeof(Stored)>(ahead);
      V v[vectors];
      KVIK_UNROLL
      for (int i = 0; i < vectors; ++i) v[i] = load_as<V>(row + i * kVectorLanes);
      KVIK_UNROLL
      for (int r = 0; r < rows; ++r) {
        const V weight = spread<V>(p[r * kSegment + token]);
        KVIK_UNROLL
        for (int i = 0; i < vectors; ++i) sum[r][i] = fma(v[i], weight, sum[r][i]);
      }
    }
  }
  KVIK_UNROLL
  for (int r = 0; r < rows; ++r) KVIK_UNROLL
  for (int i = 0; i < vectors; ++i) store(value + r * head_dim + d + i * kVectorLanes, sum[r][i]);
}

template <class Stored, int rows> inline void add_all_values(const uint8_t *const *tiles, bool fetch_ahead, Span tokens,
                                                             const float *p, int64_t head_dim, float *value) {
  if (tokens.first >= tokens.last) return;
  int64_t d = 0;
  for (; d + 4 * kWideLanes <= head_dim; d += 4 * kWideLanes)
    add_values<Wide, Stored, rows, 4>(tiles, fetch_ahead, tokens, p, head_dim, d, value);
  for (; d + kWideLanes <= head_dim; d += kWideLanes)
    add_values<Wide, Stored, rows, 1>(tiles, fetch_ahead, tokens, p, head_dim, d, value);
  for (; d < head_dim; d += kLanes)
    add_values<Float8, Stored, rows, 1>(tiles, fetch_ahead, tokens, p, head_dim, d, value);
}

template <class Stored> void attend_floats(const Work &work, float *scores, const Partial &out, Ahead &ahead) {
  const int64_t head_dim = work.head_dim;
  const Span all = work.all;
  for (int column = all.first / kBlockSize * kBlockSize; column < all.last;) {
    // Two blocks at once give the sums that are needed to keep wide multipliers busy.
    const int blocks = kWideLanes > kLanes && column + kBlockSize < all.last ? 2 : 1;
    for_slices(work.num_rows, [&](int64_t row, auto count) {
      constexpr int rows = decltype(count)::value;
      const float *q[rows];
      for (int r = 0; r < rows; ++r) q[r] = work.query(row + r);
      const auto *tiles = work.keys + column / kBlockSize;
      float *slice = scores + row * kSegment + column;
      ahead.fetch();
      if (blocks == 2)
        score_blocks<Stored, rows, 2>(q, tiles, row == 0, head_dim, work.scale, slice);
      else
        score_blocks<Stored, rows, 1>(q, tiles, row == 0, head_dim, work.scale, slice);
    });
    column += blocks * kBlockSize;
  }
  for (int64_t row = 0; row < work.num_rows; ++row) {
    ahead.fetch();
    softmax_row(scores + row * kSegment, work.seen(row), out.max + row, out.sum + row);
  }
  for (int64_t i = 0; i < work.num_rows * head_dim; i += kLanes) store(out.value + i, zero8());
  for_slices(work.num_rows, [&](int64_t row, auto count) {
    constexpr int rows = decltype(count)::value;
    // A token that a row doesn't see must not be added with weight zero: zero times what lies there may be NaN. So the
    // rows go together over what all of them see, and each alone before and after.
    const Span shared = overlap(work.seen(row), work.seen(row + rows - 1));
    float *p = scores + row * kSegment, *value = out.value + row * head_dim;
    const auto alone = [&](int r, Span tokens) {
      add_all_values<Stored, 1>(work.values, false, tokens, p + r * kSegment, head_dim, value + r * head_dim);
    };
    if (shared.first >= shared.last) {
      for (int r = 0; r < rows; ++r) alone(r, work.seen(row + r));
      return;
    }
    for (int r = 0; r < rows; ++r) alone(r, {work.seen(row + r).first, shared.first});
    add_all_values<Stored, rows>(work.values, row == 0, shared, p, head_dim, value);
    for (int r = 0; r < rows; ++r) alone(r, {shared.last, work.seen(row + r).last});
  });
}

// Tiles of halves as tiles of floats, for many rows to read.
inline void widen(const LayerKV &kv, Work &work, float *floats) {
  const int64_t count = kBlockSize * kv.head_dim;
  const int first = work.all.first / kBlockSize, last = (work.all.last + kBlockSize - 1) / kBlockSize;
  for (auto *tiles : {work.keys, work.values}) {
    for (int block = first; block < last; ++block, floats += count) {
      const Half *halves = reinterpret_cast<const Half *>(tiles[block]);
      for (int64_t i = 0; i < count; i += kWideLanes) store(floats + i, wide_load(halves + i));
      tiles[block] = reinterpret_cast<const uint8_t *>(floats);
    }
  }
}

// ---- int8

constexpr int kQuads = kSegment / 4;
constexpr int kQueryQuads = kvik::kMostInt8HeadDim / 4;

// What makes a row's whole numbers values again.
struct RowUnit {
  float value;     // of 1
  int32_t offsets; // 128 times the sum of the factors: what the bytes' offset adds to each sum of products
};

inline RowUnit quantize_query(const float *q, int64_t head_dim, float scale, Factors *factors) {
  const Unit unit = unit_of(q, head_dim, kFactorLevels, 1e-30f);
  float padded[kvik::kMostInt8HeadDim + kWideLanes];
  std::memcpy(padded, q, static_cast<std::size_t>(head_dim) * sizeof(float));
  std::memset(padded + head_dim, 0, kWideLanes * sizeof(float));
  const Wide most = wide_broadcast(kFactorLevels), least = wide_broadcast(-kFactorLevels);
  WideInt sum = wide_int(0);
  for (int64_t d = 0; d < head_dim; d += kWideLanes) {
    const WideInt whole = to_int(max(min(wide_load(padded + d) * wide_broadcast(unit.inverse), most), least));
    sum = sum + whole;
    store_factors(factors + d / 4, whole);
  }
  return {unit.value * scale, 128 * add_lanes(sum)};
}

// A row's softmax times the scales of the values; tokens of `all` that the row doesn't see get the factor zero.
inline RowUnit quantize_weights(float *p, Span seen, Span all, const float *scales, Factors *factors) {
  Wide largest = wide_zero(), defect = wide_zero();
  for_vectors(seen, [&](int i, auto edge) {
    const Wide weight = load_as<Wide>(p + i) * load_as<Wide>(scales + i);
    const Wide w = only_seen(edge, seen, i, weight, wide_zero()); // zero times what lies there may be NaN
    store(p + i, w);
    largest = max(w, largest);
    defect = defect + (w - w);
  });
  const Unit unit = unit_of(max_of(largest), add_eights(zero8(), defect), kFactorLevels, 1e-34f);
  WideInt sum = wide_int(0);
  const Wide inverse = wide_broadcast(unit.inverse), most = wide_broadcast(kFactorLevels);
  int first = seen.first / kWideLanes * kWideLanes, last = first;
  for (; last < seen.last; last += kWideLanes) {
    const WideInt whole = to_int(min(load_as<Wide>(p + last) * inverse, most));
    sum = sum + whole;
    store_factors(factors + last / 4, whole);
  }
  for (int quad = all.first / 4; quad < first / 4; ++quad) factors[quad] = Factors{};
  for (int quad = last / 4; quad < (all.last + 3) / 4; ++quad) factors[quad] = Factors{};
  return {unit.value, 128 * add_lanes(sum)};
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
      store(scores + r * kSegment + i * kWideLanes, to_float(total(sum[r][i]) - wide_int(units[r].offsets)) * scale);
    }
}

// value[r][d ...) = sum over tokens; with `eight` the last eight dimensions of a head.
template <bool eight, int rows, int vectors>
inline void value_quads(const uint8_t *const *tiles, bool fetch_ahead, Span tokens, const Factors *p,
                        const RowUnit *units, int64_t head_dim, int64_t d, float *value) {
  QuadSum sum[rows][vectors];
  for (auto &row : sum)
    for (QuadSum &lane : row) lane = no_quads();
  const int last = (tokens.last + 3) / 4;
  for (int quad = tokens.first / 4; quad < last;) {
    const int block = quad / (kBlockSize / 4), end = smaller_int(last, (block + 1) * (kBlockSize / 4));
    const int64_t at = (quad % (kBlockSize / 4) * head_dim + d) * 4;
    const uint8_t *bytes = tiles[block] + at, *ahead = tiles[fetch_ahead ? block + 2 : block] + at;
    for (; quad < end; ++quad, bytes += 4 * head_dim, ahead += 4 * head_dim) {
      prefetch_bytes<vectors * 4 * kWideLanes>(ahead);
      for (int i = 0; i < vectors; ++i) {
        const Quads v = eight ? load_eight_quads(bytes) : load_quads(bytes + i * 4 * kWideLanes);
        for (int r = 0; r < rows; ++r) sum[r][i] = add_products(sum[r][i], v, p[r * kQuads + quad]);
      }
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < vectors; ++i) {
      const Wide y = to_float(total(sum[r][i]) - wide_int(units[r].offsets)) * wide_broadcast(units[r].value);
      float *to = value + r * head_dim + d + i * kWideLanes;
      if constexpr (eight)
        store(to, first_eight(y));
      else
        store(to, y);
    }
}

// Integer sums are exact, so rows may go over tokens that they don't see: those have the factor zero.
[[gnu::noinline]] void attend_bytes(const LayerKV &kv, const Work &work, float *scratch, const Partial &out) {
  const int64_t head_dim = work.head_dim, num_rows = work.num_rows;
  const Span all = work.all;
  float *scores = scratch;
  Factors *factors = reinterpret_cast<Factors *>(scores + num_rows * kSegment); // (rows, kQueryQuads), then kQuads
  RowUnit *units = reinterpret_cast<RowUnit *>(factors + num_rows * kQueryQuads);
  for (int64_t row = 0; row < num_rows; ++row)
    units[row] = quantize_query(work.query(row), head_dim, work.scale, factors + row * kQueryQuads);
  const int first_block = all.first / kBlockSize, last_block = (all.last + kBlockSize - 1) / kBlockSize;
  float value_scales[kSegment];
  for (int block = first_block; block < last_block; ++block) {
    const uint8_t *tile = work.keys[block];
    for_slices(num_rows, [&](int64_t row, auto count) {
      score_quads<decltype(count)::value>(factors + row * kQueryQuads, units + row, tile,
                                          row == 0 ? work.keys[block + 2] : tile, head_dim,
                                          scores + row * kSegment + block * kBlockSize);
    });
    std::memcpy(value_scales + block * kBlockSize, scales_of(kv, work.values[block]), kBlockSize * sizeof(float));
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    softmax_row(scores + row * kSegment, work.seen(row), out.max + row, out.sum + row);
    units[row] = quantize_weights(scores + row * kSegment, work.seen(row), all, value_scales, factors + row * kQuads);
  }
  for_slices(num_rows, [&](int64_t row, auto count) {
    constexpr int rows = decltype(count)::value;
    constexpr int kVectors = rows <= 3 ? 4 : 2; // each has two sums where the kernels are wide
    const auto run = [&](auto eight, auto vectors, int64_t d) {
      value_quads<decltype(eight)::value == 1, rows, decltype(vectors)::value>(
          work.values, row == 0, all, factors + row * kQuads, units + row, head_dim, d, out.value + row * head_dim);
    };
    int64_t d = 0;
    for (; d + kVectors * kWideLanes <= head_dim; d += kVectors * kWideLanes) run(Count<0>{}, Count<kVectors>{}, d);
    for (; d + kWideLanes <= head_dim; d += kWideLanes) run(Count<0>{}, Count<1>{}, d);
    for (; d < head_dim; d += kLanes) run(Count<1>{}, Count<1>{}, d);
  });
}

// ---- The table's functions

void attend_segment(const AttendArgs &args, const SegmentTask &task, const SegmentTask *next, float *scratch,
                    const Partial &out) {
  Work work = work_of(args, task, next);
  Ahead ahead;
  switch (args.kv.type) {
  case kvik::KVType::int8:
    return attend_bytes(args.kv, work, scratch, out);
  case kvik::KVType::f16:
    if (work.num_rows > 2 * kRowsAtOnce) {
      widen(args.kv, work, scratch + work.num_rows * kSegment);
      // The tiles' own prefetching sees the widened ones only.
      ahead = ahead_of(args, next, work.num_rows + (work.num_rows + kRowsAtOnce - 1) / kRowsAtOnce * kSuperblock / 2);
      return attend_floats<float>(work, scratch, out, ahead);
    }
    return attend_floats<Half>(work, scratch, out, ahead);
  default:
    return attend_floats<float>(work, scratch, out, ahead);
  }
}

void merge_segments(const Partial &total, const Partial &next, int64_t rows, int64_t head_dim) {
  for (int64_t row = 0; row < rows; ++row) {
    const float top = total.max[row] > next.max[row] ? total.max[row] : next.max[row];
    float factors[kLanes] = {total.max[row] - top, next.max[row] - top};
    store(factors, exponential(load(factors)));
    total.max[row] = top;
    total.sum[row] = fmaf(total.sum[row], factors[0], next.sum[row] * factors[1]);
    const Float8 keep = broadcast(factors[0]), take = broadcast(factors[1]);
    for (int64_t d = row * head_dim; d < (row + 1) * head_dim; d += kLanes)
      store(total.value + d, fma(load(total.value + d), keep, load(next.value + d) * take));
  }
}

} // namespace
