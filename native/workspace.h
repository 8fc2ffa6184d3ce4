// Memory that ops use while they run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "attend_plan.h"

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
  // The step's plan for such args: layers of one shape have the same.
  AttendPlan &plan(const AttendArgs &args, int64_t num_threads) {
    for (std::size_t i = 0; i < num_plans; ++i)
      if (plans[i].fits(args)) return plans[i];
    if (num_plans == plans.size()) plans.emplace_back();
    AttendPlan &made = plans[num_plans];
    made.make(args, num_threads);
    ++num_plans;
    return made;
  }
  // Tokens, positions or block tables are others now.
  void begin_step() { num_plans = 0; }

  std::vector<AttendPlan> plans; // those behind num_plans are old ones, for their memory
  std::size_t num_plans = 0;
  Buffer scratch, totals, slots;
};

// One op at a time; a captured step keeps one for all of its ops.
struct Workspace {
  Buffer high, low, scale, totals, sums; // quantised activations
  Buffer normed;                         // rows after their norm, for float weights
  Buffer up;                             // the other half of a gated projection
  Buffer keys, values;                   // before they go to their slots
  AttentionSpace attention;
};

} // namespace kvik
