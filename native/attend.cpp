// Attention of a step: which queries share a tile, what is a task, and in which order segments merge.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>
#include <vector>

#include "ops.h"

namespace kvik {
namespace {

// Rows of a tile: enough that loading and widening K and V is little beside the sums.
constexpr int64_t kTileRows = 96;
// Chunks of a thread: enough to even out what the system takes from one thread, few enough to know the next task.
constexpr int64_t kChunksPerThread = 4;

using Tile = AttentionSpace::Tile;
using Unit = AttentionSpace::Unit;

class Attention {
public:
  Attention(ThreadPool &pool, const AttendArgs &args, AttentionSpace &space)
      : pool_(pool), args_(args), space_(space), threads_(pool.num_threads()),
        group_(args.num_heads / args.kv.num_kv_heads), head_dim_(args.kv.head_dim) {}

  void run() {
    make_tiles();
    make_chunks();
    const int64_t rows = most_tokens_ * group_;
    partial_stride_ = (rows * (head_dim_ + 2) + 15) / 16 * 16;
    scratch_stride_ = scratch_floats(rows);
    scratch_ = space_.scratch.get<float>(threads_ * scratch_stride_);
    totals_ = space_.totals.get<float>(threads_ * 2 * partial_stride_);
    slots_ = space_.slots.get<float>(num_slots_ * partial_stride_);
    pool_.for_each(static_cast<int64_t>(space_.chunk_ends.size()),
                   [this](int thread, int64_t chunk) { run_chunk(thread, chunk); });
  }

private:
  // Segments of a token's first and last position.
  int64_t first_segment(int64_t token) const {
    return std::max<int64_t>(0, args_.positions[token] + 1 - args_.window) / kSegment;
  }
  int64_t last_segment(int64_t token) const { return args_.positions[token] / kSegment; }

  // Scores, then widened tiles or the integer kernels' factors.
  int64_t scratch_floats(int64_t rows) const {
    const int64_t tiles = 2 * kSegment * head_dim_, factors = rows * (kMostInt8HeadDim / 2 + 2);
    return (rows * kSegment + std::max(tiles, factors) + 15) / 16 * 16;
  }

  void make_tiles() {
    space_.tiles.clear();
    const int64_t most = std::max<int64_t>(1, kTileRows / group_);
    most_tokens_ = 1;
    for (int64_t first = 0, last; first < args_.num_tokens; first = last) {
      for (last = first + 1; last < args_.num_tokens && last - first < most; ++last)
        if (args_.sequence_index[last] != args_.sequence_index[first] ||
            args_.positions[last] != args_.positions[last - 1] + 1 || args_.positions[last] % kSegment == 0)
          break;
      most_tokens_ = std::max(most_tokens_, last - first);
      const int64_t begin = first_segment(first), segments = last_segment(last - 1) + 1 - begin;
      for (int64_t head = 0; head < args_.kv.num_kv_heads; ++head)
        space_.tiles.push_back({first, last - first, head, begin, segments, -1});
    }
  }

  // Loading keys costs about what a row's arithmetic does, and a unit costs something in itself.
  int64_t cost(const Tile &tile, int64_t segment) const {
    const int64_t last = args_.positions[tile.first_token + tile.num_tokens - 1];
    const int64_t keys = std::min<int64_t>(kSegment, last + 1 - segment * kSegment);
    return (keys + 16) * (tile.num_tokens * group_ + 4);
  }

  // Cuts all units, in order, into chunks of about equal cost. With tiles enough each stays with one chunk.
  void make_chunks() {
    space_.units.clear();
    space_.costs.clear();
    space_.chunk_ends.clear();
    int64_t total = 0;
    const int64_t num_tiles = static_cast<int64_t>(space_.tiles.size());
    for (int64_t t = 0; t < num_tiles; ++t) {
      const Tile &tile = space_.tiles[static_cast<std::size_t>(t)];
      for (int64_t s = 0; s < tile.num_segments; ++s) {
        space_.units.push_back({t, tile.first_segment + s});
        space_.costs.push_back(cost(tile, tile.first_segment + s));
        total += space_.costs.back();
      }
    }
    const int64_t wanted = threads_ == 1 ? 1 : threads_ * kChunksPerThread;
    const bool keep_whole = most_tokens_ > 1 && num_tiles >= 2 * wanted;
    int64_t so_far = 0;
    num_slots_ = 0;
    std::size_t tile_begin = 0, chunk_begin = 0;
    for (std::size_t u = 0; u < space_.units.size(); ++u) {
      const std::size_t next = u + 1;
      so_far += space_.costs[u];
      const bool tile_ends = next == space_.units.size() || space_.units[next].tile != space_.units[u].tile;
      const int64_t chunks = static_cast<int64_t>(space_.chunk_ends.size());
      const bool full = so_far * wanted >= total * (chunks + 1) && (tile_ends || !keep_whole);
      if (tile_ends) {
        Tile &tile = space_.tiles[static_cast<std::size_t>(space_.units[u].tile)];
        if (chunk_begin > tile_begin) {
          tile.slot = num_slots_;
          num_slots_ += tile.num_segments;
        }
        tile_begin = next;
      }
      if (full || next == space_.units.size()) {
        space_.chunk_ends.push_back(static_cast<int64_t>(next));
        chunk_begin = next;
      }
    }
    if (num_slots_ == 0) return;
    if (num_tiles > space_.unfinished_size) {
      space_.unfinished = std::make_unique<std::atomic<int64_t>[]>(static_cast<std::size_t>(num_tiles));
      space_.unfinished_size = num_tiles;
    }
    for (int64_t t = 0; t < num_tiles; ++t)
      space_.unfinished[static_cast<std::size_t>(t)].store(space_.tiles[static_cast<std::size_t>(t)].num_segments,
                                                           std::memory_order_relaxed);
  }

