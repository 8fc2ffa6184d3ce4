// Memory that ops use while they run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "attend_plan.h"
#include "kernels.h"

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
  Buffer queries; // transformed
};

// Rows as the kernels of matrix products read them.
struct RowsSpace {
  QuantizedRows quantized(int64_t num_rows, int64_t columns, bool int16_activations) {
    const int64_t groups = QuantizedRows::panels(columns) * num_rows * QuantizedRows::kGroups;
    return {high.get<int8_t>(groups * kGroup), int16_activations ? low.get<int8_t>(groups * kGroup) : nullptr,
            scale.get<float>(groups),          totals.get<int32_t>(3 * groups),
            sums.get<float>(3 * groups),       num_rows};
  }

  Buffer high, low, scale, totals, sums; // quantised
  Buffer floats;                         // after their norm, for float weights
};

struct Expert;

// Which experts the rows of a step chose, and what these make of them.
struct ExpertsSpace {
  Buffer scores, chosen, weights; // by token
  Buffer tokens, factors;         // of rows that are grouped by expert
  RowsSpace grouped;
  Buffer hidden, added;
  std::vector<std::vector<const Expert *>> last_chosen; // by layer, of those that lie in a file
};

// One op at a time; a captured step keeps one for all of its ops.
struct Workspace {
  RowsSpace rows;
  Buffer up;           // the other half of a gated projection
  Buffer keys, values; // before they go to their slots
  Buffer packed;       // rows of a mapped table
  ExpertsSpace experts;
  AttentionSpace attention;
};

} // namespace kvik
