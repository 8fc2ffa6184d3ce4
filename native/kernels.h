// The table of kernels that every instruction set fills in. Shapes: T tokens, all arrays row-major and contiguous.
#pragma once

#include <cstdint>

#include "format.h"

namespace kvik {

// Rows of activations, quantised per group of 32 columns: x = scale * (high), or scale * (254 * high + low). They lie
// in panels of 256 columns, all rows of one before the next, so that what a tile reads of many rows lies together. The
// last panel may have fewer columns and is as large.
struct QuantizedRows {
  static constexpr int kColumns = 256, kGroups = kColumns / kGroup; // of a panel
  int8_t *high;                                                     // (panels, T, 256)
  int8_t *low;                                                      // the same, null with int8 activations
  float *scale;                                                     // (panels, T, 8)
  int32_t *totals; // (panels, T, 8, 3): the sum of quants over all 32, the first 16, the last 16
  float *sums;     // the same times scale
  int64_t num_rows;

  static constexpr int64_t panels(int64_t columns) { return (columns + kColumns - 1) / kColumns; }
  int64_t group_at(int64_t panel, int64_t row) const { return (panel * num_rows + row) * kGroups; }
};

struct LinearArgs {
  const uint8_t *weight; // packed, format.h
  int64_t rows, columns;
  QuantizedRows quantized; // quantised formats read its rows from first_token on
  int64_t first_token;
  const float *x; // float formats read this: (T, columns)
  int64_t num_tokens;
  float *y;              // (T, rows)
  const float *residual; // (T, rows) to add to the products, may be y; or null
};

// What a row is multiplied with after it is divided by its root mean square; a layer norm takes the mean off first and
// adds the bias behind, where there is one.
struct Norm {
  const float *weight; // (width,)
  const float *bias;   // (width,), or null
  int64_t width;
  float eps;
  bool layer;
};

enum class Nonlinearity : uint8_t { silu, gelu, gelu_tanh, relu, relu2, sigmoid, clamped_silu };

// alpha_p x**2 + beta x above 0, alpha_n (e**min(x, eps) - 1 - x) + beta x elsewhere.
struct Xielu {
  float alpha_p, alpha_n, beta, eps;
};

// Computes y for row blocks [first, last).
using LinearKernel = void (*)(const LinearArgs &, int64_t first, int64_t last);

enum class KVType : uint8_t { f32, f16, int8, codes };

constexpr int kBlockSize = 32;                     // tokens of a KV block
constexpr int kSuperblock = 8;                     // blocks that lie together
constexpr int kSegment = kBlockSize * kSuperblock; // tokens whose attention is one (max, sum, value)
constexpr int kMaxInt8HeadDim = 512;               // 32639 * 127 * 512 is the largest integer score: it fits 32 bits
constexpr int kMaxCodedHeadDim = 512;
constexpr int kCodeGroup = 32; // items of a coded key or value that share a scale
constexpr int64_t kNoWindow = int64_t{1} << 40;

// How the keys, or the values, of a block are kept in one head: a tile.
struct TileFormat {
  KVType type;
  int64_t bytes;
};

// Keys and values of some tokens: for each KV head 8 K tiles and then 8 V tiles in each superblock. A block's K tile is
// [head_dim][32 tokens], its V tile [32 tokens][head_dim]. With int8 they are [head_dim / 4][32 tokens][4] and [32 / 4
// tokens][head_dim][4], each byte 128 above its value, and a float scale for each of the 32 tokens follows. With codes
// they are [head_dim / 8][32 tokens][4], a byte for dimensions 4 apart, and [32 / 4 tokens][head_dim / 32][16][4], a
// byte for dimensions 16 apart; 16-bit scales [head_dim / 32][32 tokens] follow.
struct KVTiles {
  void *data;
  TileFormat key, value;
  int64_t num_blocks;
  int64_t superblock_bytes; // from one superblock to the next: all layers'
  int64_t kv_group;         // of layers that keep the same tokens; each has block tables of its own

  // From one head's tiles of a superblock to the next head's.
  int64_t head_bytes() const { return kSuperblock * (key.bytes + value.bytes); }
};

// One layer's keys and values.
struct LayerKV : KVTiles {
  int64_t num_kv_heads, head_dim;
  KVTiles recent; // with codes: what tokens of the same segment read, and the first block for all; without data, none

