// Matrix products of a step: rows normed and quantised once, row blocks of all weights shared out among threads.
#include <algorithm>
#include <cstddef>

#include "ops.h"
#include "prepared_rows.h"

namespace kvik {
namespace {

constexpr int64_t kRowGrain = 2;     // row blocks: a tile of the widest vectors, two cache lines of outputs
constexpr int64_t kGatedTokens = 60; // whose two halves are computed before they meet, while they are in cache

} // namespace

void project(ThreadPool &pool, Workspace &workspace, const RowsIn &in, std::span<const Projection> projections,
             bool int16_activations) {
  if (in.num_tokens == 0) return;
  bool quantize = false;
  int64_t row_blocks = 0;
  for (const Projection &projection : projections) {
    quantize = quantize || projection.linear.matrix->quantized();
    row_blocks += projection.linear.matrix->row_blocks();
  }
  const PreparedRows rows(pool, workspace.rows, in, quantize, int16_activations);
  // The row blocks of all weights in a row, cut evenly.
  pool.for_ranges(row_blocks, kRowGrain, [&](int64_t first, int64_t last) {
    for (const Projection &projection : projections) {
      const int64_t count = projection.linear.matrix->row_blocks();
      if (first < count && last > 0) rows.multiply(projection, first, std::min(last, count));
      first = std::max<int64_t>(first - count, 0);
      last -= count;
    }
  });
}

std::span<const uint8_t> first_weights(const ThreadPool &pool, std::span<const PackedWeight *const> weights,
                                       int thread) {
  int64_t row_blocks = 0;
  for (const PackedWeight *weight : weights) row_blocks += weight->row_blocks();
  auto [first, last] = pool.own_range(row_blocks, kRowGrain, thread);
  for (const PackedWeight *weight : weights) {
    const int64_t count = weight->row_blocks(), bytes = count > 0 ? weight->num_bytes / count : 0;
    if (first < count) return {weight->data.get() + bytes * first, static_cast<std::size_t>(bytes * (last - first))};
    first -= count;
    last -= count;
  }
  return {};
}

void project_gated(ThreadPool &pool, Workspace &workspace, const RowsIn &in, const Linear &gate, const Linear &up,
                   Nonlinearity activation, float *out, bool int16_activations) {
  if (in.num_tokens == 0) return;
  const int64_t width = gate.matrix->rows;
  const PreparedRows rows(pool, workspace.rows, in, gate.matrix->quantized() || up.matrix->quantized(),
                          int16_activations);
  // Threads have columns of it for themselves.
  float *other = workspace.up.get<float>(std::min(in.num_tokens, kGatedTokens) * width);
  pool.for_ranges(gate.matrix->row_blocks(), kRowGrain, [&](int64_t first, int64_t last) {
    const int64_t start = first * kRowBlock, count = std::min(last * kRowBlock, width) - start;
    for (int64_t token = 0; token < in.num_tokens; token += kGatedTokens) {
      const int64_t tokens = std::min(kGatedTokens, in.num_tokens - token);
      float *half = out + token * width;
      rows.multiply({gate, half}, first, last, token, tokens);
      rows.multiply({up, other}, first, last, token, tokens);
      for (int64_t i = start; i < start + tokens * width; i += width)
        kernels->activate(activation, half + i, other + i, count, half + i);
    }
  });
}

void project_qkv(ThreadPool &pool, Workspace &workspace, const RowsIn &in, const QueryKeyValue &args, float *q,
                 bool int16_activations) {
  const LayerKV &kv = args.kv;
  const int64_t width = kv.num_kv_heads * kv.head_dim, query_width = args.query.matrix->rows;
  float *k = workspace.keys.get<float>(in.num_tokens * width), *v = workspace.values.get<float>(in.num_tokens * width);
  const Projection projections[] = {{args.query, q}, {args.key, k}, {args.value, v}};
  const bool own_values = args.value.matrix;
  project(pool, workspace, in, {projections, own_values ? std::size_t{3} : std::size_t{2}}, int16_activations);
  // Neighbouring tokens share cache lines of a K tile, so a thread takes whole blocks' worth of them.
  pool.for_ranges(in.num_tokens, kBlockSize, [&](int64_t first, int64_t last) {
    const auto normed = [](const Norm &norm, float *heads, int64_t size) {
      for (int64_t at = 0; norm.weight && at < size; at += norm.width) kernels->norm(norm, heads + at, heads + at);
    };
    const auto norm_and_rotate = [&](const Norm &norm, float *heads, int64_t size, int32_t position) {
      if (!args.norm_after_rope) normed(norm, heads, size);
      for (int64_t at = 0; args.rope.pairs > 0 && at < size; at += kv.head_dim)
        kernels->rope(heads + at, args.rope.cos_sin + position * args.rope.pairs * 2, args.rope.pairs, args.rope.half);
      if (args.norm_after_rope) normed(norm, heads, size);
    };
    for (int64_t i = first; i < last; ++i) {
      float *keys = k + i * width, *values = v + i * width;
      if (!own_values) std::copy_n(keys, width, values);
      normed(args.value_norm, values, width);
      norm_and_rotate(args.query_norm, q + i * query_width, query_width, args.positions[i]);
      norm_and_rotate(args.key_norm, keys, width, args.positions[i]);
      kernels->write_kv(kv, keys, values, args.slots[i], args.recent_slots ? args.recent_slots[i] : 0);
    }
  });
}

} // namespace kvik
