// Attention of a step: units are computed chunk by chunk, and their rows merge in the order of segments.
#include <algorithm>
#include <atomic>
#include <cstddef>

#include "ops.h"

namespace kvik {
namespace {

using Tile = AttendPlan::Tile;
using Unit = AttendPlan::Unit;

constexpr int64_t kTransformedTokens = 8;                        // that a thread takes together
constexpr int64_t kMaxUnits = 1 + kMaxCodedHeadDim / kCodeGroup; // what a row's factors have beside them, in floats

class Attention {
public:
  Attention(ThreadPool &pool, const AttendArgs &args, AttentionSpace &space)
      : pool_(pool), args_(args), space_(space), plan_(space.plan(args, pool.num_threads())),
        queries_per_kv_(args.num_heads / args.kv.num_kv_heads), head_dim_(args.kv.head_dim) {}

  void run() {
    const int64_t threads = pool_.num_threads(), total_rows = plan_.max_run_tokens * queries_per_kv_;
    total_stride_ = (total_rows * (head_dim_ + 2) + 15) / 16 * 16;
    scratch_stride_ = scratch_floats(plan_.max_unit_tokens * queries_per_kv_);
    scratch_ = space_.scratch.get<float>(threads * scratch_stride_);
    totals_ = space_.totals.get<float>(threads * 2 * total_stride_);
    slots_ = space_.slots.get<float>(plan_.slot_floats);
    pool_.for_each(static_cast<int64_t>(plan_.chunk_ends.size()),
                   [this](int thread, int64_t chunk) { run_chunk(thread, chunk); });
  }

private:
  const Tile &tile_at(int64_t index) const { return plan_.tiles[static_cast<std::size_t>(index)]; }
  const Unit &unit_at(int64_t index) const { return plan_.units[static_cast<std::size_t>(index)]; }

  // Of a token: the first that it sees something of.
  int64_t first_segment(int64_t token) const { return args_.first_seen(token) / kSegment; }

  // Scores, then widened tiles or the integer kernels' factors; with codes also what is behind the first block.
  int64_t scratch_floats(int64_t rows) const {
    const int64_t tiles = 2 * kSegment * head_dim_, factors = rows * (kMaxInt8HeadDim / 2 + kMaxUnits);
    const int64_t behind = args_.kv.has_codes() ? rows * (head_dim_ + 2) : 0;
    return (rows * kSegment + std::max(tiles, factors) + behind + 15) / 16 * 16;
  }

  // Of all rows that lie at `start`, those from `row` on.
  Partial partial(float *start, int64_t rows, int64_t row = 0) const {
    return {start + row, start + rows + row, start + 2 * rows + row * head_dim_};
  }
  // A thread's sums so far (0), or its latest segment (1).
  Partial thread_rows(int thread, int which, int64_t token = 0) const {
    return partial(totals_ + (2 * thread + which) * total_stride_, plan_.max_run_tokens * queries_per_kv_,
                   token * queries_per_kv_);
  }
  // Of a unit's tokens, from one on.
  Partial slot_rows(const Unit &unit, int64_t token) const {
    const int64_t rows = unit.task.num_tokens * queries_per_kv_;
    return partial(slots_ + unit.slot, rows, (token - unit.task.first_token) * queries_per_kv_);
  }

  void run_chunk(int thread, int64_t chunk) {
    const int64_t begin = chunk == 0 ? 0 : plan_.chunk_ends[static_cast<std::size_t>(chunk - 1)];
    const int64_t end = plan_.chunk_ends[static_cast<std::size_t>(chunk)];
    float *scratch = scratch_ + thread * scratch_stride_;
    for (int64_t u = begin; u < end; ++u) {
      const Unit &unit = unit_at(u);
      const Unit *next = u + 1 < end ? &unit_at(u + 1) : nullptr;
      // Beyond the chunk too, for a thread takes neighbouring ones.
      const SegmentTask &task = unit.task;
      const SegmentTask *next_task = u + 1 < static_cast<int64_t>(plan_.units.size()) ? &unit_at(u + 1).task : nullptr;
      if (unit.slot >= 0) {
        kernels->attend_segment(args_, task, next_task, scratch, slot_rows(unit, task.first_token));
        // Whoever ends a tile's last unit merges all of them.
        for (int64_t tile = unit.first_tile; tile < unit.first_tile + unit.num_tiles; ++tile) {
          auto &unfinished = plan_.unfinished[static_cast<std::size_t>(tile)];
          if (unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) merge_slots(thread, tile);
        }
      } else {
        const Tile &tile = tile_at(unit.first_tile);
        const bool direct = !args_.sinks && task.segment == tile.first_segment && task.num_tokens == tile.num_tokens;
        const Partial rows = thread_rows(thread, direct ? 0 : 1);
        kernels->attend_segment(args_, task, next_task, scratch, rows);
        if (!direct) fold(thread, tile, task.segment, task.first_token, task.first_token + task.num_tokens, rows);
        if (!next || next->first_tile != unit.first_tile) write_output(thread, tile);
      }
    }
  }