  bool has_codes() const { return key.type == KVType::codes || value.type == KVType::codes; }
  // Bytes that one token's key and value take.
  int64_t token_bytes() const { return num_kv_heads * (key.bytes + value.bytes) / kBlockSize; }
};

struct AttendArgs {
  const float *q; // (T, num_heads, head_dim)
  LayerKV kv;
  const int32_t *block_tables; // (sequences, table_width)
  int64_t table_width;
  const int32_t *recent_tables; // the same of `kv.recent`
  int64_t recent_width;
  const int32_t *sequence_index; // (T,)
  const int32_t *kv_index;       // (T,) a token's own place in its block table
  const int32_t *kv_bounds;      // (T,) the first place that it does not see any more
  int64_t num_tokens, num_heads;
  float scale;    // of the scores
  float soft_cap; // scores become cap * tanh(score / cap); 0: they stay
  int64_t window; // places that a token sees, its own the last
  // A score of each query head that joins its softmax and brings no value: (num_heads,), or null.
  const float *sinks;
  float *out; // (T, num_heads, head_dim)

  // Of a token: its segment, the last that it sees something of.
  int64_t own_segment(int64_t token) const { return (kv_bounds[token] - 1) / kSegment; }
  // Of a token: the first place that it sees.
  int64_t first_seen(int64_t token) const {
    const int64_t first = kv_index[token] + 1 - window;
    return first > 0 ? first : 0;
  }
};

// Neighbouring tokens that all see something of a segment: of one sequence and at neighbouring places, or of any,
// where `whole` says that each sees all of it and in the same blocks. A row is the query of a token and a head, so with
// the heads that share a KV head there are num_tokens * queries_per_kv rows.
struct SegmentTask {
  int64_t first_token, num_tokens, kv_head, segment;
  bool whole;
};

// The running softmax of some rows: value[i] / sum is the attention output so far.
struct Partial {
  float *max, *sum; // (rows,)
  float *value;     // (rows, head_dim)
};

// The highest of a row and the first place that has it; NaN and -1 where the row has a NaN.
struct Highest {
  float value;
  int64_t index;
};

constexpr int64_t kSummed = 256; // neighbouring tokens whose weights are summed as one

struct Kernels {
  const char *isa, *vectors; // the set's name, and that of the set whose vector instructions it uses
  LinearKernel quantized_linear[kNumBlockFormats][2]; // [format][int8, int16 activations]
  LinearKernel float_linear[kNumFloatFormats];
  void (*quantize)(const float *x, int64_t columns, const QuantizedRows &out, int64_t row);
  void (*norm)(const Norm &, const float *x, float *out); // one row
  // out = activation(x), times `up` where that is not null.
  void (*activate)(Nonlinearity, const float *x, const float *up, int64_t count, float *out);
  void (*xielu)(const float *x, const Xielu &, int64_t count, float *out);
  void (*soft_cap)(const float *x, float cap, int64_t count, float *out);
  void (*exponentials)(const float *x, float shift, int64_t count, float *out); // of x - shift
  // Rotates the pairs of one head in place by cos_sin (pairs, 2): dimensions (i, i + half), or (2i, 2i+1) where half is
  // 0.
  void (*rope)(float *x, const float *cos_sin, int64_t pairs, int64_t half);
  // One token, all heads; its second slot is that of `recent`, where there is that.
  void (*write_kv)(const LayerKV &, const float *k, const float *v, int64_t slot, int64_t recent_slot);
  // The Hadamard transform of a power of two of items, in place; its own inverse.
  void (*hadamard)(float *x, int64_t size);
  // Attention of some rows over one segment; `next` is what this thread will be asked for after it, or null.
  void (*attend_segment)(const AttendArgs &, const SegmentTask &, const SegmentTask *next, float *scratch,
                         const Partial &out);
  // Folds `next` into `total` (rows, head_dim); the order of calls is the order of segments.
  void (*merge_segments)(const Partial &total, const Partial &next, int64_t rows, int64_t head_dim);
  // The sampler's passes over a row of logits. A weight is exp2((logit - most) * scale) in units of 2**-40, a whole
  // number: sums are exact, so that no order of adding shows. `most` is finite and no logit is above it or NaN.
  Highest (*highest)(const float *x, int64_t count);
  int64_t (*weight_sums)(const float *x, int64_t count, float most, double scale, int64_t *block_sums); // their total
  void (*weights)(const float *x, int64_t count, float most, double scale, int64_t *out);
  // Places of x in [lower, upper), ascending; how many. `ids` has room for all of x.
  int64_t (*find_between)(const float *x, int64_t count, float lower, float upper, int32_t *ids);
  // out[i] = the highest of x[i], x[i + columns] ...; `columns` a multiple of 16, what is left over is not looked at.
  void (*fold_maxima)(const float *x, int64_t count, int64_t columns, float *out);
  void (*keep_allowed)(float *x, int64_t count, const uint8_t *allowed); // the others become -infinity
};

extern const Kernels kGenericKernels, kGenericEmulatedTiles;
#if KVIK_X86
extern const Kernels kAvx2Kernels;
#endif
#if KVIK_AVX512
extern const Kernels kAvx512Kernels, kAvx512EmulatedTiles;
#if KVIK_AMX
extern const Kernels kAmxKernels;
#endif
#endif

} // namespace kvik
