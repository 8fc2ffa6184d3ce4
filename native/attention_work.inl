// Attention over blocks. Lanes are tokens for K and dimensions for V; a score adds its dimensions in order, a value its
// tokens in order. A segment of 256 absolute places becomes (max, sum, value), and segments merge in order: how the
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

// Calls function(Count<count>) for a count in 1 ... max_count.
template <int max_count, class Function> inline void with_count(int64_t count, const Function &function) {
  if constexpr (max_count > 1)
    if (count < max_count) return with_count<max_count - 1>(count, function);
  function(Count<max_count>{});
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
  int64_t num_rows, queries_per_kv, head_dim;
  const float *q; // of the first token and the KV head's first query head
  int64_t token_stride;
  Span columns;                                           // of the segment, those that are read at all
  Span all;                                               // columns that some row sees
  int64_t first, count;                                   // columns [first, count) that the first token may see
  const uint8_t *keys[kSuperblock], *values[kSuperblock]; // tiles
  float scale, soft_cap;

  int first_block() const { return all.first / kBlockSize; }
  int end_block() const { return (all.last + kBlockSize - 1) / kBlockSize; }

  const float *query(int64_t row) const {
    return q + row / queries_per_kv * token_stride + row % queries_per_kv * head_dim;
  }
  static Span visible(int64_t first, int64_t count) {
    return {static_cast<int>(first > 0 ? first : 0), static_cast<int>(smaller(kSegment, count))};
  }
  Span seen(int64_t row) const {
    const int64_t later = row / queries_per_kv; // each token sees one more, and from one later on
    return overlap(visible(first + later, count + later), columns);
  }
};

// What a segment is read from, and which of its columns.
struct Part {
  const KVTiles &tiles;
  const int32_t *block_tables;
  int64_t table_width;
  Span columns;
};

inline Work work_of(const AttendArgs &args, const SegmentTask &task, const Part &part) {
  Work work;
  const LayerKV &kv = args.kv;
  const int64_t start = task.segment * kSegment;
  work.queries_per_kv = args.num_heads / kv.num_kv_heads;
  work.num_rows = task.num_tokens * work.queries_per_kv;
  work.head_dim = kv.head_dim;
  work.token_stride = args.num_heads * kv.head_dim;
  work.q = args.q + task.first_token * work.token_stride + task.kv_head * work.queries_per_kv * kv.head_dim;
  work.count = task.whole ? kSegment : args.kv_bounds[task.first_token] - start;
  work.first = task.whole ? -kvik::kNoWindow : args.kv_index[task.first_token] + 1 - args.window - start;
  work.scale = args.scale;
  work.soft_cap = args.soft_cap;
  work.columns = part.columns;
  work.all = {work.seen(0).first, work.seen(work.num_rows - 1).last};

  const int32_t *table = part.block_tables + args.sequence_index[task.first_token] * part.table_width;
  for (int i = work.first_block(); i < work.end_block(); ++i) {
    const int32_t block = table[start / kBlockSize + i];
    work.keys[i] = tile_of(part.tiles, block, task.kv_head, kKey);
    work.values[i] = tile_of(part.tiles, block, task.kv_head, kValue);
  }
  return work;
}

template <int bytes> inline void prefetch_bytes(const uint8_t *p) {
  for (int i = 0; i < bytes; i += 64) prefetch_to_l2(p + i);
}

// The tiles that a thread reads next, in order. A core drops what it is asked for faster than memory brings it, so each
// phase asks for its part while it has arithmetic to hide it: keys and values for a tile as they read one, line by line
// with their own, and the softmax between them for two.
struct Ahead {
  const uint8_t *tiles[3 * kSuperblock];
  int num_tiles = 0;
  int64_t lines = 0; // cache lines of a tile, of the smaller where keys and values differ

  // What `fetch` comes to next.
  int tile = 0;
  int64_t line = 0;

  // What lies so far behind the first tile's beginning; null where nothing does.
  const uint8_t *at(int64_t bytes) const {
    if (num_tiles == 0) return nullptr; // and be spared a division
    const auto position = static_cast<uint32_t>(bytes), size = static_cast<uint32_t>(64 * lines);
    const uint32_t index = position / size;
    return index < static_cast<uint32_t>(num_tiles) ? tiles[index] + position % size : nullptr;
  }
  // A tile, or `own`, which costs nothing for it is being read.
  const uint8_t *tile_at(int index, const uint8_t *own) const { return index < num_tiles ? tiles[index] : own; }