  // The tokens of a tile that see a segment: all but those at its ends that come before it or look past it.
  SegmentTask task_of(const Unit &unit) const {
    const Tile &tile = space_.tiles[static_cast<std::size_t>(unit.tile)];
    int64_t first = tile.first_token, last = first + tile.num_tokens;
    while (last_segment(first) < unit.segment) ++first;
    while (first_segment(last - 1) > unit.segment) --last;
    return {first, last - first, tile.kv_head, unit.segment};
  }

  Partial partial(float *base, int64_t index, int64_t token = 0) const {
    float *start = base + index * partial_stride_;
    const int64_t rows = most_tokens_ * group_, row = token * group_;
    return {start + row, start + rows + row, start + 2 * rows + row * head_dim_};
  }

  void run_chunk(int thread, int64_t chunk) {
    const std::size_t begin =
        chunk == 0 ? 0 : static_cast<std::size_t>(space_.chunk_ends[static_cast<std::size_t>(chunk - 1)]);
    const std::size_t end = static_cast<std::size_t>(space_.chunk_ends[static_cast<std::size_t>(chunk)]);
    float *scratch = scratch_ + thread * scratch_stride_;
    SegmentTask task = task_of(space_.units[begin]), next{};
    for (std::size_t u = begin; u < end; ++u, task = next) {
      const bool more = u + 1 < end;
      if (more) next = task_of(space_.units[u + 1]);
      const int64_t index = space_.units[u].tile;
      const Tile &tile = space_.tiles[static_cast<std::size_t>(index)];
      const bool last = !more || space_.units[u + 1].tile != index;
      if (tile.slot >= 0) {
        const int64_t slot = tile.slot + task.segment - tile.first_segment;
        kernels->attend_segment(args_, task, more ? &next : nullptr, scratch, partial(slots_, slot));
        // Whoever ends a tile's last segment merges them all.
        auto &unfinished = space_.unfinished[static_cast<std::size_t>(index)];
        if (unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) merge_slots(thread, index);
      } else {
        const int64_t total = 2 * thread;
        const bool direct = task.segment == tile.first_segment && task.num_tokens == tile.num_tokens;
        const Partial out = partial(totals_, direct ? total : total + 1);
        kernels->attend_segment(args_, task, more ? &next : nullptr, scratch, out);
        if (!direct) fold(thread, tile, task, out);
        if (last) write_output(thread, tile);
      }
    }
  }

  // Adds a segment's rows to the thread's totals; a token's first segment begins them.
  void fold(int thread, const Tile &tile, const SegmentTask &task, const Partial &rows) {
    int64_t token = task.first_token;
    const int64_t end = token + task.num_tokens;
    while (token < end) {
      int64_t stop = token + 1;
      const bool begins = first_segment(token) == task.segment;
      while (stop < end && (first_segment(stop) == task.segment) == begins) ++stop;
      const Partial total = partial(totals_, 2 * thread, token - tile.first_token);
      const int64_t skipped = (token - task.first_token) * group_, count = (stop - token) * group_;
      const Partial next{rows.max + skipped, rows.sum + skipped, rows.value + skipped * head_dim_};
      if (begins) {
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
    const Tile &tile = space_.tiles[static_cast<std::size_t>(index)];
    for (int64_t s = 0; s < tile.num_segments; ++s)
      fold(thread, tile, task_of({index, tile.first_segment + s}), partial(slots_, tile.slot + s));
    write_output(thread, tile);
  }

  void write_output(int thread, const Tile &tile) const {
    const Partial total = partial(totals_, 2 * thread);
    for (int64_t token = 0; token < tile.num_tokens; ++token) {
      float *out = args_.out + ((tile.first_token + token) * args_.num_heads + tile.kv_head * group_) * head_dim_;
      for (int64_t h = 0; h < group_; ++h) {
        const float *value = total.value + (token * group_ + h) * head_dim_;
        const float sum = total.sum[token * group_ + h];
        for (int64_t d = 0; d < head_dim_; ++d) out[h * head_dim_ + d] = value[d] / sum;
      }
    }
  }

  ThreadPool &pool_;
  const AttendArgs &args_;
  AttentionSpace &space_;
  const int64_t threads_, group_, head_dim_;
  int64_t most_tokens_ = 1, num_slots_ = 0, partial_stride_ = 0, scratch_stride_ = 0;
  float *scratch_ = nullptr, *totals_ = nullptr, *slots_ = nullptr;
};

} // namespace

void write_kv(ThreadPool &pool, const LayerKV &kv, const float *k, const float *v, const int32_t *slots,
              int64_t num_tokens) {
  const int64_t width = kv.num_kv_heads * kv.head_dim;
  // Neighbouring tokens share cache lines of a K tile, so a thread takes whole blocks' worth of them.
  pool.for_ranges(num_tokens, kBlockSize, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) kernels->write_kv(kv, k + i * width, v + i * width, slots[i]);
  });
}

void attend(ThreadPool &pool, Workspace &workspace, const AttendArgs &args) {
  if (args.num_tokens > 0) Attention(pool, args, workspace.attention).run();
}

} // namespace kvik
