// Attention over blocks. Lanes are tokens for K and dimensions for V; a score adds its dimensions in order, a value its
// tokens in order. A segment of 256 absolute positions becomes (max, sum, value), and segments merge in order: how the
// work was cut can't show in the bits.

namespace {

using kvik::AttendArgs;
using kvik::kBlockSize;
using kvik::kSegment;
using kvik::kSuperblock;
using kvik::LayerKV;
using kvik::Partial;

enum Side { kKey = 0, kValue = 1 };

// The tile of one block and head: K is [head_dim][32], V is [32][head_dim].
template <class Stored> inline Stored *tile_of(const LayerKV &kv, int64_t block, int64_t head, Side side) {
  const int64_t superblock = block / kSuperblock, within = block % kSuperblock;
  const int64_t index = ((superblock * kv.num_kv_heads + head) * 2 + side) * kSuperblock + within;
  return static_cast<Stored *>(kv.data) + index * kBlockSize * kv.head_dim;
}

inline void put(float *p, float x) { *p = x; }
inline void put(Half *p, float x) { *p = to_half(x); }

template <class Stored> void write_token(const LayerKV &kv, const float *k, const float *v, int64_t slot) {
  const int64_t block = slot / kBlockSize, token = slot % kBlockSize;
  for (int64_t head = 0; head < kv.num_kv_heads; ++head) {
    Stored *keys = tile_of<Stored>(kv, block, head, kKey) + token;
    Stored *values = tile_of<Stored>(kv, block, head, kValue) + token * kv.head_dim;
    for (int64_t d = 0; d < kv.head_dim; ++d) put(keys + d * kBlockSize, k[head * kv.head_dim + d]);
    for (int64_t d = 0; d < kv.head_dim; ++d) put(values + d, v[head * kv.head_dim + d]);
  }
}

void write_kv(const LayerKV &kv, const float *k, const float *v, int64_t slot) {
  if (kv.type == kvik::KVType::f16) return write_token<Half>(kv, k, v, slot);
  write_token<float>(kv, k, v, slot);
}

// Scores of `heads` query heads against the 32 keys of one tile: scores (heads, 256), this block's 32 columns.
template <class Stored, int heads>
inline void score_tile(const float *q, const Stored *keys, int64_t head_dim, float scale, float *scores) {
  Float8 sum[heads][4];
  for (auto &row : sum)
    for (Float8 &lane : row) lane = zero8();
  for (int64_t d = 0; d < head_dim; ++d) {
    Float8 k[4];
    for (int i = 0; i < 4; ++i) k[i] = load(keys + d * kBlockSize + i * kLanes);
    for (int h = 0; h < heads; ++h) {
      const Float8 x = broadcast(q[h * head_dim + d]);
      for (int i = 0; i < 4; ++i) sum[h][i] = fma(k[i], x, sum[h][i]);
    }
  }
  for (int h = 0; h < heads; ++h)
    for (int i = 0; i < 4; ++i) store(scores + h * kSegment + i * kLanes, sum[h][i] * broadcast(scale));
}

// value[h][d ... d+8*lanes) += sum over tokens of p[h][token] * V[token][d ...), block after block.
template <class Stored, int heads, int vectors> inline void
add_values(const Stored *const *tiles, int count, const float *p, int64_t head_dim, int64_t d, float *value) {
  Float8 sum[heads][vectors];
  for (auto &row : sum)
    for (Float8 &lane : row) lane = zero8();
  for (int token = 0; token < count; ++token) {
    const Stored *row = tiles[token / kBlockSize] + token % kBlockSize * head_dim + d;
    Float8 v[vectors];
    for (int i = 0; i < vectors; ++i) v[i] = load(row + i * kLanes);
    for (int h = 0; h < heads; ++h) {
      const Float8 weight = broadcast(p[h * kSegment + token]);
      for (int i = 0; i < vectors; ++i) sum[h][i] = fma(v[i], weight, sum[h][i]);
    }
  }
  for (int h = 0; h < heads; ++h)
    for (int i = 0; i < vectors; ++i) store(value + h * head_dim + d + i * kLanes, sum[h][i]);
}

// Turns scores into exp(score - max) in place; columns from `count` on become zero.
inline void softmax_row(float *scores, int count, float *max_out, float *sum_out) {
  const int padded = (count + kLanes - 1) / kLanes * kLanes;
  const Float8 lowest = broadcast(-INFINITY);
  Float8 largest = lowest;
  for (int i = 0; i < padded; i += kLanes) largest = max(first_lanes(count - i, load(scores + i), lowest), largest);
  const float top = max_lanes(largest);
  Float8 sum = zero8();
  for (int i = 0; i < padded; i += kLanes) {
    const Float8 p = first_lanes(count - i, exponential(load(scores + i) - broadcast(top)), zero8());
    store(scores + i, p);
    sum = sum + p;
  }
  *max_out = top;
  *sum_out = add_lanes(sum);
}

// `heads` query heads that share one KV head, over the first `count` tokens of a segment.
template <class Stored, int heads> inline void attend_heads(const float *q, const Stored *const *keys,
                                                            const Stored *const *values, int count, int64_t head_dim,
                                                            float scale, float *scores, const Partial &out) {
  for (int start = 0; start < count; start += kBlockSize)
    score_tile<Stored, heads>(q, keys[start / kBlockSize], head_dim, scale, scores + start);
  for (int h = 0; h < heads; ++h) softmax_row(scores + h * kSegment, count, out.max + h, out.sum + h);
  int64_t d = 0;
  for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes)
    add_values<Stored, heads, 4>(values, count, scores, head_dim, d, out.value);
  for (; d < head_dim; d += kLanes) add_values<Stored, heads, 1>(values, count, scores, head_dim, d, out.value);
}

