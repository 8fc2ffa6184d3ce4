#include "attend_plan.h"

#include <algorithm>
#include <cstring>

namespace kvik {
namespace {

// Rows of a unit: enough that loading and widening K and V is little beside the sums.
constexpr int64_t kUnitRows = 96;
// Chunks of a thread: enough to even out what the system takes from one thread, few enough to know the next task.
constexpr int64_t kChunksPerThread = 4;

// Loading keys costs about what the arithmetic of four rows does, and a unit costs something in itself.
constexpr int64_t kLoadRows = 4, kUnitKeys = 16;
int64_t unit_cost(int64_t keys, int64_t rows) { return (keys + kUnitKeys) * (rows + kLoadRows); }

// Of a token: the first that it sees something of.
int64_t first_segment_of(const AttendArgs &args, int64_t token) { return args.first_seen(token) / kSegment; }

const int32_t *blocks_of(const AttendArgs &args, int64_t token, int64_t segment) {
  return args.block_tables + args.sequence_index[token] * args.table_width + segment * kSuperblock;
}

} // namespace

bool shares_segment(const AttendArgs &args, int64_t token, int64_t other, int64_t segment) {
  return may_share(args, token, segment) && may_share(args, other, segment) &&
         std::memcmp(blocks_of(args, token, segment), blocks_of(args, other, segment), kSuperblock * sizeof(int32_t)) ==
             0;
}

void AttendPlan::make(const AttendArgs &args, int64_t num_threads) {
  num_heads_ = args.num_heads, num_kv_heads_ = args.kv.num_kv_heads, head_dim_ = args.kv.head_dim;
  kv_group_ = args.kv.kv_group, window_ = args.window;
  tiles.clear();
  units.clear();
  parts.clear();
  make_runs(args);
  max_unit_tokens = max_run_tokens;
  num_shared_units = 0;
  const int64_t max_tokens = max_shared_tokens(num_threads);
  for (std::size_t begin = 0, end; begin < runs_.size(); begin = end) {
    const auto goes_on = [&](const Run &run, const Run &next) {
      return run.num_tokens + next.num_tokens <= max_tokens && share_any(args, run, next);
    };
    for (end = begin + 1; end < runs_.size() && goes_on(runs_[end - 1], runs_[end]); ++end) continue;
    add_cluster(args, begin, end, max_tokens);
  }
  make_chunks(args, num_threads);
  place_slots();
}

void AttendPlan::make_runs(const AttendArgs &args) {
  runs_.clear();
  const int64_t max_tokens = std::max<int64_t>(1, kUnitRows / (num_heads_ / num_kv_heads_));
  max_run_tokens = 1;
  for (int64_t first = 0, last; first < args.num_tokens; first = last) {
    for (last = first + 1; last < args.num_tokens && last - first < max_tokens; ++last)
      if (args.sequence_index[last] != args.sequence_index[first] ||
          args.kv_index[last] != args.kv_index[last - 1] + 1 || args.kv_bounds[last] != args.kv_bounds[last - 1] + 1 ||
          (args.kv_bounds[last] - 1) % kSegment == 0)
        break;
    max_run_tokens = std::max(max_run_tokens, last - first);
    const int64_t begin = first_segment_of(args, first);
    runs_.push_back({first, last - first, begin, args.own_segment(last - 1) + 1 - begin});
  }
}

// Tokens that share a unit at most: 96 rows, and fewer where so large a unit would leave a thread without work.
int64_t AttendPlan::max_shared_tokens(int64_t num_threads) const {
  const int64_t queries_per_kv = num_heads_ / num_kv_heads_, max_tokens = kUnitRows / queries_per_kv;
  if (num_threads == 1) return max_tokens;
  int64_t total = 0;
  for (const Run &run : runs_) total += run.num_segments * unit_cost(kSegment, run.num_tokens * queries_per_kv);
  const int64_t rows = total * num_kv_heads_ / (2 * num_threads) / (kSegment + kUnitKeys) - kLoadRows;
  return std::min(max_tokens, rows / queries_per_kv);
}

// Whether two sequences have the same blocks at a segment, of which all tokens of both runs see all. Runs of one
// sequence do not share: a larger unit saves them little, and each segment would need a place of its own.
bool AttendPlan::share(const AttendArgs &args, const Run &run, const Run &next, int64_t segment) const {
  return args.sequence_index[run.last_token()] != args.sequence_index[next.first_token] &&
         may_share(args, run.first_token, segment) && may_share(args, next.last_token(), segment) &&
         shares_segment(args, run.last_token(), next.first_token, segment);
}

bool AttendPlan::share_any(const AttendArgs &args, const Run &run, const Run &next) const {
  const int64_t first = std::max(run.first_segment, next.first_segment);
  const int64_t last = std::min(run.first_segment + run.num_segments, next.first_segment + next.num_segments);
  for (int64_t segment = first; segment < last; ++segment)
    if (share(args, run, next, segment)) return true;
  return false;
}

// The tokens of a run that see a segment: all but those at its ends that come before it or look past it.
SegmentTask AttendPlan::own_task(const AttendArgs &args, const Run &run, int64_t segment) const {
  int64_t first = run.first_token, last = first + run.num_tokens;
  while (args.own_segment(first) < segment) ++first;
  while (first_segment_of(args, last - 1) > segment) --last;
  return {first, last - first, 0, segment, false};
}

// Tiles and units of neighbouring runs, of which each shares some segment with the one before it; mostly one run alone.
void AttendPlan::add_cluster(const AttendArgs &args, std::size_t begin, std::size_t end, int64_t max_tokens) {
  const std::size_t first_tile = tiles.size(), first_unit = units.size(), first_part = parts.size();
  for (std::size_t r = begin; r < end; ++r) {
    const Run &run = runs_[r];
    tiles.push_back({run.first_token, run.num_tokens, 0, run.first_segment, run.num_segments,
                     static_cast<int64_t>(parts.size()), false});
    parts.resize(parts.size() + static_cast<std::size_t>(run.num_segments), -1);
  }
  // The first head's units; one that several runs share comes with the first of them.
  for (std::size_t r = begin; r < end; ++r) {
    for (int64_t s = 0; s < runs_[r].num_segments; ++s) {
      const int64_t segment = runs_[r].first_segment + s;
      if (parts[static_cast<std::size_t>(tiles[first_tile + r - begin].first_part + s)] >= 0) continue;
      SegmentTask task = own_task(args, runs_[r], segment);
      std::size_t last = r + 1;
      for (int64_t num_tokens = runs_[r].num_tokens; last < end; ++last) {
        num_tokens += runs_[last].num_tokens;
        if (num_tokens > max_tokens || !share(args, runs_[last - 1], runs_[last], segment)) break;
        task = {runs_[r].first_token, num_tokens, 0, segment, true};
      }
      for (std::size_t i = r; i < last; ++i) {
        Tile &tile = tiles[first_tile + i - begin];
        parts[static_cast<std::size_t>(tile.first_part + segment - tile.first_segment)] =
            static_cast<int64_t>(units.size());
        tile.merged = tile.merged || task.whole;
      }
      units.push_back({task, static_cast<int64_t>(first_tile + r - begin), static_cast<int64_t>(last - r), -1});
      max_unit_tokens = std::max(max_unit_tokens, task.num_tokens);
      num_shared_units += task.whole ? num_kv_heads_ : 0;
    }
  }
  // The others' are the same.
  const std::size_t num_tiles = end - begin, num_units = units.size() - first_unit;
  const std::size_t num_parts = parts.size() - first_part;
  for (int64_t head = 1; head < num_kv_heads_; ++head) {
    for (std::size_t i = 0; i < num_tiles; ++i) {
      Tile tile = tiles[first_tile + i];
      tile.kv_head = head;
      tile.first_part += head * static_cast<int64_t>(num_parts);
      tiles.push_back(tile);
    }
    for (std::size_t i = 0; i < num_units; ++i) {
      Unit unit = units[first_unit + i];
      unit.task.kv_head = head;
      unit.first_tile += head * static_cast<int64_t>(num_tiles);
      units.push_back(unit);
    }
    for (std::size_t i = 0; i < num_parts; ++i)
      parts.push_back(parts[first_part + i] + head * static_cast<int64_t>(num_units));
  }
}

int64_t AttendPlan::cost(const AttendArgs &args, const SegmentTask &task) const {
  const int64_t bound = args.kv_bounds[task.first_token + task.num_tokens - 1];
  const int64_t keys = task.whole ? kSegment : std::min<int64_t>(kSegment, bound - task.segment * kSegment);
  return unit_cost(keys, task.num_tokens * (num_heads_ / num_kv_heads_));
}

// Cuts all units, in order, into chunks of about equal cost. With tiles enough each stays with one chunk.
void AttendPlan::make_chunks(const AttendArgs &args, int64_t num_threads) {
  costs_.clear();
  chunk_ends.clear();
  int64_t total = 0;
  for (const Unit &unit : units) {
    costs_.push_back(cost(args, unit.task));
    total += costs_.back();
  }
  const int64_t wanted = num_threads == 1 ? 1 : num_threads * kChunksPerThread;
  const bool keep_whole = max_run_tokens > 1 && static_cast<int64_t>(tiles.size()) >= 2 * wanted;
  int64_t so_far = 0;
  std::size_t tile_begin = 0, chunk_begin = 0;
  for (std::size_t u = 0; u < units.size(); ++u) {
    const std::size_t next = u + 1;
    so_far += costs_[u];
    Tile &tile = tiles[static_cast<std::size_t>(units[u].first_tile)];
    const bool tile_ends = next == units.size() || units[next].first_tile != units[u].first_tile;
    const int64_t chunks = static_cast<int64_t>(chunk_ends.size());
    const bool full = so_far * wanted >= total * (chunks + 1) && (tile_ends || tile.merged || !keep_whole);
    if (tile_ends) {
      if (chunk_begin > tile_begin) tile.merged = true;
      tile_begin = next;
    }
    if (full || next == units.size()) {
      chunk_ends.push_back(static_cast<int64_t>(next));
      chunk_begin = next;
    }
  }
}

void AttendPlan::place_slots() {
  const int64_t queries_per_kv = num_heads_ / num_kv_heads_, num_tiles = static_cast<int64_t>(tiles.size());
  slot_floats = 0;
  for (Unit &unit : units) {
    if (!tiles[static_cast<std::size_t>(unit.first_tile)].merged) continue;
    unit.slot = slot_floats;
    slot_floats += (unit.task.num_tokens * queries_per_kv * (head_dim_ + 2) + 15) / 16 * 16;
  }
  if (slot_floats == 0) return;
  if (num_tiles > unfinished_size_) {
    unfinished = std::make_unique<std::atomic<int64_t>[]>(static_cast<std::size_t>(num_tiles));
    unfinished_size_ = num_tiles;
  }
  for (std::size_t t = 0; t < tiles.size(); ++t) unfinished[t].store(tiles[t].num_segments, std::memory_order_relaxed);
}

} // namespace kvik
