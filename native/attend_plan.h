// Who reads which keys and values in a step, and in which pieces: the same for every layer of a shape.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace kvik {

// Whether the token sees every place of the segment.
inline bool sees_all(const AttendArgs &args, int64_t token, int64_t segment) {
  const int64_t begin = segment * kSegment;
  return args.kv_bounds[token] >= begin + kSegment && args.first_seen(token) <= begin;
}

// Whether it may see a segment together with others: its own is read from elsewhere where older ones are codes.
inline bool may_share(const AttendArgs &args, int64_t token, int64_t segment) {
  return sees_all(args, token, segment) && !(args.kv.has_codes() && args.own_segment(token) == segment);
}

// Whether both tokens may share a segment, and see it in the same blocks.
bool shares_segment(const AttendArgs &args, int64_t token, int64_t other, int64_t segment);

class AttendPlan {
public:
  // A run is up to 96 rows: neighbouring tokens of one sequence at neighbouring places. A tile is a run at one KV
  // head, with the segments that some of its tokens see.
  struct Tile {
    int64_t first_token, num_tokens, kv_head;
    int64_t first_segment, num_segments;
    int64_t first_part; // in `parts`: the unit of each of its segments
    bool merged;        // from slots, by whoever ends its last unit; else one chunk has all of it, segment by segment
  };

  // What one call of the kernel does: a segment for one tile, or for neighbouring ones that share it.
  struct Unit {
    SegmentTask task;
    int64_t first_tile, num_tiles;
    int64_t slot; // where its rows go, in floats; -1 where its tile isn't merged from slots
  };

  void make(const AttendArgs &args, int64_t num_threads);

  // Whether it is the plan for these args, of the same step.
  bool fits(const AttendArgs &args) const {
    return num_heads_ == args.num_heads && num_kv_heads_ == args.kv.num_kv_heads && head_dim_ == args.kv.head_dim &&
           kv_group_ == args.kv.kv_group && window_ == args.window;
  }

  std::vector<Tile> tiles;
  std::vector<Unit> units;
  std::vector<int64_t> chunk_ends;                    // units
  std::vector<int64_t> parts;                         // units
  std::unique_ptr<std::atomic<int64_t>[]> unfinished; // units of each tile
  int64_t max_run_tokens, max_unit_tokens;
  int64_t slot_floats;      // all slots together
  int64_t num_shared_units; // units of several tiles

private:
  struct Run {
    int64_t first_token, num_tokens, first_segment, num_segments;

    int64_t last_token() const { return first_token + num_tokens - 1; }
  };

  void make_runs(const AttendArgs &args);
  int64_t max_shared_tokens(int64_t num_threads) const;
  bool share(const AttendArgs &args, const Run &run, const Run &next, int64_t segment) const;
  bool share_any(const AttendArgs &args, const Run &run, const Run &next) const;
  void add_cluster(const AttendArgs &args, std::size_t begin, std::size_t end, int64_t max_tokens);
  SegmentTask own_task(const AttendArgs &args, const Run &run, int64_t segment) const;
  int64_t cost(const AttendArgs &args, const SegmentTask &task) const;
  void make_chunks(const AttendArgs &args, int64_t num_threads);
  void place_slots();

  int64_t num_heads_, num_kv_heads_, head_dim_, kv_group_, window_;
  std::vector<Run> runs_;
  std::vector<int64_t> costs_; // of each unit
  int64_t unfinished_size_ = 0;
};

} // namespace kvik
