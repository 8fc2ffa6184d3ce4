// Memory that ops use while they run.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace kvik {

// Grows and is never cleared: whoever reads an item has written it in the same op.
class Buffer {
public:
  Buffer() = default;
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;

  template <class T> T *get(int64_t count) {
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + kLine - 1) / kLine * kLine;
    if (bytes > capacity_) {
      std::free(data_);
      capacity_ = 0;
      data_ = std::aligned_alloc(kLine, bytes);
      if (!data_) throw std::bad_alloc();
      capacity_ = bytes;
    }
    return static_cast<T *>(data_);
  }

private:
  static constexpr std::size_t kLine = 64; // no two buffers share a cache line
  void *data_ = nullptr;
  std::size_t capacity_ = 0;
};

// What attention plans and what it has computed so far.
struct AttentionSpace {
  // Neighbouring queries of a sequence at one KV head, and the segments that some of them see.
  struct Tile {
    int64_t first_token, num_tokens, kv_head;
    int64_t first_segment, num_segments;
    int64_t slot; // of its first segment's result where several chunks share the tile, else -1
  };
  struct Unit {
    int64_t tile, segment;
  };

  std::vector<Tile> tiles;
  std::vector<Unit> units;
  std::vector<int64_t> chunk_ends;                    // units
  std::vector<int64_t> costs;                         // of each unit
  std::unique_ptr<std::atomic<int64_t>[]> unfinished; // units of each tile
  int64_t unfinished_size = 0;
  Buffer scratch, totals, slots;
};

// One op at a time; a recorded step keeps one for all of its ops.
struct Workspace {
  Buffer high, low, scale, sums, excess; // quantised activations
  Buffer normed;                         // rows after their norm, for float weights
  Buffer up;                             // the other half of a gated projection
  Buffer keys, values;                   // before they go to their slots
  AttentionSpace attention;
};

} // namespace kvik
