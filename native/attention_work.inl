// Attention over blocks. Lanes are tokens for K and dimensions for V; a score adds its dimensions in order, a value its
// tokens in order. A segment of 256 absolute positions becomes (max, sum, value), and segments merge in order: how the
// work was cut can't show in the bits. Rows, the queries of some tokens and heads, share every load of K and V; what
// a row adds up never depends on the rows beside it.

namespace {

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
  float scale, soft_cap;

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
  work.soft_cap = args.soft_cap;
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
inline void softmax_row(float *scores, Span seen, float cap, float *max_out, float *sum_out) {
  if (cap > 0) for_vectors(seen, [&](int i, auto) { store(scores + i, soft_capped(load_as<Wide>(scores + i), cap)); });
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

} // namespace