// Three heads by four vectors fill twelve of the sixteen registers.
constexpr int kHeadsAtOnce = 3;

template <class Stored> void attend_segment_of(const AttendArgs &args, int64_t token, int64_t kv_head, int64_t segment,
                                               float *scratch, const Partial &out) {
  const int64_t head_dim = args.kv.head_dim, group = args.num_heads / args.kv.num_kv_heads;
  const int64_t start = segment * kSegment;
  const int count = static_cast<int>(smaller(kSegment, args.positions[token] + 1 - start));
  const int32_t *table = args.block_tables + args.sequence_index[token] * args.table_width + start / kBlockSize;
  const Stored *keys[kSuperblock], *values[kSuperblock];
  for (int i = 0; i * kBlockSize < count; ++i) {
    keys[i] = tile_of<Stored>(args.kv, table[i], kv_head, kKey);
    values[i] = tile_of<Stored>(args.kv, table[i], kv_head, kValue);
  }
  const float *q = args.q + (token * args.num_heads + kv_head * group) * head_dim;
  for (int64_t h = 0; h < group;) {
    const Partial slice{out.max + h, out.sum + h, out.value + h * head_dim};
    const auto run = [&](auto attend) {
      attend(q + h * head_dim, keys, values, count, head_dim, args.scale, scratch, slice);
    };
    const int64_t left = smaller(group - h, kHeadsAtOnce);
    if (left == 3)
      run(attend_heads<Stored, 3>);
    else if (left == 2)
      run(attend_heads<Stored, 2>);
    else
      run(attend_heads<Stored, 1>);
    h += left;
  }
}

void attend_segment(const AttendArgs &args, int64_t token, int64_t kv_head, int64_t segment, float *scratch,
                    const Partial &out) {
  if (args.kv.type == kvik::KVType::f16) return attend_segment_of<Half>(args, token, kv_head, segment, scratch, out);
  attend_segment_of<float>(args, token, kv_head, segment, scratch, out);
}

void merge_segments(const Partial &total, const Partial &next, int64_t heads, int64_t head_dim) {
  for (int64_t h = 0; h < heads; ++h) {
    const float top = total.max[h] > next.max[h] ? total.max[h] : next.max[h];
    float factors[kLanes] = {total.max[h] - top, next.max[h] - top};
    store(factors, exponential(load(factors)));
    total.max[h] = top;
    total.sum[h] = fmaf(total.sum[h], factors[0], next.sum[h] * factors[1]);
    const Float8 keep = broadcast(factors[0]), take = broadcast(factors[1]);
    for (int64_t d = h * head_dim; d < (h + 1) * head_dim; d += kLanes)
      store(total.value + d, fma(load(total.value + d), keep, load(next.value + d) * take));
  }
}

} // namespace