  // What a token's sums are before its first segment: a sink is a key of weight 1 whose value is nothing.
  void begin_with_sinks(const Tile &tile, int64_t rows, const Partial &total) const {
    const float *sinks = args_.sinks + tile.kv_head * queries_per_kv_;
    for (int64_t row = 0; row < rows; ++row) total.max[row] = sinks[row % queries_per_kv_];
    std::fill_n(total.sum, rows, 1.0f);
    std::fill_n(total.value, rows * head_dim_, 0.0f);
  }

  // Adds rows of tokens [token, end) at a segment to the thread's sums; a token's first segment begins them.
  void fold(int thread, const Tile &tile, int64_t segment, int64_t token, int64_t end, const Partial &rows) {
    const int64_t first = token;
    while (token < end) {
      int64_t stop = token + 1;
      const bool begins = first_segment(token) == segment;
      while (stop < end && (first_segment(stop) == segment) == begins) ++stop;
      const Partial total = thread_rows(thread, 0, token - tile.first_token);
      const int64_t skipped = (token - first) * queries_per_kv_, count = (stop - token) * queries_per_kv_;
      const Partial next{rows.max + skipped, rows.sum + skipped, rows.value + skipped * head_dim_};
      if (begins && args_.sinks) begin_with_sinks(tile, count, total);
      if (begins && !args_.sinks) {
        std::copy_n(next.max, count, total.max);
        std::copy_n(next.sum, count, total.sum);
        std::copy_n(next.value, count * head_dim_, total.value);
      } else {
        kernels->merge_segments(total, next, count, head_dim_);
      }
      token = stop;
    }
  }

  void merge_slots(int thread, int64_t index) {
    const Tile &tile = tile_at(index);
    for (int64_t s = 0; s < tile.num_segments; ++s) {
      const Unit &unit = unit_at(plan_.parts[static_cast<std::size_t>(tile.first_part + s)]);
      const SegmentTask &task = unit.task;
      const int64_t first = std::max(tile.first_token, task.first_token);
      const int64_t end = std::min(tile.first_token + tile.num_tokens, task.first_token + task.num_tokens);
      fold(thread, tile, task.segment, first, end, slot_rows(unit, first));
    }
    write_output(thread, tile);
    // For the next layer; nobody else looks at it before.
    plan_.unfinished[static_cast<std::size_t>(index)].store(tile.num_segments, std::memory_order_relaxed);
  }

  void write_output(int thread, const Tile &tile) const {
    const Partial total = thread_rows(thread, 0);
    for (int64_t token = 0; token < tile.num_tokens; ++token) {
      float *out =
          args_.out + ((tile.first_token + token) * args_.num_heads + tile.kv_head * queries_per_kv_) * head_dim_;
      for (int64_t h = 0; h < queries_per_kv_; ++h) {
        const float *value = total.value + (token * queries_per_kv_ + h) * head_dim_;
        const float sum = total.sum[token * queries_per_kv_ + h];
        for (int64_t d = 0; d < head_dim_; ++d) out[h * head_dim_ + d] = value[d] / sum;
        if (args_.kv.value.type == KVType::codes) kernels->hadamard(out + h * head_dim_, head_dim_);
      }
    }
  }

  ThreadPool &pool_;
  const AttendArgs &args_;
  AttentionSpace &space_;
  AttendPlan &plan_;
  const int64_t queries_per_kv_, head_dim_;
  int64_t total_stride_ = 0, scratch_stride_ = 0;
  float *scratch_ = nullptr, *totals_ = nullptr, *slots_ = nullptr;
};

} // namespace

void write_kv(ThreadPool &pool, const LayerKV &kv, const float *k, const float *v, const int32_t *slots,
              const int32_t *recent_slots, int64_t num_tokens) {
  const int64_t width = kv.num_kv_heads * kv.head_dim;
  // Neighbouring tokens share cache lines of a K tile, so a thread takes whole blocks' worth of them.
  pool.for_ranges(num_tokens, kBlockSize, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      kernels->write_kv(kv, k + i * width, v + i * width, slots[i], recent_slots ? recent_slots[i] : 0);
  });
}

void attend(ThreadPool &pool, Workspace &workspace, const AttendArgs &args) {
  if (args.num_tokens == 0) return;
  if (args.kv.key.type != KVType::codes) return Attention(pool, args, workspace.attention).run();
  const int64_t head_dim = args.kv.head_dim, width = args.num_heads * head_dim;
  float *queries = workspace.attention.queries.get<float>(args.num_tokens * width);
  pool.for_ranges(args.num_tokens, kTransformedTokens, [&](int64_t first, int64_t last) {
    std::copy(args.q + first * width, args.q + last * width, queries + first * width);
    for (int64_t at = first * width; at < last * width; at += head_dim) kernels->hadamard(queries + at, head_dim);
  });
  AttendArgs transformed = args;
  transformed.q = queries;
  Attention(pool, transformed, workspace.attention).run();
}

} // namespace kvik