  void fetch(int64_t count) {
    for (; count > 0 && tile < num_tiles; --count) {
      prefetch_to_l2(tiles[tile] + line * 64);
      if (++line == lines) ++tile, line = 0;
    }
  }
};

constexpr int kTilesAhead = 3;   // of a task, fetched before it begins at least
constexpr int kSoftmaxTiles = 2; // fetched during its softmax

// Tiles [first, last) of a task, keys before values.
inline void add_tiles(Ahead &ahead, const AttendArgs &args, const SegmentTask &task, Span columns, int first,
                      int last) {
  const int begin = columns.first / kBlockSize, count = (columns.last + kBlockSize - 1) / kBlockSize - begin;
  const int32_t *blocks =
      args.block_tables + args.sequence_index[task.first_token] * args.table_width + task.segment * kSuperblock + begin;
  for (int i = first; i < smaller_int(last, 2 * count); ++i)
    ahead.tiles[ahead.num_tiles++] = tile_of(args.kv, blocks[i % count], task.kv_head, i < count ? kKey : kValue);
}

// What is left of a task's tiles when it begins, and the first of the next task's; or all of those and no others.
inline Ahead ahead_of(const AttendArgs &args, const SegmentTask &task, const SegmentTask *next, Span own,
                      bool next_only) {
  Ahead ahead;
  ahead.lines = smaller(args.kv.key.bytes, args.kv.value.bytes) / 64;
  if (!next_only) add_tiles(ahead, args, task, own, kTilesAhead, 2 * kSuperblock);
  if (next) {
    // The first token's; the others see about the same.
    const int64_t token = next->first_token, start = next->segment * kSegment;
    const Span seen = Work::visible(args.kv_index[token] + 1 - args.window - start, args.kv_bounds[token] - start);
    add_tiles(ahead, args, *next, seen, 0, next_only ? 2 * kSuperblock : kTilesAhead + kSoftmaxTiles);
  }
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
// Meanwhile `step` bytes from `fetched` on are fetched for each vector.
inline void softmax_row(float *scores, Span seen, float cap, const uint8_t *fetched, int64_t step, float *max_out,
                        float *sum_out) {
  if (cap > 0) for_vectors(seen, [&](int i, auto) { store(scores + i, soft_capped(load_as<Wide>(scores + i), cap)); });
  const Wide lowest = wide_broadcast(-INFINITY);
  Wide largest = lowest;
  for_vectors(seen, [&](int i, auto edge) {
    largest = max(only_seen(edge, seen, i, load_as<Wide>(scores + i), lowest), largest);
  });
  const float top = max_of(largest);
  F32x8 sum = zero8();
  for_vectors(seen, [&](int i, auto edge) {
    for (int64_t at = 0; at < step; at += 64) prefetch(fetched + at);
    fetched += step;
    const Wide p = exponential(load_as<Wide>(scores + i) - wide_broadcast(top));
    const Wide kept = only_seen(edge, seen, i, p, wide_zero());
    store(scores + i, kept);
    sum = add_eights(sum, kept);
  });
  *max_out = top;
  *sum_out = add_lanes(sum);
}

// All rows of a task. What is ahead, from the keys' tiles on, is fetched in even steps; or some lines for each row.
inline void softmax_rows(const Work &work, float *scores, Ahead &ahead, int64_t lines_a_call, const Partial &out) {
  if (lines_a_call > 0) {
    for (int64_t row = 0; row < work.num_rows; ++row) {
      ahead.fetch(lines_a_call);
      softmax_row(scores + row * kSegment, work.seen(row), work.soft_cap, nullptr, 0, out.max + row, out.sum + row);
    }
    return;
  }
  const int first_tile = work.end_block() - work.first_block();
  const int64_t vectors = (work.all.last - work.all.first + kWideLanes - 1) / kWideLanes;
  const int64_t row_bytes = kSoftmaxTiles * ahead.lines * 64 / work.num_rows,
                step = (row_bytes + vectors - 1) / vectors;
  for (int64_t row = 0; row < work.num_rows; ++row) {
    float *p = scores + row * kSegment;
    const uint8_t *fetched = ahead.at(first_tile * ahead.lines * 64 + row * row_bytes);
    softmax_row(p, work.seen(row), work.soft_cap, fetched, fetched ? step : 0, out.max + row, out.sum + row);
  }
}

} // namespace
